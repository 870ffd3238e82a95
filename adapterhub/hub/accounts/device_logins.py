"""Device logins (RFC 8628): a program shows a code, a person approves it in a browser, and the program gets a token.

The token expires, and comes with a refresh token that is good for one use. A second use means that somebody else has it, so the
login ends for both (RFC 9700, 4.14.2).
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter

from adapterhub.http_server.request_bodies import shared_network
from adapterhub.hub.hub_database import HubDatabase
from adapterhub_converters.errors import NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import access_tokens, accounts
from .access_tokens import DEVICE, SERVICE, Identity
from .accounts import ROLES

CODE_LIFETIME, POLL_INTERVAL = 900, 5
"""Seconds until a code expires, and between two polls for it."""
TOKEN_LIFETIME = 30 * 86400  # seconds; clients renew a token a day before its end
_REFRESH_LIFETIME = 90 * 86400  # seconds
_MAX_USED = 100  # used refresh tokens of a login that are remembered, those used last
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # no vowels, so that no code is a word, and no letters that look alike
_LENGTH = 8
_MAX_PENDING = 1000  # logins waiting for approval
_YES, _NO = "approved", "denied"


class DeviceError(Exception):
    """A program gets no token, or not yet; `str()` is the OAuth error code."""


@dataclass(frozen=True, slots=True)
class Login:
    """A pending login: the person's code, the address it was begun from, and when it expires."""

    code: str
    address: str
    expires: float


@dataclass(frozen=True, slots=True)
class TokenGrant:
    """A token for an account, its refresh token, and the seconds until the token expires."""

    account: str
    token: str
    refresh: str
    expires: int


def begin(database: HubDatabase, address: str) -> tuple[str, str]:
    """Begin a login; return the program's code and the person's, such as BCDF-GHJK.

    Raises:
        RefusedError: Too many logins were answered, and their programs have not asked for it.
    """
    device, now = secrets.token_urlsafe(32), time.time()
    with database.transaction():
        database.execute("DELETE FROM devices WHERE expires < ?", now)
        # Anybody may begin logins, so their number is limited.
        if database.select("SELECT COUNT(*) FROM devices")[0][0] >= _MAX_PENDING and not _make_room(database):
            raise RefusedError("login", "too many logins wait for their programs", "Try again in some minutes")
        code = "".join(secrets.choice(_LETTERS) for _ in range(_LENGTH))
        sql = "INSERT INTO devices (hash, code, address, expires, polled) VALUES (?, ?, ?, ?, 0)"
        database.execute(sql, access_tokens.hash_of(device), code, address, now + CODE_LIFETIME)
    return device, f"{code[:4]}-{code[4:]}"


def _make_room(database: HubDatabase) -> bool:
    """End the oldest pending login of the network that has begun most of them; return False if none is pending."""
    rows = database.select("SELECT hash, address FROM devices WHERE answer IS NULL ORDER BY expires")
    networks = [shared_network(address) for _, address in rows]
    if not rows:
        return False
    [(largest, _)] = Counter(networks).most_common(1)
    database.execute("DELETE FROM devices WHERE hash = ?", rows[networks.index(largest)][0])
    return True


def _normalized(code: str) -> str:
    return "".join(letter for letter in code.upper() if letter in _LETTERS)


def pending_login(database: HubDatabase, code: str) -> Login:
    """Return the pending login with a person's code.

    Raises:
        NotFoundError: There is none.
    """
    sql = "SELECT code, address, expires FROM devices WHERE code = ? AND expires > ? AND answer IS NULL"
    for stored_code, address, expires in database.select(sql, _normalized(code[:40]), time.time()):
        return Login(f"{stored_code[:4]}-{stored_code[4:]}", address, expires)
    raise NotFoundError(code[:40], "no login waits for this code", "Check the code, or begin the login again")


def approve(database: HubDatabase, code: str, identity: Identity) -> Login:
    """Grant a login a token with the rights of `identity`, which ends with the token of `identity`.

    Raises:
        RefusedError: `identity` is a service token that expires, and the login could outlive it.
    """
    if identity.roles is None and identity.expires is not None:
        problem = "this token of a service expires, and the login would go on without it"
        raise RefusedError(identity.account, problem, "Approve it with a token of your account")
    kind = SERVICE if identity.roles is None else DEVICE
    values = (_YES, identity.account, identity.role, json.dumps(list(identity.namespaces)), kind)
    columns = "answer = ?, account = ?, role = ?, namespaces = ?, kind = ?, parent = ?"
    return _record_answer(database, code, columns, *values, access_tokens.parent_of(database, identity))


def approve_as(database: HubDatabase, code: str, account: str) -> Login:
    """Grant a login a token with the rights of an account.

    Raises:
        NotFoundError: There is no such account.
    """
    accounts.check_account(database, account)
    return approve(database, code, Identity(account, ROLES[-1], roles={}))


