"""Tokens: made once, shown once, stored as a hash, and found by their first characters where one has leaked."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

from adapterhub.hub.database import HubDatabase
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError

from . import accounts
from .accounts import EVERYWHERE, ROLES

SERVICE, EXCHANGE, PERSONAL, DEVICE, BROWSER = "service", "exchange", "personal", "device", "browser"
"""Kinds of tokens. Those of services and of trusted publishers have a role of their own, the others at most their account's.
One of a browser stands for a session, and nobody has read it."""
_OWN = (SERVICE, EXCHANGE)
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
# Clients look for this form: llama.cpp sends no other token than hf_ and at least 34 letters and digits.
_START, _LENGTH, _SHOWN = "hf_", 40, 8


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks: an account, by one of its tokens.

    Attributes:
        role: The most that the token may do.
        namespaces: Those, or repositories, that the token is limited to; empty for all.
        expires: Seconds since the epoch; None for never.
        prefix: The first characters of the token.
        roles: What its account may do, by namespace; None for a token with a role of its own.
    """

    account: str
    role: str
    namespaces: tuple[str, ...] = ()
    token: int = 0
    expires: float | None = None
    prefix: str = ""
    roles: Mapping[str, str] | None = None

    def role_in(self, name: str) -> str:
        """What the token may do in a namespace, or in a repository; empty for nothing that others may not."""
        namespace = name.partition("/")[0]
        if self.namespaces and self.namespaces.count(name) + self.namespaces.count(namespace) == 0:
            return ""
        if self.roles is None:
            return self.role
        held = [self.roles[name] for name in (namespace, EVERYWHERE) if name in self.roles]
        return accounts.least(self.role, max(held, key=ROLES.index)) if held else ""

    def may(self, role: str, name: str) -> bool:
        """Return True if the token has a role in a namespace, or in a repository."""
        held = self.role_in(name)
        return bool(held) and ROLES.index(held) >= ROLES.index(role)


@dataclass(frozen=True, slots=True)
class Token:
    """A token as lists show it; times in seconds since the epoch."""

    id: int
    account: str
    prefix: str
    role: str
    namespaces: tuple[str, ...]
    kind: str
    created: float
    expires: float | None
    used: float | None


class Limits(TypedDict, total=False):
    """What limits a token besides its role.

    Attributes:
        namespaces: All that it is good for; empty for no limit.
        kind: What it is for, as lists show it; only that of a service has its role whatever its account may do.
        lifetime: Seconds until it expires; None for never.
    """

    namespaces: Sequence[str]
    kind: str
    lifetime: float | None


def create(database: HubDatabase, account: str, role: str, **limits: Unpack[Limits]) -> str:
    """Make a token for an account, a name of one word, which is created if it is missing; the only time that it can be read."""
    accounts.check_role(role)
    for name in (account, *limits.get("namespaces", ())):
        accounts.check_namespace(name)
    with database.transaction():
        accounts.ensure(database, account)
        return issue(database, account, role, **limits)[0]


def issue(database: HubDatabase, account: str, role: str, **limits: Unpack[Limits]) -> tuple[str, int]:
    """Make a token for an account that is there, and return it with its id."""
    token = _START + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
    now, lifetime = time.time(), limits.get("lifetime")
    scope, kind = json.dumps(list(limits.get("namespaces", ()))), limits.get("kind", SERVICE)
    values = (account, hashed(token), prefix_of(token), role, scope, kind, now, now + lifetime if lifetime else None)
    sql = (
        "INSERT INTO tokens (account, hash, prefix, role, namespaces, kind, created, expires) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        " RETURNING id"
    )
    return token, int(database.select(sql, *values)[0][0])


def identify(database: HubDatabase, token: str) -> Identity | None:
    """Return who a token belongs to; None for one that is unknown, revoked or expired."""
    return _identity(database, "hash", hashed(token))


def by_id(database: HubDatabase, ident: int) -> Identity | None:
    """Return who the token with an id belongs to; None as for `identify`."""
    return _identity(database, "id", ident)


def _identity(database: HubDatabase, column: str, value: object) -> Identity | None:
    sql = f"SELECT id, account, role, namespaces, expires, prefix, kind FROM tokens WHERE {column} = ? AND revoked IS NULL"  # noqa: S608
    for ident, account, role, namespaces, expires, prefix, kind in database.select(sql, value):
        if expires is None or expires > time.time():
            roles = None if kind in _OWN else accounts.roles(database, account)
            return Identity(account, role, names(namespaces), ident, expires, prefix, roles)
    return None


def listed(database: HubDatabase) -> list[Token]:
    """Return the tokens that are in force, by account."""
    sql = (
        "SELECT id, account, prefix, role, namespaces, kind, created, expires, used FROM tokens"
        " WHERE revoked IS NULL ORDER BY account, id"
    )
    rows = database.select(sql)
    return [Token(row[0], row[1], row[2], row[3], names(row[4]), row[5], row[6], row[7], row[8]) for row in rows]


def revoke(database: HubDatabase, ident: int) -> None:
    """Revoke a token, at once and for good; NotFoundError without it."""
    if not database.execute("UPDATE tokens SET revoked = ? WHERE id = ? AND revoked IS NULL", time.time(), ident):
        raise NotFoundError(str(ident), "no such token", "List the tokens", code="no-such-number", kind="token")


def revoke_all(database: HubDatabase, account: str, kinds: Sequence[str]) -> None:
    """Revoke the tokens of some kinds that an account has."""
    for kind in kinds:
        sql = "UPDATE tokens SET revoked = ? WHERE account = ? AND kind = ? AND revoked IS NULL"
        database.execute(sql, time.time(), account, kind)


def used(database: HubDatabase, ident: int) -> None:
    """Record that a token was used now."""
    database.execute("UPDATE tokens SET used = ? WHERE id = ?", time.time(), ident)


def names(text: str) -> tuple[str, ...]:
    """The namespaces and repositories that a row limits a token to."""
    return tuple(json_file.parse(text, "hub.db"))


def prefix_of(token: str) -> str:
    """The first characters of a token, by which lists and logs name it."""
    return token[:_SHOWN]


def hashed(token: str) -> str:
    """What is stored of a secret with many random bits."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
