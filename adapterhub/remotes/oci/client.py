"""The HTTP client of an OCI registry: its errors, and the answer to its 401.

The errors are those of the distribution-spec (v1.1, "Error codes"). The answer to a 401 is Basic, or a token from the service
that the challenge names (docker's "Token Authentication"). The username and password, or the identity token, are sent to that
service and to the registry itself, never along a redirect. Without TLS they are sent to this machine only, and to a registry
that the user has logged in to without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlencode, urlsplit

from adapterhub.http.boundary import Boundary, is_loopback
from adapterhub.http.client import PAUSES, Answer, Client
from adapterhub.http.errors import AgainError, DeniedError
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, RemoteError

from . import challenges
from .address import Address
from .credentials import Credentials

DIGEST_HEADER = "docker-content-digest"


def check_digest(answer: Answer, digest: str, where: str) -> None:
    """Raise IntegrityError if a registry answers that it stored something else than `digest`."""
    stored = answer.headers.get(DIGEST_HEADER, digest)
    if stored != digest:
        raise IntegrityError(where, f"the registry stored {stored[:80]}, not {digest}", "Try again")


class RegistryClient(Client):
    """HTTP to one registry, or to its token service."""

    plain_hint = "Use oci+http:// for plain HTTP"

    @classmethod
    def to(
        cls,
        where: str,
        address: Address,
        find: Callable[[], Credentials | None],
        hint: str = "",
        *,
        pauses: Sequence[float] = PAUSES,
        proxy: ProxyOf = no_proxy,
    ) -> RegistryClient:
        """A client of the registry of an address; `find` is called when it first asks for credentials.

        `hint` is for a login that this program has no way to make; by default it is the one to the registry.
        """
        host = "" if hint else address.login
        login = Login(where, address, hint or f"Log in to {host}", find, proxy, host=host)
        return cls(
            address.base,
            login,
            login.hint,
            lambda: login.secrets,
            pauses,
            proxy=proxy,
            login_host=host,
            boundary=login.boundary,
        )

    def _refusal(self, answer: Answer, where: str) -> Exception:
        found = super()._refusal(answer, where)
        if self._details(answer).startswith(": DIGEST_INVALID") and not isinstance(found, AgainError | DeniedError):
            what = f"the registry received other bytes (HTTP {answer.status})"
            return IntegrityError(where, what, "Nothing was stored; try again")
        return found

    def _details(self, answer: Answer) -> str:
        try:
            error = json_file.parse(answer.body, where="")["errors"][0]
            code, message = str(error["code"])[:40], str(error.get("message") or "")[:200]
        except (FormatError, KeyError, TypeError, IndexError, AttributeError):
            return ""
        return self.unless_secret(f": {code}" + (f", {message}" if message else ""))


# ---- authentication


_MAX_TOKEN = 16_384  # characters
_LARGEST = 1 << 18  # bytes of a token service's answer
_CLIENT = "adapterhub"


def _is_token(text: str) -> bool:
    return 0 < len(text) <= _MAX_TOKEN and text.isascii() and text.isprintable() and " " not in text


class Login:
    """Authentication at the registry of an address; `find` is called when it first asks for credentials."""

    def __init__(
        self,
        where: str,
        address: Address,
        hint: str,
        find: Callable[[], Credentials | None],
        proxy: ProxyOf = no_proxy,
        *,
        host: str = "",
    ) -> None:
        self.where, self.hint, self._address, self._find, self._proxy, self._host = where, hint, address, find, proxy, host
        self.boundary = Boundary(origin(address.base, where)[1])
        self.secrets: tuple[str, ...] = ()

    def __call__(self, headers: Sequence[str], scope: str) -> str:
        """The value of `Authorization`; DeniedError without credentials for any of the challenges."""
        credentials = self._find()
        self.secrets = credentials.secrets() if credentials else ()
        found = challenges.parse(headers)
        if "bearer" in found:
            if credentials and credentials.bearer:
                return f"Bearer {credentials.bearer}"
            return f"Bearer {self._token(found['bearer'], scope, credentials)}"
        if "basic" in found and credentials and credentials.user:
            return credentials.basic()
        what = "login required" if found else "login required, with an unsupported authentication scheme"
        raise self._denied(f"HTTP 401: {what}")

    def _denied(self, what: str) -> DeniedError:
        if self._address.plain:
            what += "; a login that was made with TLS is not sent without it"
        return DeniedError(self.where, what, self.hint, host=self._host)

    def _token(self, challenge: Mapping[str, str], scope: str, credentials: Credentials | None) -> str:
        realm = challenge.get("realm", "")
        scheme, host, _ = origin(realm, self.where)
        registry = origin(self._address.base, self.where)
        if scheme != "https" and (registry[0] == "https" or (credentials and host != registry[1] and not is_loopback(host))):
            raise RemoteError(self.where, "it asks for the password over plain HTTP", code="no-tls")
        asked = [("service", challenge["service"])] if challenge.get("service") else []
        asked += [("scope", one) for one in (scope.split() or [challenge.get("scope", "")]) if one]
        answer = self._asked(realm, asked, credentials)
        try:
            document = json_file.parse_object(answer.body, self.where)
            token = document.get("token") or document.get("access_token")
        except FormatError:
            token = None
        if not isinstance(token, str) or not _is_token(token):
            raise RemoteError(self.where, "its token service does not answer with a token", "Try again later")
        self.secrets += (token,)
        return token

    def _asked(self, realm: str, asked: list[tuple[str, str]], credentials: Credentials | None) -> Answer:
        client = RegistryClient(realm, secrets=lambda: self.secrets, proxy=self._proxy, boundary=self.boundary)
        try:
            if credentials and credentials.identity:
                form = [
                    ("grant_type", "refresh_token"),
                    ("client_id", _CLIENT),
                    ("refresh_token", credentials.identity),
                    *asked,
                ]
                scopes = " ".join(value for key, value in form if key == "scope")
                form = [pair for pair in form if pair[0] != "scope"] + ([("scope", scopes)] if scopes else [])
                kind = {"Content-Type": "application/x-www-form-urlencoded"}
                return client.ask(
                    "POST", realm, self.where, good=(200,), headers=kind, body=urlencode(form).encode(), limit=_LARGEST
                )
            url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(asked)
            if not credentials:
                return client.ask("GET", url, self.where, good=(200,), limit=_LARGEST)
            # Like a POST, a request with a password is not redirected: 3xx is not a good status.
            headers = {"Authorization": credentials.basic()}
            return client.ask("GET", url, self.where, good=(200,), headers=headers, limit=_LARGEST, redirects=False)
        except DeniedError as error:
            what = "the username and password were refused" if credentials else "login required"
            raise self._denied(f"{error.what.partition(':')[0]}: {what}") from error
        finally:
            client.close()
