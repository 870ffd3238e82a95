"""Browser sessions: a cookie for people who entered a token or signed in at a provider. A session ends with its token."""

from __future__ import annotations

import hashlib
import secrets
import time

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.sqlite_file import of_one_snapshot

from . import access_tokens
from .access_tokens import BROWSER, Identity
from .accounts import ROLES

COOKIE = "adapterhub_session"
LIFETIME = 30 * 24 * 3600
"""Seconds of a session for which a token was entered."""
_MAX_SESSIONS = 100  # of one token; a further one ends the oldest
SIGNED_IN = 12 * 3600
"""Seconds of a session from a provider: the time after which somebody no longer admitted there is locked out here."""


def start(database: HubDatabase, token: int, lifetime: float = LIFETIME) -> str:
    """Begin a session for a token; return the cookie, which is stored nowhere else. Expired sessions are deleted."""
    cookie, now = secrets.token_urlsafe(32), time.time()
    database.execute("DELETE FROM sessions WHERE expires < ?", now)
    # Wait a minute: the session that refers to a token starts a moment after it, and so ends later.
    database.execute("DELETE FROM tokens WHERE kind = ? AND expires < ?", BROWSER, now - 60)
    database.execute("INSERT INTO sessions (id, token, expires) VALUES (?, ?, ?)", _hash(cookie), token, now + lifetime)
    newest = "SELECT id FROM sessions WHERE token = ? ORDER BY expires DESC LIMIT ?"
    database.execute(f"DELETE FROM sessions WHERE token = ? AND id NOT IN ({newest})", token, token, _MAX_SESSIONS)  # noqa: S608 - ours
    return cookie


def sign_in(database: HubDatabase, account: str) -> str:
    """Begin a session for an account that signed in at a provider, with a token that is never shown."""
    with database.transaction():
        limits = access_tokens.Limits(kind=BROWSER, lifetime=SIGNED_IN)
        _, token = access_tokens.issue(database, account, ROLES[-1], **limits)
        return start(database, token, SIGNED_IN)


@of_one_snapshot
def session_identity(database: HubDatabase, cookie: str) -> Identity | None:
    """Return the identity of a session; None if it is unknown or over, or its token is revoked or expired."""
    rows = database.select("SELECT token FROM sessions WHERE id = ? AND expires > ?", _hash(cookie), time.time())
    return access_tokens.identify_by_id(database, rows[0][0]) if rows else None


def end(database: HubDatabase, cookie: str) -> None:
    """End a session, and the token made only for it."""
    sql = "UPDATE tokens SET revoked = ? WHERE kind = ? AND id IN (SELECT token FROM sessions WHERE id = ?)"
    database.execute(sql, time.time(), BROWSER, _hash(cookie))
    database.execute("DELETE FROM sessions WHERE id = ?", _hash(cookie))


def _hash(cookie: str) -> str:
    return hashlib.sha256(cookie.encode("utf-8", "replace")).hexdigest()
