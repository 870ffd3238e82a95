"""Sessions of the pages: who typed a token in once, or signed in elsewhere, has a cookie. A session ends with its token."""

from __future__ import annotations

import hashlib
import secrets
import time

from adapterhub.hub.database import HubDatabase

from . import tokens
from .accounts import ROLES
from .tokens import BROWSER, Identity

LIFETIME = 30 * 24 * 3600
"""Seconds."""
SIGNED_IN = 12 * 3600
"""Seconds of a session without a token that was typed in: who is let in no more elsewhere is out of here then."""


def start(database: HubDatabase, token: int, lifetime: float = LIFETIME) -> str:
    """Begin a session of a token; what the cookie has, and nobody else. Sessions that are over are forgotten."""
    cookie, now = secrets.token_urlsafe(32), time.time()
    database.execute("DELETE FROM sessions WHERE expires < ?", now)
    # A minute later: the session that refers to one was begun a moment after it.
    database.execute("DELETE FROM tokens WHERE kind = ? AND expires < ?", BROWSER, now - 60)
    database.execute("INSERT INTO sessions VALUES (?, ?, ?)", _hash(cookie), token, now + lifetime)
    return cookie


def sign_in(database: HubDatabase, account: str) -> str:
    """Begin a session of an account that signed in elsewhere, with a token that nobody reads."""
    with database.transaction():
        limits = tokens.Limits(kind=BROWSER, lifetime=SIGNED_IN)
        _, token = tokens.issue(database, account, ROLES[-1], **limits)
        return start(database, token, SIGNED_IN)


def find(database: HubDatabase, cookie: str) -> Identity | None:
    """Return whose session it is; None for one that is unknown or over, and when its token is revoked or has expired."""
    found = database.select("SELECT token FROM sessions WHERE id = ? AND expires > ?", _hash(cookie), time.time())
    return tokens.by_id(database, found[0][0]) if found else None


def end(database: HubDatabase, cookie: str) -> None:
    """End a session, and the token that was made for it alone."""
    sql = "UPDATE tokens SET revoked = ? WHERE kind = ? AND id IN (SELECT token FROM sessions WHERE id = ?)"
    database.execute(sql, time.time(), BROWSER, _hash(cookie))
    database.execute("DELETE FROM sessions WHERE id = ?", _hash(cookie))


def _hash(cookie: str) -> str:
    return hashlib.sha256(cookie.encode("utf-8", "replace")).hexdigest()
