"""ID tokens of people and of CI jobs (OpenID Connect Core 1.0): who signed them, for whom they are, whether they are in force.

Nothing in a token is believed before its signature was verified with a key of its issuer, and only issuers that the operator
has named are asked for keys. RS256 and ES256 are what providers use; anything else, `none` first of all, is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from adapterhub.http.boundary import is_loopback
from adapterhub.http.client import Client
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError

_WHERE = "id token"
_MAX_TOKEN = 16 << 10  # characters
_MAX_DOCUMENT = 1 << 20  # bytes
_LEEWAY = 60  # seconds that clocks may differ
_LONGEST = 86400  # seconds that a token may be in force
_FRESH, _AGAIN = 3600.0, 60.0  # seconds that keys are kept, and between two looks for a key that is not among them
_MOST = 100  # keys of an issuer
_BITS = range(2048, 8193)


@dataclass(frozen=True, slots=True)
class IdToken:
    """A verified token: its issuer and its claims; `ident` is what no second one may have."""

    issuer: str
    claims: Mapping[str, Any]
    ident: str
    expires: float


@dataclass(frozen=True, slots=True)
class Published:
    """What an issuer publishes of itself, and its keys."""

    about: Mapping[str, Any]
    keys: Sequence[dict[str, Any]]


def issuer_of(token: str) -> str:
    """The issuer that a token names, which proves nothing: to find out whose keys to verify it with."""
    return str(_parsed(token)[1].get("iss", ""))


def _parsed(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Header, claims, what was signed, and the signature."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > _MAX_TOKEN or not token.isascii():
        raise FormatError(_WHERE, "not a signed JSON web token")
    header, claims, signature = (_decoded(part) for part in parts)
    signed = token.rpartition(".")[0].encode()
    return json_file.parse_object(header, _WHERE), json_file.parse_object(claims, _WHERE), signed, signature


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(_WHERE, "not a JSON web token: a part is not in base64url") from error


def is_value(found: object, value: str) -> bool:
    """Whether a claim has exactly a value; numbers and booleans as JSON writes them."""
    return found == value if isinstance(found, str) else found is not None and json.dumps(found) == value


class Issuers:
    """What issuers publish, where people log in and their keys, fetched when it is needed through the proxies of `proxy`."""

    def __init__(self, proxy: ProxyOf = no_proxy, clock: Callable[[], float] = time.monotonic) -> None:
        self._proxy, self._clock = proxy, clock
        self._known: dict[str, tuple[float, Published]] = {}
        self._turns: dict[str, threading.Lock] = {}  # no issuer waits for a slow one

    def about(self, issuer: str) -> Mapping[str, Any]:
        """What an issuer publishes of itself (OpenID Connect Discovery 1.0)."""
        return self._published(issuer, lambda _found: True).about

    def keys(self, issuer: str, ident: object) -> list[dict[str, Any]]:
        """The keys of an issuer with an id, fetched again if there is none of it."""
        return _named(self._published(issuer, lambda found: bool(_named(found.keys, ident))).keys, ident)

    def _published(self, issuer: str, enough: Callable[[Published], bool]) -> Published:
        """What was fetched in the last hour; fetched again, at most once a minute, if that is not enough."""
        with self._turns.setdefault(issuer, threading.Lock()):
            fetched, found = self._known.get(issuer, (float("-inf"), Published({}, ())))
            age = self._clock() - fetched
            if age > _FRESH or (not enough(found) and age > _AGAIN):
                found = _fetched(issuer, self._proxy)
                self._known[issuer] = self._clock(), found
        return found


def _named(keys: Sequence[dict[str, Any]], ident: object) -> list[dict[str, Any]]:
    return [key for key in keys if ident is None or key.get("kid") == ident]


def client_of(issuer: str, proxy: ProxyOf, secrets: Callable[[], Sequence[str]] = tuple) -> Client:
    """The client for the documents of an issuer: one try, ten seconds, and nothing nearer to this machine than it is."""
    return Client(issuer, pauses=(), timeout=10.0, proxy=proxy, secrets=secrets)


def document(client: Client, issuer: str, url: object, method: str = "GET", **more: Any) -> dict[str, Any]:
    """A JSON object that an issuer has at an address, which it names itself; `more` goes to `Client.ask`."""
    if not isinstance(url, str) or origin(url, issuer)[0] != origin(issuer, issuer)[0]:
        raise FormatError(issuer, "its configuration has no valid HTTPS address")
    answer = client.ask(method, url, issuer, good=(200,), limit=_MAX_DOCUMENT, **more)
    return json_file.parse_object(answer.body, issuer)


def _fetched(issuer: str, proxy: ProxyOf) -> Published:
    """What an issuer publishes now."""
    check_issuer(issuer)
    with closing(client_of(issuer, proxy)) as client:
        about = document(client, issuer, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if about.get("issuer") != issuer:
            raise FormatError(issuer, "its configuration names another issuer")
        keys = document(client, issuer, about.get("jwks_uri")).get("keys")
    return Published(about, [key for key in keys[:_MOST] if isinstance(key, dict)] if isinstance(keys, list) else [])


def check_issuer(issuer: str) -> None:
    """Raise UsageError or RefusedError for what is not the URL of an issuer: with TLS, unless it is this machine."""
    scheme, host, _ = origin(issuer, issuer, typed=True)
    if scheme != "https" and not is_loopback(host):
        raise RefusedError(issuer, "its keys are not served over HTTPS", "Use https")


def verify(token: str, issuer: str, audience: str, issuers: Issuers, *, now: float, nonce: str | None = None) -> IdToken:
    """Verify a token of an issuer for an audience.

    Args:
        token: As it was sent.
        issuer: Whom it must be of.
        audience: Whom it must be for, and nobody besides.
        issuers: Where the issuer's keys are from.
        now: Seconds since the epoch.
        nonce: What the login that asked for it has; None for a token that no login asked for.

    Raises:
        AdapterhubError: It is not one, is not in force, or its issuer's keys cannot be had.
    """
    header, claims, signed, signature = _parsed(token)
    if claims.get("iss") != issuer:
        raise RefusedError(_WHERE, "it was issued by another issuer")
    algorithm = header.get("alg")
    if algorithm not in _VERIFIERS or "crit" in header:
        raise RefusedError(_WHERE, f"signed by {str(algorithm)[:20]!r}, which is not accepted")
    if not any(_VERIFIERS[algorithm](key, signed, signature) for key in issuers.keys(issuer, header.get("kid"))):
        raise RefusedError(_WHERE, "it is not signed with any of the issuer's keys")
    said = claims.get("aud")
    if said not in (audience, [audience]):
        raise RefusedError(_WHERE, f"it is for {str(said)[:200]}, not for {audience}")
    if nonce is not None and claims.get("nonce") != nonce:
        raise RefusedError(_WHERE, "it belongs to another login")
    expires, begins = _time(claims, "exp"), _time(claims, "nbf", now)
    issued = _time(claims, "iat", begins)
    if not max(begins, issued) - _LEEWAY <= now < expires + _LEEWAY or expires - issued > _LONGEST:
        raise RefusedError(_WHERE, "it is not valid now, or it is valid for too long")
    ident = claims.get("jti")
    unique = ident if isinstance(ident, str) and ident else token
    return IdToken(issuer, claims, hashlib.sha256(f"{issuer}\n{unique}".encode()).hexdigest(), expires)


def _time(claims: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = claims.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**40:
        raise FormatError(_WHERE, f"its claim {name} is not a time")
    return float(value)


# ---- signatures


def _rs256(key: Mapping[str, Any], signed: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    if key.get("kty") != "RSA" or key.get("use", "sig") != "sig":
        return False
    try:
        n, e = (int.from_bytes(_decoded(str(key.get(name, "")))) for name in ("n", "e"))
        if n.bit_length() not in _BITS:
            return False
        rsa.RSAPublicNumbers(e, n).public_key().verify(signature, signed, padding.PKCS1v15(), hashes.SHA256())
    except (InvalidSignature, ValueError, AdapterhubError):
        return False
    return True


def _es256(key: Mapping[str, Any], signed: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    if key.get("kty") != "EC" or key.get("crv") != "P-256" or key.get("use", "sig") != "sig" or len(signature) != 64:
        return False
    try:
        x, y = (int.from_bytes(_decoded(str(key.get(name, "")))) for name in ("x", "y"))
        public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
        public.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, AdapterhubError):
        return False
    return True


_VERIFIERS: dict[object, Callable[[Mapping[str, Any], bytes, bytes], bool]] = {"RS256": _rs256, "ES256": _es256}
