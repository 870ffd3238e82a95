"""The HTTP client of an OCI registry: its errors, and its response to a 401.

The errors are those of the distribution-spec (v1.1, "Error codes"). The response to a 401 is Basic, or a token from the service
that the challenge names (docker's "Token Authentication"). The username and password, or the identity token, are sent only to
that service and to the registry itself, never along a redirect. Without TLS they are sent only to this machine, and to a
registry that the user has logged in to without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from urllib.parse import urlencode, urlsplit

from adapterhub.http.boundary import Boundary, is_loopback
from adapterhub.http.client import PAUSES, Client
from adapterhub.http.http_errors import DeniedError, RetryableError
from adapterhub.http.responses import Response
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub.registry import withdrawals
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, RemoteError

from . import challenges
from .docker_credentials import Credentials
from .oci_address import OciAddress

DIGEST_HEADER = "docker-content-digest"


def check_digest(response: Response, digest: str, location: str) -> None:
    """Raise an IntegrityError if a registry answers that it stored another digest than `digest`."""
    stored_digest = response.headers.get(DIGEST_HEADER, digest)
    if stored_digest != digest:
        raise IntegrityError(location, f"the registry stored {stored_digest[:80]}, not {digest}", "Try again")


class RegistryClient(Client):
    """An HTTP client of one registry, or of its token service."""

    plain_hint = "Use oci+http:// for plain HTTP"

    @classmethod
    def open(
        cls,
        location: str,
        address: OciAddress,
        find_credentials: Callable[[], Credentials | None],
        hint: str = "",
        *,
        pauses: Sequence[float] = PAUSES,
        proxy: ProxyOf = no_proxy,
    ) -> RegistryClient:
        """Return a client of an address's registry; `find_credentials` is called when the registry first asks for credentials.

        `hint` is for a login that this program has no way to make; by default, the hint is to log in to the registry.
        """
        host = "" if hint else address.login
        login = Authenticator(location, address, hint or f"Log in to {host}", find_credentials, proxy, host=host)
        return cls(
            address.registry_url,
            login,
            login.hint,
            lambda: login.secrets,
            pauses,
            proxy=proxy,
            login_host=host,
            boundary=login.boundary,
        )

    def _refusal(self, response: Response, location: str) -> Exception:
        if response.status == 410:
            # The distribution specification has no code of its own for this, so that the message alone says it.
            code, _, message = self._details(response).partition(", ")
            return withdrawals.error_elsewhere(location, f": {message}" if message else code)
        error = super()._refusal(response, location)
        if response.status == 401 and isinstance(error, DeniedError) and isinstance(self.authorize, Authenticator):
            # A token of a service may be for other names only.
            error.refuses_login = self.authorize.sends_credentials
        # Another digest is the fault of the bytes, not of the connection: sending them again would not help.
        if self._details(response).startswith(": DIGEST_INVALID") and not isinstance(error, RetryableError | DeniedError):
            problem = f"the registry received other bytes (HTTP {response.status})"
            return IntegrityError(location, problem, "Nothing was stored; try again")
        return error

    def _details(self, response: Response) -> str:
        """Return the first error of an answer, after a colon; empty if there is none or it repeats a secret."""
        try:
            error = json_file.parse(response.body, location="")["errors"][0]
            code, message = str(error["code"])[:40], str(error.get("message") or "")[:200]
        # An error may come from a proxy, in HTML.
        except (FormatError, KeyError, TypeError, IndexError, AttributeError):
            return ""
        return self.unless_secret(f": {code}" + (f", {message}" if message else ""))


# ---- authentication


_MAX_TOKEN = 16_384  # characters
_MAX_ANSWER = 1 << 18  # bytes of a token service's answer
_CLIENT = "adapterhub"


def _is_token(text: str) -> bool:
    """Return whether a text can be sent as a token: printable ASCII without spaces, of a sane length."""
    return 0 < len(text) <= _MAX_TOKEN and text.isascii() and text.isprintable() and " " not in text


class Authenticator:
    """Authentication at the registry of an address; `find_credentials` is called when it first asks for them.

    Attributes:
        sends_credentials: Whether the registry itself gets them, and no token that a service has given for them.
    """

    def __init__(
        self,
        location: str,
        address: OciAddress,
        hint: str,
        find_credentials: Callable[[], Credentials | None],
        proxy: ProxyOf = no_proxy,
        *,
        host: str = "",
    ) -> None:
        self.location, self.hint, self._address, self._find, self._proxy, self._host = (
            location,
            hint,
            address,
            find_credentials,
            proxy,
            host,
        )
        self.boundary = Boundary(origin(address.registry_url, location)[1])
        self.secrets: tuple[str, ...] = ()
        self.sends_credentials = False

    def __call__(self, headers: Sequence[str], scope: str) -> str:
        """Return the value of `Authorization`.

        Raises:
            DeniedError: There are no credentials for any of the challenges.
        """
        credentials = self._find()
        self.secrets = credentials.secrets() if credentials else ()
        found_challenges = challenges.parse(headers)
        # A token can be limited to a scope and expires: prefer it to the password itself.
        if "bearer" in found_challenges:
            if credentials and credentials.bearer:
                self.sends_credentials = True
                return f"Bearer {credentials.bearer}"
            return f"Bearer {self._token(found_challenges['bearer'], scope, credentials)}"
        if "basic" in found_challenges and credentials and credentials.user:
            self.sends_credentials = True
            return credentials.basic()
        problem = "login required" if found_challenges else "login required, with an unsupported authentication scheme"
        raise self._denied_error(f"HTTP 401: {problem}")

    def _denied_error(self, problem: str, *, refuses_login: bool = False) -> DeniedError:
        """Return the error for a login that is missing or was refused."""
        if self._address.is_plaintext:
            problem += "; a login that was made with TLS is not sent without it"
        return DeniedError(self.location, problem, self.hint, host=self._host, refuses_login=refuses_login)

    def _token(self, challenge: Mapping[str, str], scope: str, credentials: Credentials | None) -> str:
        """Get a token for a scope from the service that a challenge names."""
        realm = challenge.get("realm", "")
        scheme, host, _ = origin(realm, self.location)
        registry = origin(self._address.registry_url, self.location)
        # The realm is whatever the registry says: a registry with TLS must not redirect the password to plain HTTP.
        if scheme != "https" and (registry[0] == "https" or (credentials and host != registry[1] and not is_loopback(host))):
            raise RemoteError(self.location, "it asks for the password over plain HTTP", code="no-tls")
        parameters = [("service", challenge["service"])] if challenge.get("service") else []
        parameters += [("scope", part) for part in (scope.split() or [challenge.get("scope", "")]) if part]
        response = self._request_token(realm, parameters, credentials)
        try:
            document = json_file.parse_object(response.body, self.location)
            token = document.get("token") or document.get("access_token")
        except FormatError:
            token = None
        if not isinstance(token, str) or not _is_token(token):
            raise RemoteError(self.location, "its token service does not answer with a token", "Try again later")
        self.secrets += (token,)
        return token

    def _request_token(self, realm: str, parameters: list[tuple[str, str]], credentials: Credentials | None) -> Response:
        """Ask the token service: with a form for an identity token, else with a GET, as docker does."""
        client = RegistryClient(realm, secrets=lambda: self.secrets, proxy=self._proxy, boundary=self.boundary)
        try:
            if credentials and credentials.identity:
                form = [
                    ("grant_type", "refresh_token"),
                    ("client_id", _CLIENT),
                    ("refresh_token", credentials.identity),
                    *parameters,
                ]
                # A form has one `scope` with spaces where the query has several (docker's "Oauth2 Token Authentication").
                scopes = " ".join(value for key, value in form if key == "scope")
                form = [pair for pair in form if pair[0] != "scope"] + ([("scope", scopes)] if scopes else [])
                headers_of_form = {"Content-Type": "application/x-www-form-urlencoded"}
                return client.request(
                    "POST",
                    realm,
                    self.location,
                    good=(200,),
                    headers=headers_of_form,
                    body=urlencode(form).encode(),
                    limit=_MAX_ANSWER,
                )
            url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(parameters)
            if not credentials:
                return client.request("GET", url, self.location, good=(200,), limit=_MAX_ANSWER)
            # Like a POST, a request with a password is not redirected: 3xx is not a good status.
            headers = {"Authorization": credentials.basic()}
            return client.request("GET", url, self.location, good=(200,), headers=headers, limit=_MAX_ANSWER, redirects=False)
        except DeniedError as error:
            status = error.what.partition(":")[0]
            problem = "the username and password were refused" if credentials else "login required"
            refuses_login = credentials is not None and status == "HTTP 401"
            raise self._denied_error(f"{status}: {problem}", refuses_login=refuses_login) from error
        finally:
            client.close()
