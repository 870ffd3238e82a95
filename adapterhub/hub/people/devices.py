"""Logins of devices (RFC 8628): a program shows a code, a person approves it elsewhere, and the program gets a token.

The token expires, and comes with another one to renew it, which is good for one use. A second use of it means that somebody
else has it, so that the login ends for both (RFC 9700, 4.14.2).
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass

from adapterhub.hub.database import HubDatabase
from adapterhub_converters.errors import NotFoundError, RefusedError

from . import accounts, tokens
from .accounts import ROLES
from .tokens import DEVICE, SERVICE, Identity

EXPIRES, INTERVAL = 900, 5
"""Seconds until a code is forgotten, and between two questions about it."""
TOKEN_LIFETIME = 30 * 86400  # seconds; clients renew a token a day before its end
_RENEWABLE = 90 * 86400  # seconds
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # without vowels, so that no code is a word, and without what looks alike
_LENGTH = 8
_MOST = 1000  # codes that wait
_YES, _NO = "approved", "denied"


class DeviceError(Exception):
    """A program gets no token, or not yet; `str()` is the error's code in OAuth."""


@dataclass(frozen=True, slots=True)
class Login:
    """A login that waits: the code for people, from which address it was begun, and when it ends."""

    code: str
    address: str
    expires: float


@dataclass(frozen=True, slots=True)
class Granted:
    """A token of an account, the one that renews it, and the seconds that the first is good for."""

    account: str
    token: str
    refresh: str
    expires: int


def begin(database: HubDatabase, address: str) -> tuple[str, str]:
    """Begin a login; return the program's code and the person's, like BCDF-GHJK. RefusedError if too many wait."""
    device, now = secrets.token_urlsafe(32), time.time()
    with database.transaction():
        database.execute("DELETE FROM devices WHERE expires < ?", now)
        if database.select("SELECT COUNT(*) FROM devices")[0][0] >= _MOST:
            raise RefusedError("login", "too many logins wait for approval", "Try again in some minutes")
        code = "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
        sql = "INSERT INTO devices (hash, code, address, expires, polled) VALUES (?, ?, ?, ?, 0)"
        database.execute(sql, tokens.hashed(device), code, address, now + EXPIRES)
    return device, f"{code[:4]}-{code[4:]}"


def _plain(code: str) -> str:
    return "".join(letter for letter in code.upper() if letter in _LETTERS)


def waiting(database: HubDatabase, code: str) -> Login:
    """The login that a person's code stands for; NotFoundError without one that waits."""
    sql = "SELECT code, address, expires FROM devices WHERE code = ? AND expires > ? AND answer IS NULL"
    for found, address, expires in database.select(sql, _plain(code[:40]), time.time()):
        return Login(f"{found[:4]}-{found[4:]}", address, expires)
    raise NotFoundError(code[:40], "no login waits for this code", "Check the code, or begin the login again")


def approve(database: HubDatabase, code: str, who: Identity) -> Login:
    """Let a login have a token that may do what `who` may; RefusedError if the token of a service would outlive its end."""
    if who.roles is None and who.expires is not None:
        what = "this token of a service expires, and the login would go on without it"
        raise RefusedError(who.account, what, "Approve it with a token of your account")
    kind = SERVICE if who.roles is None else DEVICE
    values = (_YES, who.account, who.role, json.dumps(list(who.namespaces)), kind)
    return _answer(database, code, "answer = ?, account = ?, role = ?, namespaces = ?, kind = ?", *values)


def approve_as(database: HubDatabase, code: str, account: str) -> Login:
    """Let a login have a token that may do what an account may; NotFoundError without that account."""
    accounts.check_account(database, account)
    return approve(database, code, Identity(account, ROLES[-1], roles={}))


def deny(database: HubDatabase, code: str) -> Login:
    """Refuse a login."""
    return _answer(database, code, "answer = ?", _NO)


def _answer(database: HubDatabase, code: str, changes: str, *values: object) -> Login:
    with database.transaction():
        found = waiting(database, code)
        database.execute(f"UPDATE devices SET {changes} WHERE code = ?", *values, _plain(found.code))  # noqa: S608 - ours
    return found


def collect(database: HubDatabase, device: str) -> Granted:
    """The token of a login that was approved, once; DeviceError with the reason otherwise."""
    key, now = tokens.hashed(device), time.time()
    with database.transaction():
        sql = "SELECT expires, polled, answer, account, role, namespaces, kind FROM devices WHERE hash = ?"
        rows = database.select(sql, key)
        if not rows or rows[0][0] < now:
            raise DeviceError("expired_token")
        _, polled, answer, account, role, namespaces, kind = rows[0]
        if answer is not None:
            database.execute("DELETE FROM devices WHERE hash = ?", key)
            if answer == _YES:
                accounts.check_account(database, account)  # it may have been removed since
                names = tokens.names(namespaces)
                found = Identity(account, role, names)
                return _grant(database, found, kind, secrets.token_hex(8))
        else:
            database.execute("UPDATE devices SET polled = ? WHERE hash = ?", now, key)
    if answer is not None:
        raise DeviceError("access_denied")
    raise DeviceError("slow_down" if now - polled < INTERVAL - 1 else "authorization_pending")


def renew(database: HubDatabase, refresh: str) -> Granted:
    """Another token for a login; DeviceError for one that has ended."""
    now = time.time()
    with database.transaction():
        sql = (
            "SELECT r.family, r.used, r.expires, t.id, t.account, t.role, t.namespaces, t.kind, t.revoked"
            " FROM refreshes r JOIN tokens t ON t.id = r.token WHERE r.hash = ?"
        )
        rows = database.select(sql, tokens.hashed(refresh))
        good = False
        if rows:
            family, used, expires, old, account, role, namespaces, kind, revoked = rows[0]
            good = used is None and revoked is None and expires > now
            if used is not None:
                database.execute(_END, now, family)
            if good:
                database.execute("UPDATE refreshes SET used = ? WHERE hash = ?", now, tokens.hashed(refresh))
                database.execute("UPDATE tokens SET revoked = ? WHERE id = ?", now, old)
                names = tokens.names(namespaces)
                return _grant(database, Identity(account, role, names), kind, family)
    raise DeviceError("invalid_grant")


_END = "UPDATE tokens SET revoked = ? WHERE revoked IS NULL AND id IN (SELECT token FROM refreshes WHERE family = ?)"


def _grant(database: HubDatabase, who: Identity, kind: str, family: str) -> Granted:
    limits = tokens.Limits(namespaces=who.namespaces, kind=kind, lifetime=TOKEN_LIFETIME)
    token, ident = tokens.issue(database, who.account, who.role, **limits)
    refresh = secrets.token_urlsafe(32)
    database.execute("DELETE FROM refreshes WHERE expires < ?", time.time())
    sql = "INSERT INTO refreshes (hash, family, token, expires) VALUES (?, ?, ?, ?)"
    database.execute(sql, tokens.hashed(refresh), family, ident, time.time() + _RENEWABLE)
    return Granted(who.account, token, refresh, TOKEN_LIFETIME)
