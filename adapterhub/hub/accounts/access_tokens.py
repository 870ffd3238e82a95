"""Access tokens of accounts: shown once, stored as a hash, and identified in lists and logs by their first characters."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import accounts
from .accounts import EVERYWHERE, ROLES

SERVICE, EXCHANGE, DEPLOY, PERSONAL, DEVICE, BROWSER = "service", "exchange", "deploy", "personal", "device", "browser"
"""Kinds of tokens. Those of services and trusted publishers, and deploy keys of namespaces, have a role of their own; others
are limited to the roles of their account. A browser's token belongs to a session and is never shown to anybody."""
_KINDS_WITH_ROLE = (SERVICE, EXCHANGE, DEPLOY)
_MAX_PARENTS = 20  # tokens each made by the one before
_MAX_ENDED = 1000  # revoked and expired tokens of an account that are kept, those that ended last
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
# Clients check the form of a token: llama.cpp only sends hf_ and at least 34 letters and digits.
_PREFIX, _LENGTH, _PREFIX_LENGTH = "hf_", 40, 8


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity behind a request: an account, by one of its tokens.

    Attributes:
        role: The highest role the token can have.
        namespaces: Namespaces or repositories the token is limited to; empty for all.
        expires: Seconds since the epoch; None for never.
        prefix: The first characters of the token.
        roles: The account's roles by namespace; None for a token with a role of its own.
    """

    account: str
    role: str
    namespaces: tuple[str, ...] = ()
    token: int = 0
    expires: float | None = None
    prefix: str = ""
    roles: Mapping[str, str] | None = None

    def is_for(self, name: str) -> bool:
        """Return whether the token is not limited to other namespaces and repositories."""
        return not self.namespaces or name in self.namespaces or name.partition("/")[0] in self.namespaces

    def role_in(self, name: str) -> str:
        """Return the token's role in a namespace or a repository; empty if it has none."""
        namespace = name.partition("/")[0]
        if not self.is_for(name):
            return ""
        if self.roles is None:
            return self.role
        roles = [self.roles[name] for name in (namespace, EVERYWHERE) if name in self.roles]
        return accounts.lesser_role(self.role, max(roles, key=ROLES.index)) if roles else ""

    def has_role(self, role: str, name: str) -> bool:
        """Return whether the token has at least a role in a namespace or a repository."""
        actual_role = self.role_in(name)
        return bool(actual_role) and ROLES.index(actual_role) >= ROLES.index(role)


@dataclass(frozen=True, slots=True)
class Token:
    """A token as shown in lists; times in seconds since the epoch."""

    id: int
    account: str
    prefix: str
    role: str
    namespaces: tuple[str, ...]
    kind: str
    created: float
    expires: float | None
    used: float | None
    name: str = ""
    parent: int | None = None

    @property
    def role_text(self) -> str:
        """Its role for people: one of a person has at most the roles of the account."""
        if self.kind in _KINDS_WITH_ROLE:
            return self.role
        return "as the account" if self.role == ROLES[-1] else f"at most {self.role}"


class Limits(TypedDict, total=False):
    """The limits of a token besides its role.

    Attributes:
        namespaces: Namespaces or repositories it is limited to; empty for no limit.
        kind: Its purpose, as shown in lists; only a service's token has its role regardless of its account's.
        lifetime: Seconds until it expires; None for never.
        parent: The id of the token with which it ends; None if it ends with its account only.
        name: What its owner calls it.
    """

    namespaces: Sequence[str]
    kind: str
    lifetime: float | None
    parent: int | None
    name: str


def create(database: HubDatabase, account: str, role: str, **limits: Unpack[Limits]) -> str:
    """Create a token for an account, which is created if missing. Only the return value ever has the whole token."""
    accounts.check_role(role)
    for name in (account, *limits.get("namespaces", ())):
        accounts.check_namespace(name)
    with database.transaction():
        accounts.ensure_account(database, account)
        return issue(database, account, role, **limits)[0]


def issue(database: HubDatabase, account: str, role: str, **limits: Unpack[Limits]) -> tuple[str, int]:
    """Create a token for an existing account, and return it with its id."""
    now = time.time()
    database.execute(_FORGET_ENDED, account, now, account, now, _MAX_ENDED)
    token = _PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
    lifetime = limits.get("lifetime")
    scope, kind = json.dumps(list(limits.get("namespaces", ()))), limits.get("kind", SERVICE)
    expires = now + lifetime if lifetime else None
    values = (account, hash_of(token), prefix_of(token), role, scope, kind, now, expires, limits.get("parent"))
    sql = (
        "INSERT INTO tokens (account, hash, prefix, role, namespaces, kind, created, expires, parent, name)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id"
    )
    return token, int(database.select(sql, *values, limits.get("name", ""))[0][0])


