"""Sign-in at an OpenID Connect provider: the authorization code flow with PKCE (Core 1.0, 3.1; RFC 7636; RFC 9700).

The browser that begins keeps a random text in a cookie. State, nonce and PKCE verifier are derived from that text with the
hub's secret: only the same browser can complete the login, and nothing is stored for logins that nobody completes.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import secrets
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import field, replace
from typing import Any
from urllib.parse import quote, urlencode

from adapterhub.http.client import Client
from adapterhub.http.http_errors import DeniedError
from adapterhub.http.urls import origin
from adapterhub.hub.settings import Provider
from adapterhub.hub.signed_fields import is_equal, signature
from adapterhub_converters.errors import MissingExtraError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import id_tokens
from .id_tokens import IdToken, Issuers, client_of, fetch_document

LIFETIME = 600
"""Seconds in which a login must be completed."""
_BASIC, _POST = "client_secret_basic", "client_secret_post"
_MAX_CODE, _MAX_TOKEN = 4096, 8192  # characters
_FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}


def check(provider: Provider) -> None:
    """Refuse a provider nobody could sign in with: one without TLS, or if ID tokens cannot be verified here."""
    id_tokens.check_issuer(provider.issuer)
    if importlib.util.find_spec("cryptography") is None:
        raise MissingExtraError(
            "", "signing in needs cryptography, which is not installed", "Run `pip install 'adapterhub[hub,oidc]'`"
        )


@dataclass(frozen=True, slots=True)
class Login:
    """A login that has begun.

    Attributes:
        cookie: The browser's cookie: a random text, the time the login ends, and the page to show after it.
        key: The secret of the hub.
    """

    cookie: str
    key: bytes = field(repr=False)

    @classmethod
    def begin(cls, key: bytes, next_page: str) -> Login:
        """Begin a login that is followed by a page of the hub."""
        return cls(f"{secrets.token_urlsafe(32)}.{int(time.time()) + LIFETIME}.{next_page.encode().hex()}", key)

    @property
    def state(self) -> str:
        """The value the provider returns with its answer, which ties that to this browser."""
        return self._derived("state")

    @property
    def nonce(self) -> str:
        """The value in the ID token, which ties that to this login."""
        return self._derived("nonce")

    @property
    def verifier(self) -> str:
        """The secret with which only the hub can redeem the code."""
        return self._derived("verifier")

    @property
    def challenge(self) -> str:
        """The hash of the verifier, which the provider stores."""
        return base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).decode().rstrip("=")

    def _derived(self, use: str) -> str:
        return signature(self.key, f"oidc {use}", self.cookie)

    def check(self, state: str) -> str:
        """Return the page to show next if the state belongs to this login.

        Raises:
            RefusedError: It belongs to another login, or the login has expired.
        """
        if is_equal(state, self.state):
            _, expires, next_page = self.cookie.split(".")  # the matching state proves that this hub wrote the cookie
            if time.time() < int(expires):
                return bytes.fromhex(next_page).decode()
        raise RefusedError("sign-in", "this login was begun in another browser, or too long ago", "Begin it again")


def login_url(provider: Provider, issuers: Issuers, login: Login, redirect_uri: str) -> str:
    """Return the provider's URL to log in at; it redirects back to `redirect_uri` at the hub.

    Raises:
        AdapterhubError: The provider does not respond properly.
    """
    endpoint = str(issuers.about(provider.issuer).get("authorization_endpoint", ""))
    if origin(endpoint, provider.issuer)[0] != origin(provider.issuer, provider.issuer)[0]:
        raise RefusedError(provider.issuer, "its login page is not served over HTTPS")
    params = {
        "response_type": "code",
        "client_id": provider.client,
        "redirect_uri": redirect_uri,
        "scope": provider.scope,
        "state": login.state,
        "nonce": login.nonce,
        "code_challenge": login.challenge,
        "code_challenge_method": "S256",
    }
    return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(params)}"


def complete(provider: Provider, issuers: Issuers, login: Login, redirect_uri: str, answer: Mapping[str, str]) -> IdToken:
    """Return the verified identity of the person who logged in.

    Args:
        provider: The provider.
        issuers: Its addresses and keys.
        login: The login, whose state matches the answer.
        redirect_uri: The address the browser returned to.
        answer: The query of the redirect.

    Raises:
        AdapterhubError: The provider refuses or does not respond, or its answer is not for this login.
    """
    # The answer of another issuer must not be redeemed here (mix-up attack).
    if answer.get("iss", provider.issuer) != provider.issuer:  # RFC 9207
        raise RefusedError("sign-in", "the answer is from another issuer")
    if error := answer.get("error"):
        raise RefusedError(provider.issuer, f"answers {error[:80]}: {answer.get('error_description', '')[:300]}")
    code = answer.get("code", "")
    if not code or len(code) > _MAX_CODE:
        raise RefusedError("sign-in", "the answer has no code")
    about = issuers.about(provider.issuer)
    with closing(client_of(provider.issuer, provider.proxy, lambda: (provider.secret, code, login.verifier))) as client:
        tokens = _redeem_code(
            client, provider, about, {"code": code, "redirect_uri": redirect_uri, "code_verifier": login.verifier}
        )
        token = tokens.get("id_token")
        if not isinstance(token, str):
            raise RefusedError(provider.issuer, "gives no ID token")
        id_token = id_tokens.verify(token, provider.issuer, provider.client, issuers, now=time.time(), nonce=login.nonce)
        # The signed claims of the ID token win over those of userinfo.
        return replace(id_token, claims={**_user_info(client, provider, about, tokens, id_token), **id_token.claims})


def _redeem_code(client: Client, provider: Provider, about: Mapping[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    """Return the tokens for a code."""
    methods = about.get("token_endpoint_auth_methods_supported")
    # The default of Discovery 1.0, section 3.
    methods = methods if isinstance(methods, list) else [_BASIC]
    headers, form = dict(_FORM), {"grant_type": "authorization_code", **fields}
    if provider.secret and (_BASIC in methods or _POST not in methods):
        pair = f"{quote(provider.client, safe='')}:{quote(provider.secret, safe='')}"  # RFC 6749, 2.3.1
        headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
    else:
        form |= {"client_id": provider.client, **({"client_secret": provider.secret} if provider.secret else {})}
    body = urlencode(form).encode()
    try:
        return fetch_document(
            client, provider.issuer, about.get("token_endpoint"), "POST", headers=headers, body=body, redirects=False
        )
    except DeniedError as error:
        problem = "does not accept this hub's client id and secret"
        raise RefusedError(provider.issuer, problem, "Ask the hub's operator to check them") from error


def _user_info(
    client: Client, provider: Provider, about: Mapping[str, Any], tokens: Mapping[str, Any], id_token: IdToken
) -> dict[str, Any]:
    """Return the claims of the userinfo endpoint (Core 1.0, 5.3): many providers have names and groups only there."""
    access, endpoint = tokens.get("access_token"), about.get("userinfo_endpoint")
    if endpoint is None or not isinstance(access, str) or len(access) > _MAX_TOKEN:
        return {}
    headers = {"Authorization": f"Bearer {access}", "Accept": "application/json"}
    claims = fetch_document(client, provider.issuer, endpoint, headers=headers, redirects=False)
    if claims.get("sub") != id_token.claims.get("sub"):
        raise RefusedError(provider.issuer, "has the data of another user than the one who logged in")
    return claims
