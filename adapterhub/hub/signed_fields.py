"""Signatures over fields that a client sends back, so that the hub knows that it has written them, and what for."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable


def signature(secret: bytes, purpose: str, *fields: str | int) -> str:
    """Return the signature over fields for a purpose: an HMAC-SHA256 in hexadecimal."""
    text = "\n".join((purpose, *map(str, fields)))
    return hmac.new(secret, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def signed_purpose(secret: bytes, sent: str, purposes: Iterable[str], *fields: str | int) -> str:
    """Return for which of some purposes a signature was made over fields; empty for none."""
    # Constant time: how long the comparison takes must not tell how much of a guess is right.
    candidates = (purpose for purpose in purposes if is_equal(sent, signature(secret, purpose, *fields)))
    return next(candidates, "")


def is_equal(sent: str, expected: str) -> bool:
    """Return whether a client has sent a secret text, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(sent.encode("utf-8", "replace"), expected.encode())
