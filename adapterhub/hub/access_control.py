"""Authentication by the Authorization header, and what an account may do with a repository.

A repository that a client may not see is answered like one that does not exist, and a blob can be read only through a
repository that has it. A client that sees a gated repository may not read its files yet: `check_files` decides that for every
protocol.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from adapterhub.http_server.rate_windows import Windows
from adapterhub.http_server.request_bodies import client_network
from adapterhub.registry.repository_documents import Repository
from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

from . import aliases, gates, request_context
from .accounts import access_tokens, accounts, sessions
from .accounts.access_tokens import Identity
from .accounts.accounts import EVERYWHERE, READERS, ROLES, Namespace
from .hub_database import HubDatabase

_BASIC = safe_regex.Pattern(r"(?i)basic +([A-Za-z0-9+/=_-]+)")
T = TypeVar("T", str, int)
NOBODY = "anonymous"
"""The token of an anonymous client: docker reads even public repositories only with some token."""
_TTL = 5.0  # seconds until a revoked token is refused and a changed role applies, at most
_MAX_TOKENS = 10_000  # tokens kept in memory


class NoTokenError(Exception):
    """A token is needed, and the request has none."""


class BadTokenError(NoTokenError):
    """The token is unknown, revoked or expired."""


class ThrottledError(BadTokenError):
    """An address has tried too often; it may go on after `seconds`."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many attempts from this address; try again in {seconds} seconds")
        self.seconds = seconds


class ForbiddenError(Exception):
    """The token is valid but lacks the role for this; `str()` says which."""


class GatedError(ForbiddenError):
    """The files of a name are for accounts with access to it, and the client has none; `anonymous` if it has no account."""

    def __init__(self, name: str, status: str, *, anonymous: bool) -> None:
        problem = _GATED["anonymous" if anonymous else status]
        super().__init__(f"{name} is gated: {problem}")
        self.anonymous = anonymous


_GATED = {
    "anonymous": "its files are for accounts with access. Log in, and ask for access on its page",
    "": "its files are for accounts with access. Accept its terms and ask for access on its page",
    gates.PENDING: "the request for access waits for its owners",
    gates.REJECTED: "its owners have rejected the request for access",
    gates.ACCEPTED: "the account has access, but this token is limited to other names",
}
"""Why a client reads no files, by the status of its account's request."""