# Never the newest: SQLite would give its id again, and with that the tokens that ended with it a parent that is valid.
_FORGET_ENDED = """
    DELETE FROM tokens WHERE account = ? AND (revoked IS NOT NULL OR expires < ?) AND id < (SELECT max(id) FROM tokens)
    AND id NOT IN (SELECT token FROM sessions) AND id NOT IN (SELECT token FROM refreshes)
    AND id NOT IN (
        SELECT id FROM tokens WHERE account = ? AND (revoked IS NOT NULL OR expires < ?)
        ORDER BY coalesce(revoked, expires) DESC LIMIT ?
    )
"""


def identify(database: HubDatabase, token: str) -> Identity | None:
    """Return the identity of a token; None if it is unknown, revoked or expired, or its account is disabled."""
    return _identity(database, "hash", hash_of(token))


def identify_by_id(database: HubDatabase, ident: int) -> Identity | None:
    """Return the identity of the token with an id; None as for `identify`."""
    return _identity(database, "id", ident)


@of_one_snapshot
def _identity(database: HubDatabase, column: str, value: object) -> Identity | None:
    columns = "id, account, role, namespaces, expires, prefix, kind, parent"
    sql = (
        f"SELECT {columns} FROM tokens WHERE {column} = ? AND revoked IS NULL"  # noqa: S608 - our own columns
        " AND NOT EXISTS (SELECT 1 FROM accounts a WHERE a.name = account AND a.disabled IS NOT NULL)"
    )
    for ident, account, role, namespaces, expires, prefix, kind, parent in database.select(sql, value):
        if (expires is None or expires > time.time()) and is_valid(database, parent):
            # Looked up at each use, so that a role taken away is gone from existing tokens.
            roles = None if kind in _KINDS_WITH_ROLE else accounts.roles(database, account)
            return Identity(account, role, parse_scope(namespaces), ident, expires, prefix, roles)
    return None


@of_one_snapshot
def is_valid(database: HubDatabase, ident: int | None) -> bool:
    """Return whether the token with an id, and those with which it ends, are neither revoked nor expired; True for None."""
    for _ in range(_MAX_PARENTS):
        if ident is None:
            return True
        rows = database.select("SELECT parent, revoked, expires FROM tokens WHERE id = ?", ident)
        if not rows or rows[0][1] is not None or (rows[0][2] is not None and rows[0][2] <= time.time()):
            return False
        ident = rows[0][0]
    return False


@of_one_snapshot
def is_of_program(database: HubDatabase, ident: int) -> bool:
    """Return whether a token is a deploy key or a CI job's, or was made with one: its user need not be its account."""
    token: int | None = ident
    for _ in range(_MAX_PARENTS):
        rows = database.select("SELECT kind, parent FROM tokens WHERE id = ?", token)
        if not rows or rows[0][0] in (DEPLOY, EXCHANGE):
            return bool(rows)
        token = rows[0][1]
    return False


def list_tokens(database: HubDatabase, *, account: str = "", kind: str = "") -> list[Token]:
    """Return the tokens that are not revoked, by account; only those of an account or a kind if these are given."""
    sql = (
        "SELECT id, account, prefix, role, namespaces, kind, created, expires, used, name, parent FROM tokens"
        " WHERE revoked IS NULL AND (? = '' OR account = ?) AND (? = '' OR kind = ?) ORDER BY account, id"
    )
    rows = database.select(sql, account, account, kind, kind)
    return [Token(row[0], row[1], row[2], row[3], parse_scope(row[4]), *row[5:11]) for row in rows]


def parent_of(database: HubDatabase, identity: Identity) -> int | None:
    """Return the token with which one ends that `identity` makes; None for a person who signed in at a provider."""
    kinds = database.select("SELECT kind FROM tokens WHERE id = ?", identity.token)
    return identity.token if kinds and kinds[0][0] != BROWSER else None


def revoke(database: HubDatabase, ident: int) -> None:
    """Revoke a token at once and for good.

    Raises:
        NotFoundError: There is no such token.
    """
    if not database.execute("UPDATE tokens SET revoked = ? WHERE id = ? AND revoked IS NULL", time.time(), ident):
        raise NotFoundError(str(ident), "no such token", "List the tokens", code="no-such-number", kind="token")


def revoke_all(database: HubDatabase, account: str, kinds: Sequence[str]) -> None:
    """Revoke an account's tokens of some kinds."""
    for kind in kinds:
        sql = "UPDATE tokens SET revoked = ? WHERE account = ? AND kind = ? AND revoked IS NULL"
        database.execute(sql, time.time(), account, kind)


def record_use(database: HubDatabase, ident: int) -> None:
    """Record that a token was just used."""
    database.execute("UPDATE tokens SET used = ? WHERE id = ?", time.time(), ident)


def parse_scope(text: str) -> tuple[str, ...]:
    """Return the namespaces and repositories that a row limits its token to."""
    return tuple(json_file.parse(text, "hub.db"))


def prefix_of(token: str) -> str:
    """Return the first characters of a token, which identify it in lists and logs."""
    return token[:_PREFIX_LENGTH]


def hash_of(token: str) -> str:
    """Return the stored form of a secret. A plain hash is enough, because secrets have many random bits."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
