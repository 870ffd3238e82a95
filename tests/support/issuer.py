"""An OpenID Connect issuer that tests hold in their hands: it signs and answers what they want, honest or not."""

from __future__ import annotations

import base64
import functools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils


def coded(data: bytes) -> str:
    """Bytes as JSON web tokens have them."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int, size: int = 0) -> str:
    return coded(value.to_bytes(size or (value.bit_length() + 7) // 8))


@functools.cache
def _rsa(number: int) -> rsa.RSAPrivateKey:
    """One of the RSA keys that issuers share: to find the primes of one takes a tenth of a second, or several."""
    return rsa.generate_private_key(65537, 2048)


class Issuer(ThreadingHTTPServer):
    """An issuer.

    Attributes:
        about: What it publishes of itself.
        answers: Path to what it answers there: a JSON value, or bytes as they are; a tuple has the status and headers first.
        requests: Path, headers and form of what it was sent.
    """

    daemon_threads = True

    def __init__(self, number: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.rsa, self.ec = _rsa(number), ec.generate_private_key(ec.SECP256R1())
        rsa_numbers, ec_numbers = self.rsa.public_key().public_numbers(), self.ec.public_key().public_numbers()
        keys = [
            {"kty": "RSA", "kid": "r", "use": "sig", "n": _number(rsa_numbers.n), "e": _number(rsa_numbers.e)},
            {"kty": "EC", "kid": "e", "crv": "P-256", "x": _number(ec_numbers.x, 32), "y": _number(ec_numbers.y, 32)},
        ]
        places = {"jwks_uri": "/keys", "authorization_endpoint": "/login", "token_endpoint": "/token"}
        self.about: dict[str, Any] = {"issuer": self.url, **{name: self.url + path for name, path in places.items()}}
        self.answers: dict[str, Any] = {"/.well-known/openid-configuration": self.about, "/keys": {"keys": keys}}
        self.requests: list[tuple[str, dict[str, str], dict[str, str]]] = []

    def token(self, audience: Any, *, alg: str = "RS256", kid: str = "", **claims: Any) -> str:
        """A signed token with some claims."""
        now = int(time.time())
        all_claims = {"iss": self.url, "aud": audience, "iat": now, "exp": now + 300, "jti": str(time.time_ns()), **claims}
        header = {"alg": alg, "kid": kid or {"RS256": "r", "ES256": "e"}.get(alg, "r")}
        signed = ".".join(coded(json.dumps(part).encode()) for part in (header, all_claims))
        return f"{signed}.{coded(self._signature(signed.encode(), alg))}"

    def _signature(self, signed: bytes, alg: str) -> bytes:
        if alg == "RS256":
            return self.rsa.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        if alg == "ES256":
            r, s = utils.decode_dss_signature(self.ec.sign(signed, ec.ECDSA(hashes.SHA256())))
            return r.to_bytes(32) + s.to_bytes(32)
        return b""


class _Handler(BaseHTTPRequestHandler):
    server: Issuer

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.requests.append((path, dict(self.headers), dict(parse_qsl(body.decode()))))
        answer = self.server.answers.get(path, (404, {}, b""))
        status, headers, answer = answer if isinstance(answer, tuple) else (200, {}, answer)
        raw = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def issuing(number: int = 0) -> Iterator[Issuer]:
    """An issuer that answers; those of different numbers have different RSA keys."""
    with Issuer(number) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
