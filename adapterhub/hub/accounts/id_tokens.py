"""ID tokens of people and of CI jobs (OpenID Connect Core 1.0): verify signature, audience and validity.

Nothing in a token is trusted before its signature is verified with a key of its issuer, and keys are requested only from
issuers the operator has named. Providers use RS256 and ES256; any other algorithm, `none` first of all, is refused.
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
from typing import Any

from adapterhub.http.boundary import is_loopback
from adapterhub.http.client import Client
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

_LOCATION = "id token"
_MAX_TOKEN = 16 << 10  # characters
_MAX_CLAIMS, _MAX_CLAIM = 20, 500  # claims of a rule, and characters of one
_MAX_DOCUMENT = 1 << 20  # bytes
_LEEWAY = 60  # seconds that clocks may differ
_MAX_VALIDITY = 86400  # the longest validity of a token that is accepted, in seconds
_KEYS_TTL, _REFETCH_INTERVAL = 3600.0, 60.0  # seconds for which keys are reused, and between fetches for an unknown key id
_MAX_KEYS = 100  # keys kept of an issuer
_RSA_BITS = range(2048, 8193)


@dataclass(frozen=True, slots=True)
class IdToken:
    """A verified token: its issuer and claims; `ident` is unique to it, so that it can be used only once."""

    issuer: str
    claims: Mapping[str, Any]
    ident: str
    expires: float


@dataclass(frozen=True, slots=True)
class IssuerConfiguration:
    """The published configuration of an issuer, and its keys."""

    about: Mapping[str, Any]
    keys: Sequence[dict[str, Any]]


def issuer_of(token: str) -> str:
    """Return the issuer a token names, to find the keys to verify it with. The name alone proves nothing."""
    return str(_parse(token)[1].get("iss", ""))


def _parse(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    """Return header, claims, the signed bytes, and the signature."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > _MAX_TOKEN or not token.isascii():
        raise FormatError(_LOCATION, "not a signed JSON web token")
    header, claims, signature = (_decode(part) for part in parts)
    signed = token.rpartition(".")[0].encode()
    return json_file.parse_object(header, _LOCATION), json_file.parse_object(claims, _LOCATION), signed, signature


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(_LOCATION, "not a JSON web token: a part is not in base64url") from error


def claim_equals(claim: object, value: str) -> bool:
    """Return whether a claim has exactly a value; numbers and booleans are compared in their JSON form."""
    return claim == value if isinstance(claim, str) else claim is not None and json.dumps(claim) == value


class Issuers:
    """The configurations and keys of issuers, fetched on demand, through the proxies of `proxy`."""

    def __init__(self, proxy: ProxyOf = no_proxy, clock: Callable[[], float] = time.monotonic) -> None:
        self._proxy, self._clock = proxy, clock
        self._configurations: dict[str, tuple[float, IssuerConfiguration]] = {}
        self._locks: dict[str, threading.Lock] = {}  # one per issuer, so that a slow issuer delays only itself

    def about(self, issuer: str) -> Mapping[str, Any]:
        """Return the configuration of an issuer (OpenID Connect Discovery 1.0)."""
        return self._configuration_of(issuer, lambda _configuration: True).about

    def keys(self, issuer: str, ident: object) -> list[dict[str, Any]]:
        """Return the keys of an issuer with an id; fetch them again if there is none."""
        return _keys_with_id(
            self._configuration_of(issuer, lambda configuration: bool(_keys_with_id(configuration.keys, ident))).keys, ident
        )

    def _configuration_of(self, issuer: str, is_enough: Callable[[IssuerConfiguration], bool]) -> IssuerConfiguration:
        """Return a configuration of the last hour; fetch it again, at most once a minute, unless `is_enough` accepts it."""
        with self._locks.setdefault(issuer, threading.Lock()):
            fetched_at, configuration = self._configurations.get(issuer, (float("-inf"), IssuerConfiguration({}, ())))
            age = self._clock() - fetched_at
            if age > _KEYS_TTL or (not is_enough(configuration) and age > _REFETCH_INTERVAL):
                configuration = _fetch_configuration(issuer, self._proxy)
                self._configurations[issuer] = self._clock(), configuration
        return configuration


def _keys_with_id(keys: Sequence[dict[str, Any]], ident: object) -> list[dict[str, Any]]:
    return [key for key in keys if ident is None or key.get("kid") == ident]


def client_of(issuer: str, proxy: ProxyOf, secrets: Callable[[], Sequence[str]] = tuple) -> Client:
    """Return a client for an issuer's documents: one attempt, ten seconds, and never closer to this machine than the issuer."""
    return Client(issuer, pauses=(), timeout=10.0, proxy=proxy, secrets=secrets)