@dataclass
class Access:
    """The access control of a hub: `identify` every request, `check_write` before every change.

    Attributes:
        logins: Attempts to start a device login, by network.
        codes: Device codes tried, by network.
        failures: Invalid tokens sent, by network.
        conversions: Versions converted for clients without a token, by network.
    """

    database: HubDatabase
    require_login: bool = False

    def __post_init__(self) -> None:
        self._identities: dict[str | int, tuple[float, Identity | None]] = {}
        # A device code has 34 bits and lives for minutes: at these rates nobody guesses one.
        self.logins, self.codes, self.failures = Windows(30, 300), Windows(20, 300), Windows(20, 60)
        self.conversions = Windows(20, 300)
        self._namespaces: tuple[float, dict[str, Namespace]] = 0.0, {}
        self._owned: tuple[float, set[str]] = 0.0, set()

    def identify(self, headers: Mapping[str, str]) -> Identity | None:
        """Return the identity behind a request; None without an Authorization header or with the anonymous token.

        Raises:
            BadTokenError: The header has no token, or an invalid one.
            ThrottledError: This network has sent too many invalid tokens. A valid token is always accepted.
        """
        token = token_in(headers)
        if token is None or token == NOBODY:
            return None
        identity = self.token_identity(token)
        if identity is None:
            self.count_attempt(self.failures)
            raise BadTokenError
        request_context.current().set_account(identity.account, identity.prefix, identity.token)
        return identity

    def count_attempt(self, windows: Windows) -> None:
        """Count an attempt by the client's network.

        Raises:
            ThrottledError: It has made too many.
        """
        if (window := windows.count(client_network(request_context.current().address))).over:
            raise ThrottledError(window.seconds)

    def token_identity(self, token: str) -> Identity | None:
        """Return the identity of a token; None if it is unknown, revoked or expired."""
        if token == request_context.current().unknown_secret:
            return None
        return self._cached_identity(token, access_tokens.identify)

    def identity_behind(self, ident: int) -> Identity | None:
        """Return the identity of the token that an address was signed for, and record it as the client; None as above."""
        identity = self._cached_identity(ident, access_tokens.identify_by_id)
        if identity:
            request_context.current().set_account(identity.account, identity.prefix, identity.token)
        return identity

    def _cached_identity(self, token: T, identify: Callable[[HubDatabase, T], Identity | None]) -> Identity | None:
        now = time.monotonic()
        until, identity = self._identities.get(token, (0.0, None))
        if until < now:
            if len(self._identities) >= _MAX_TOKENS:
                self._identities.clear()
            identity = identify(self.database, token)
            if identity:
                # Only valid tokens are remembered: an attacker's guesses must not push them out.
                access_tokens.record_use(self.database, identity.token)
                self._identities[token] = now + _TTL, identity
        return identity if identity and (identity.expires is None or identity.expires > time.time()) else None

    def session_identity(self, cookie: str) -> Identity | None:
        """Return the identity of a browser's session; None if it is unknown or over."""
        is_unknown = cookie == request_context.current().unknown_secret
        return None if is_unknown else sessions.session_identity(self.database, cookie)

    def is_remembered(self, secret: str) -> bool:
        """Return whether a secret is `anonymous`, or a token that was used within seconds."""
        return secret == NOBODY or self._identities.get(secret, (0.0, None))[0] >= time.monotonic()

    def look_up(self, secret: str, *, is_token: bool) -> None:
        """Look up whose a request's token is, or the cookie of its session, before the event loop asks for it."""
        if not (self.token_identity(secret) if is_token else self.session_identity(secret)):
            request_context.current().unknown_secret = secret

    def may_read(self, identity: Identity | None, name: str, repository: Repository | None) -> bool:
        """Return whether a client may see a repository; `repository` is its state, None if it only has versions."""
        namespace = name.partition("/")[0]
        if identity is not None and identity.has_role("read", name):
            return True
        readers = self.namespace_settings(namespace).readers
        if (repository and repository.private) or readers == READERS[2]:
            return False
        return identity is not None or (readers == READERS[0] and not self.require_login)

    def check_files(self, identity: Identity | None, name: str) -> None:
        """Raise GatedError unless a client that sees a repository, or an alias of it, may read its files."""
        alias = aliases.parse(name)
        source = alias.name if alias else name
        if identity is not None and identity.has_role("read", source):
            return
        status = gates.access_status(self.database, source, identity.account if identity else "")
        if status is None or (status == gates.ACCEPTED and identity is not None and identity.is_for(source)):
            return
        raise GatedError(source, status, anonymous=identity is None)

    def may_read_files(self, identity: Identity | None, name: str) -> bool:
        """Return whether a client may read the files of a repository that it sees."""
        try:
            self.check_files(identity, name)
        except GatedError:
            return False
        return True

    def namespace_settings(self, namespace: str) -> Namespace:
        """Return the settings of a namespace, as of the last few seconds."""
        return self.namespaces().get(namespace) or Namespace(namespace)

    def namespaces(self) -> Mapping[str, Namespace]:
        """Return the namespaces with settings, as of the last few seconds."""
        until, namespaces = self._namespaces
        if until < time.monotonic():
            namespaces = {row.name: row for row in accounts.namespaces(self.database)}
            self._namespaces = time.monotonic() + _TTL, namespaces
        return namespaces

    def has_members_only(self, name: str) -> bool:
        """Return whether only members read the namespace of a name, as of the last few seconds."""
        return self.namespace_settings(name.partition("/")[0]).readers == READERS[2]

    def is_local_namespace(self, namespace: str) -> bool:
        """Return whether a namespace belongs to somebody here, or is for its members only, as of the last few seconds."""
        until, owned_names = self._owned
        if until < time.monotonic():
            owned_names = accounts.owned_namespaces(self.database)
            self._owned = time.monotonic() + _TTL, owned_names
        return namespace in owned_names or self.namespace_settings(namespace).readers == READERS[2]

    def check_write(self, identity: Identity | None, name: str) -> Identity:
        """Return the client's identity if it may write in the namespace of `name`.

        Raises:
            NoTokenError: The request has no token.
            ForbiddenError: The token lacks the role `write` there.
            RefusedError: The name is an alias of another repository, and read-only.
        """
        namespace = name.partition("/")[0]
        request_context.current().record_change(name)
        if identity is None:
            raise NoTokenError
        if not identity.has_role("write", name):
            actual = f"has the role {actual_role} there" if (actual_role := identity.role_in(name)) else "has no role there"
            raise ForbiddenError(f"this needs the role write in {namespace}: the token of {identity.account} {actual}")
        aliases.check_writable_name(name)
        return identity


def check_admin(identity: Identity | None, namespace: str) -> Identity:
    """Return the client's identity if it may manage a namespace, or the whole hub with EVERYWHERE.

    Raises:
        NoTokenError: The request has no token.
        ForbiddenError: The token lacks the role `admin` there.
    """
    if namespace != EVERYWHERE:
        request_context.current().record_change(namespace)
    if identity is None:
        raise NoTokenError
    if not identity.has_role(ROLES[-1], namespace):
        where = "every namespace" if namespace == EVERYWHERE else namespace[:100]
        role = identity.role_in(namespace)
        actual = f"has the role {role} there" if role else "has no role there"
        raise ForbiddenError(f"this needs the role admin in {where}: the token of {identity.account} {actual}")
    return identity


def check_scope(identity: Identity, name: str) -> None:
    """Refuse what an account does with a name that it need not have a role for, by a token that is limited to other names.

    Raises:
        ForbiddenError: It is limited to others.
    """
    if not identity.is_for(name):
        raise ForbiddenError(f"this token of {identity.account} is limited to other names than {name[:210]}")


def may_write(identity: Identity | None, name: str) -> bool:
    """Return whether a client may write to a repository."""
    return identity is not None and identity.has_role("write", name)


def token_in(headers: Mapping[str, str]) -> str | None:
    """Return the token of a Bearer header, or the password of a Basic one, as docker and oras send it; None without a header.

    Raises:
        BadTokenError: The header has no token.
    """
    header = headers.get("authorization", "").strip()
    if not header:
        return None
    scheme, _, credentials = header.partition(" ")
    token = credentials.lstrip(" ")
    if scheme.lower() == "bearer" and token and len(token.split()) == 1:
        return token
    if basic := _BASIC.fullmatch(header):
        try:
            return base64.b64decode(basic[1], validate=False).decode("utf-8", "replace").partition(":")[2]
        except binascii.Error:
            pass
    raise BadTokenError
