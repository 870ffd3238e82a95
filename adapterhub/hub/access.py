"""Who asks, by the Authorization header, and what they may do with a repository.

A repository that one may not see answers as one that does not exist, and a blob can be read only through a repository that has
it.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass

from adapterhub.http_server.limits import Windows
from adapterhub.registry.repositories import Repository
from adapterhub_converters import linear

from . import aliases, asking
from .database import HubDatabase
from .people import accounts, tokens
from .people.accounts import READERS, Namespace
from .people.tokens import Identity

_BASIC = linear.Pattern(r"(?i)basic +([A-Za-z0-9+/=_-]+)")
NOBODY = "anonymous"
"""A token that stands for nobody, for docker's clients, which read what is public only with one."""
_REMEMBERED = 5.0  # seconds until a revoked token is refused, and a role is changed, at the latest
_MOST = 10_000  # tokens that are remembered


class NoTokenError(Exception):
    """A token is needed, and there is none."""


class BadTokenError(NoTokenError):
    """The token is unknown, revoked or expired."""


class ThrottledError(BadTokenError):
    """An address tries too often; `seconds` until it may go on."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many attempts from this address; try again in {seconds} seconds")
        self.seconds = seconds


class ForbiddenError(Exception):
    """The token is good, and may not do this; `str()` tells what it lacks."""


@dataclass
class Access:
    """The door of a hub: `identify` at each request, `check` before each answer.

    Attributes:
        logins: Logins of devices that were begun.
        codes: Codes of those that were tried.
        failures: Tokens that were not good.
        conversions: Versions that were converted for clients without a token.
    """

    database: HubDatabase
    require_login: bool = False

    def __post_init__(self) -> None:
        self._remembered: dict[str, tuple[float, Identity | None]] = {}
        # By address: a code of a login has 34 bits and lives for minutes, so that nobody finds one by trying.
        self.logins, self.codes, self.failures = Windows(30, 300), Windows(20, 300), Windows(20, 60)
        self.conversions = Windows(20, 300)
        self._namespaces: tuple[float, dict[str, Namespace]] = 0.0, {}
        self._taken: tuple[float, set[str]] = 0.0, set()

    def identify(self, headers: Mapping[str, str]) -> Identity | None:
        """Return who asks; None without an Authorization header, or with the token of nobody.

        Raises:
            BadTokenError: The header has no token, or not a good one.
            ThrottledError: It is one of many from this address that were not good; a good one always is.
        """
        token = token_in(headers)
        if token is None or token == NOBODY:
            return None
        found = self.known(token)
        if found is None:
            self.attempt(self.failures)
            raise BadTokenError
        asking.now().known(found.account, found.prefix)
        return found

    def attempt(self, windows: Windows) -> None:
        """Count an attempt of the network that asks; ThrottledError for one too many."""
        if (window := windows.count(_network(asking.now().address))).over:
            raise ThrottledError(window.seconds)

    def known(self, token: str) -> Identity | None:
        """Who a token belongs to; None for one that is unknown, revoked or expired."""
        now = time.monotonic()
        until, found = self._remembered.get(token, (0.0, None))
        if until < now:
            if len(self._remembered) >= _MOST:
                self._remembered.clear()
            found = tokens.identify(self.database, token)
            if found:
                tokens.used(self.database, found.token)
                self._remembered[token] = now + _REMEMBERED, found
        return found if found and (found.expires is None or found.expires > time.time()) else None

    def may_read(self, who: Identity | None, name: str, repository: Repository | None) -> bool:
        """Return True if somebody may see a repository; `repository` is its state, None for one that only has versions."""
        namespace = name.partition("/")[0]
        if who is not None and who.may("read", name):
            return True
        readers = self.settled(namespace).readers
        if (repository and repository.private) or readers == READERS[2]:
            return False
        return who is not None or (readers == READERS[0] and not self.require_login)

    def settled(self, namespace: str) -> Namespace:
        """What holds in a namespace, as of the last seconds."""
        until, found = self._namespaces
        if until < time.monotonic():
            found = {one.name: one for one in accounts.namespaces(self.database)}
            self._namespaces = time.monotonic() + _REMEMBERED, found
        return found.get(namespace) or Namespace(namespace)

    def is_taken(self, namespace: str) -> bool:
        """Whether a namespace is somebody's here, or for its members only, as of the last seconds."""
        until, found = self._taken
        if until < time.monotonic():
            found = accounts.taken(self.database)
            self._taken = time.monotonic() + _REMEMBERED, found
        return namespace in found or self.settled(namespace).readers == READERS[2]

    def check_write(self, who: Identity | None, name: str, role: str = "write") -> Identity:
        """Return who asks, if they have a role in the namespace of `name`.

        Raises:
            NoTokenError: Nobody asks.
            ForbiddenError: The token has not that role there.
            RefusedError: The name stands for another repository.
        """
        namespace = name.partition("/")[0]
        asking.now().changes(name)
        if who is None:
            raise NoTokenError
        if not who.may(role, name):
            held = f"has the role {found} there" if (found := who.role_in(name)) else "has no role there"
            raise ForbiddenError(f"this needs the role {role} in {namespace}: the token of {who.account} {held}")
        aliases.check_own(name)
        return who


def writes(who: Identity | None, name: str) -> bool:
    """Whether somebody may write to a repository."""
    return who is not None and who.may("write", name.partition("/")[0])


def _network(address: str) -> str:
    """The addresses that one client has: with IPv6, 2^64 of them."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((int(found), 64), strict=False))


def token_in(headers: Mapping[str, str]) -> str | None:
    """The token of a Bearer header, or the password of a Basic one, as docker and oras send it; None without a header.

    Raises:
        BadTokenError: The header has no token.
    """
    header = headers.get("authorization", "").strip()
    if not header:
        return None
    scheme, _, rest = header.partition(" ")
    token = rest.lstrip(" ")
    if scheme.lower() == "bearer" and token and len(token.split()) == 1:
        return token
    if found := _BASIC.fullmatch(header):
        try:
            return base64.b64decode(found[1], validate=False).decode("utf-8", "replace").partition(":")[2]
        except binascii.Error:
            pass
    raise BadTokenError