def fetch_document(client: Client, issuer: str, url: object, method: str = "GET", **options: Any) -> dict[str, Any]:
    """Return a JSON object at an address named by the issuer; `options` are passed to `Client.request`."""
    if not isinstance(url, str) or origin(url, issuer)[0] != origin(issuer, issuer)[0]:
        raise FormatError(issuer, "its configuration has no valid HTTPS address")
    response = client.request(method, url, issuer, good=(200,), limit=_MAX_DOCUMENT, **options)
    return json_file.parse_object(response.body, issuer)


def _fetch_configuration(issuer: str, proxy: ProxyOf) -> IssuerConfiguration:
    """Fetch the configuration and the keys of an issuer."""
    check_issuer(issuer)
    with closing(client_of(issuer, proxy)) as client:
        about = fetch_document(client, issuer, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
        if about.get("issuer") != issuer:
            raise FormatError(issuer, "its configuration names another issuer")
        keys = fetch_document(client, issuer, about.get("jwks_uri")).get("keys")
    return IssuerConfiguration(
        about, [key for key in keys[:_MAX_KEYS] if isinstance(key, dict)] if isinstance(keys, list) else []
    )


def check_issuer(issuer: str) -> None:
    """Raise UsageError or RefusedError unless a text is the URL of an issuer, with TLS unless on this machine."""
    scheme, host, _ = origin(issuer, issuer, is_user_input=True)
    if scheme != "https" and not is_loopback(host):
        raise RefusedError(issuer, "its keys are not served over HTTPS", "Use https")


def check_claims(claims: Mapping[str, str]) -> None:
    """Raise UsageError if a rule would compare more or longer claims than any provider has."""
    if len(claims) > _MAX_CLAIMS or any(len(key) + len(value) > _MAX_CLAIM for key, value in claims.items()):
        raise UsageError("claims", f"are more than {_MAX_CLAIMS}, or longer than {_MAX_CLAIM} characters")


def claims_text(claims: Mapping[str, str]) -> str:
    """Return the claims of a rule in a line, for the audit log."""
    return ",".join(map("=".join, claims.items()))


def verify(token: str, issuer: str, audience: str, issuers: Issuers, *, now: float, nonce: str | None = None) -> IdToken:
    """Verify a token of an issuer for an audience.

    Args:
        token: The token as sent.
        issuer: The issuer it must be from.
        audience: The only audience it may have.
        issuers: Provides the issuer's keys.
        now: Seconds since the epoch.
        nonce: The nonce of the login that requested it; None for a token without a login.

    Raises:
        AdapterhubError: The token is invalid or expired, or the issuer's keys cannot be fetched.
    """
    header, claims, signed, signature = _parse(token)
    if claims.get("iss") != issuer:
        raise RefusedError(_LOCATION, "it was issued by another issuer")
    algorithm = header.get("alg")
    if algorithm not in _VERIFIERS or "crit" in header:
        raise RefusedError(_LOCATION, f"signed by {str(algorithm)[:20]!r}, which is not accepted")
    if not any(_VERIFIERS[algorithm](key, signed, signature) for key in issuers.keys(issuer, header.get("kid"))):
        raise RefusedError(_LOCATION, "it is not signed with any of the issuer's keys")
    token_audience = claims.get("aud")
    if token_audience not in (audience, [audience]):
        raise RefusedError(_LOCATION, f"it is for {str(token_audience)[:200]}, not for {audience}")
    if nonce is not None and claims.get("nonce") != nonce:
        raise RefusedError(_LOCATION, "it belongs to another login")
    expires, begins = _time(claims, "exp"), _time(claims, "nbf", now)
    issued = _time(claims, "iat", begins)
    if not max(begins, issued) - _LEEWAY <= now < expires + _LEEWAY or expires - issued > _MAX_VALIDITY:
        raise RefusedError(_LOCATION, "it is not valid now, or it is valid for too long")
    # A token without an id is identified by its bytes.
    ident = claims.get("jti")
    unique = ident if isinstance(ident, str) and ident else token
    return IdToken(issuer, claims, hashlib.sha256(f"{issuer}\n{unique}".encode()).hexdigest(), expires)


def _time(claims: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = claims.get(name, default)
    if not json_file.is_number(value) or not 0 <= value < 2**40:
        raise FormatError(_LOCATION, f"its claim {name} is not a time")
    return float(value)


# ---- signatures


def _rs256(key: Mapping[str, Any], signed: bytes, signature: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding, rsa

    if key.get("kty") != "RSA" or key.get("use", "sig") != "sig":
        return False
    try:
        n, e = (int.from_bytes(_decode(str(key.get(name, "")))) for name in ("n", "e"))
        if n.bit_length() not in _RSA_BITS:
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
        x, y = (int.from_bytes(_decode(str(key.get(name, "")))) for name in ("x", "y"))
        public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
        r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
        public.verify(utils.encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, AdapterhubError):
        return False
    return True


_VERIFIERS: dict[object, Callable[[Mapping[str, Any], bytes, bytes], bool]] = {"RS256": _rs256, "ES256": _es256}
