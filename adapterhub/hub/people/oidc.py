"""A person's login at an OpenID Connect provider: the authorization code flow with PKCE (Core 1.0, 3.1; RFC 7636; RFC 9700).

The browser that begins keeps a random text in a cookie. What must come back with it, state, nonce and the verifier of PKCE, is
made of that text with the hub's secret: a login is completed only by the browser that began it, and nothing is stored of logins
that nobody completes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import secrets
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, urlencode

from adapterhub.http.client import Client
from adapterhub.http.errors import DeniedError
from adapterhub.http.urls import origin
from adapterhub.hub.settings import Provider
from adapterhub_converters.errors import MissingExtraError, RefusedError

from . import id_tokens
from .id_tokens import IdToken, Issuers, client_of, document

LIFETIME = 600
"""Seconds in which a login must be completed."""
_BASIC, _POST = "client_secret_basic", "client_secret_post"
_MAX_CODE, _MAX_TOKEN = 4096, 8192  # characters
_FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}


def check(provider: Provider) -> None:
    """Raise for a provider that nobody could sign in with: without TLS, or where the signatures cannot be verified."""
    id_tokens.check_issuer(provider.issuer)
    if importlib.util.find_spec("cryptography") is None:
        raise MissingExtraError(
            "", "signing in needs cryptography, which is not installed", "Run `pip install 'adapterhub[hub,oidc]'`"
        )


@dataclass(frozen=True, slots=True)
class Login:
    """A login that has begun.

    Attributes:
        cookie: What its browser keeps: a random text, when it ends, and the page to show then.
        key: The secret of the hub.
    """

    cookie: str
    key: bytes = field(repr=False)

    @classmethod
    def begin(cls, key: bytes, following: str) -> Login:
        """Begin one, to be followed by a page of the hub."""
        return cls(f"{secrets.token_urlsafe(32)}.{int(time.time()) + LIFETIME}.{following.encode().hex()}", key)

    @property
    def state(self) -> str:
        """What the provider hands back, by which the answer belongs to this browser."""
        return self._made("state")

    @property
    def nonce(self) -> str:
        """What the ID token has, by which it belongs to this login."""
        return self._made("nonce")

    @property
    def verifier(self) -> str:
        """What only the hub can show for the code."""
        return self._made("verifier")

    @property
    def challenge(self) -> str:
        """What the provider compares with the verifier."""
        return base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).decode().rstrip("=")

    def _made(self, use: str) -> str:
        return hmac.new(self.key, f"oidc {use}\n{self.cookie}".encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def check(self, state: str) -> str:
        """The page to show then, if a state is that of this login and it has not ended; RefusedError otherwise."""
        if hmac.compare_digest(self.state.encode(), state.encode("utf-8", "replace")):
            _, expires, following = self.cookie.split(".")  # ours, as the state shows
            if time.time() < int(expires):
                return bytes.fromhex(following).decode()
        raise RefusedError("sign-in", "this login was begun in another browser, or too long ago", "Begin it again")


def address(provider: Provider, issuers: Issuers, login: Login, back: str) -> str:
    """Where the browser logs in; it comes back to `back`, an address of the hub.

    Raises:
        AdapterhubError: The provider does not answer, or not as one.
    """
    where = str(issuers.about(provider.issuer).get("authorization_endpoint", ""))
    if origin(where, provider.issuer)[0] != origin(provider.issuer, provider.issuer)[0]:
        raise RefusedError(provider.issuer, "its login page is not served over HTTPS")
    asked = {
        "response_type": "code",
        "client_id": provider.client,
        "redirect_uri": back,
        "scope": provider.scope,
        "state": login.state,
        "nonce": login.nonce,
        "code_challenge": login.challenge,
        "code_challenge_method": "S256",
    }
    return f"{where}{'&' if '?' in where else '?'}{urlencode(asked)}"


def complete(provider: Provider, issuers: Issuers, login: Login, back: str, answer: Mapping[str, str]) -> IdToken:
    """Who has logged in, by what the browser brought back.

    Args:
        provider: Where.
        issuers: Its addresses and keys.
        login: The login, whose state is that of the answer.
        back: The address that it came back to.
        answer: The query of the redirect.

    Raises:
        AdapterhubError: The provider refuses, does not answer, or its answer is not for this login.
    """
    if answer.get("iss", provider.issuer) != provider.issuer:  # RFC 9207
        raise RefusedError("sign-in", "the answer is of another issuer")
    if error := answer.get("error"):
        raise RefusedError(provider.issuer, f"answers {error[:80]}: {answer.get('error_description', '')[:300]}")
    code = answer.get("code", "")
    if not code or len(code) > _MAX_CODE:
        raise RefusedError("sign-in", "the answer has no code")
    about = issuers.about(provider.issuer)
    with closing(client_of(provider.issuer, provider.proxy, lambda: (provider.secret, code, login.verifier))) as client:
        given = _redeemed(client, provider, about, {"code": code, "redirect_uri": back, "code_verifier": login.verifier})
        token = given.get("id_token")
        if not isinstance(token, str):
            raise RefusedError(provider.issuer, "gives no ID token")
        found = id_tokens.verify(token, provider.issuer, provider.client, issuers, now=time.time(), nonce=login.nonce)
        return replace(found, claims={**_more(client, provider, about, given, found), **found.claims})


def _redeemed(client: Client, provider: Provider, about: Mapping[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """The tokens for a code."""
    methods = about.get("token_endpoint_auth_methods_supported")
    methods = methods if isinstance(methods, list) else [_BASIC]
    headers, sent = dict(_FORM), {"grant_type": "authorization_code", **fields}
    if provider.secret and (_BASIC in methods or _POST not in methods):
        pair = f"{quote(provider.client, safe='')}:{quote(provider.secret, safe='')}"  # RFC 6749, 2.3.1
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    else:
        sent |= {"client_id": provider.client, **({"client_secret": provider.secret} if provider.secret else {})}
    body = urlencode(sent).encode()
    try:
        return document(
            client, provider.issuer, about.get("token_endpoint"), "POST", headers=headers, body=body, redirects=False
        )
    except DeniedError as error:
        what = "does not accept this hub's client id and secret"
        raise RefusedError(provider.issuer, what, "Ask the hub's operator to check them") from error


def _more(
    client: Client, provider: Provider, about: Mapping[str, Any], given: Mapping[str, Any], found: IdToken
) -> dict[str, Any]:
    """What the provider tells besides the ID token (Core 1.0, 5.3): with a code, many have names and groups only there."""
    access, where = given.get("access_token"), about.get("userinfo_endpoint")
    if where is None or not isinstance(access, str) or len(access) > _MAX_TOKEN:
        return {}
    headers = {"Authorization": f"Bearer {access}", "Accept": "application/json"}
    more = document(client, provider.issuer, where, headers=headers, redirects=False)
    if more.get("sub") != found.claims.get("sub"):
        raise RefusedError(provider.issuer, "has the data of another user than the one who logged in")
    return more