def deny(database: HubDatabase, code: str) -> Login:
    """Refuse a login."""
    return _record_answer(database, code, "answer = ?", _NO)


def _record_answer(database: HubDatabase, code: str, changes: str, *values: object) -> Login:
    with database.transaction():
        login = pending_login(database, code)
        database.execute(f"UPDATE devices SET {changes} WHERE code = ?", *values, _normalized(login.code))  # noqa: S608 - ours
    return login


def collect(database: HubDatabase, device: str) -> TokenGrant:
    """Return the token of an approved login, once.

    Raises:
        DeviceError: The login is pending, refused or expired.
    """
    key, now = access_tokens.hash_of(device), time.time()
    if not database.select("SELECT 1 FROM devices WHERE hash = ?", key):  # before the lock, for which others may wait
        raise DeviceError("expired_token")
    with database.transaction():
        sql = "SELECT expires, polled, answer, account, role, namespaces, kind, parent FROM devices WHERE hash = ?"
        rows = database.select(sql, key)
        if not rows or rows[0][0] < now:
            raise DeviceError("expired_token")
        _, polled, answer, account, role, namespaces, kind, parent = rows[0]
        if answer is not None:
            database.execute("DELETE FROM devices WHERE hash = ?", key)
            if answer == _YES and access_tokens.is_valid(database, parent):
                accounts.check_account(database, account)  # it may have been removed since the approval
                names = access_tokens.parse_scope(namespaces)
                identity = Identity(account, role, names)
                return _grant(database, identity, kind, secrets.token_hex(8), parent=parent)
        else:
            database.execute("UPDATE devices SET polled = ? WHERE hash = ?", now, key)
    if answer is not None:
        raise DeviceError("access_denied")
    raise DeviceError("slow_down" if now - polled < POLL_INTERVAL - 1 else "authorization_pending")


def renew(database: HubDatabase, refresh: str) -> TokenGrant:
    """Return a new token for a login.

    Raises:
        DeviceError: The login has ended.
    """
    now = time.time()
    if not database.select("SELECT 1 FROM refreshes WHERE hash = ?", access_tokens.hash_of(refresh)):
        raise DeviceError("invalid_grant")
    with database.transaction():
        sql = (
            "SELECT r.family, r.used, r.expires, t.id, t.account, t.role, t.namespaces, t.kind, t.revoked, t.parent"
            " FROM refreshes r JOIN tokens t ON t.id = r.token WHERE r.hash = ?"
        )
        rows = database.select(sql, access_tokens.hash_of(refresh))
        is_valid = False
        if rows:
            family, used, expires, old_token, account, role, namespaces, kind, revoked, parent = rows[0]
            is_valid = used is None and revoked is None and expires > now and access_tokens.is_valid(database, parent)
            if used is not None:
                # The refresh token was used before, so it has leaked: end every token of this login.
                database.execute(_END_FAMILY, now, family)
            if is_valid:
                database.execute("UPDATE refreshes SET used = ? WHERE hash = ?", now, access_tokens.hash_of(refresh))
                database.execute(_FORGET_USED, family, family, _MAX_USED)
                database.execute("UPDATE tokens SET revoked = ? WHERE id = ?", now, old_token)
                names = access_tokens.parse_scope(namespaces)
                return _grant(database, Identity(account, role, names), kind, family, parent=parent, old_token=old_token)
    raise DeviceError("invalid_grant")


_FORGET_USED = """
    DELETE FROM refreshes WHERE family = ? AND used IS NOT NULL
    AND hash NOT IN (SELECT hash FROM refreshes WHERE family = ? AND used IS NOT NULL ORDER BY used DESC LIMIT ?)
"""
_END_FAMILY = "UPDATE tokens SET revoked = ? WHERE revoked IS NULL AND id IN (SELECT token FROM refreshes WHERE family = ?)"


def _grant(
    database: HubDatabase, identity: Identity, kind: str, family: str, *, parent: int | None, old_token: int = 0
) -> TokenGrant:
    limits = access_tokens.Limits(namespaces=identity.namespaces, kind=kind, lifetime=TOKEN_LIFETIME, parent=parent)
    token, ident = access_tokens.issue(database, identity.account, identity.role, **limits)
    # What the renewed token has approved goes on with the new one.
    for table in ("tokens", "devices"):
        database.execute(f"UPDATE {table} SET parent = ? WHERE parent = ?", ident, old_token)  # noqa: S608 - ours
    refresh = secrets.token_urlsafe(32)
    database.execute("DELETE FROM refreshes WHERE expires < ?", time.time())
    sql = "INSERT INTO refreshes (hash, family, token, expires) VALUES (?, ?, ?, ?)"
    database.execute(sql, access_tokens.hash_of(refresh), family, ident, time.time() + _REFRESH_LIFETIME)
    return TokenGrant(identity.account, token, refresh, TOKEN_LIFETIME)
