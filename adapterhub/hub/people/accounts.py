"""Accounts, the roles that they have in namespaces, and what holds in a namespace.

An account owns the namespace of its own name. A role in the namespace `*` is one in every namespace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from adapterhub.hub.database import HubDatabase
from adapterhub.ref import RefError, parse_name
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import ConflictError, NotFoundError, UsageError

ROLES = ("read", "write", "admin")
"""Each may do what those before it may: read private adapters; push, tag and remove; manage members."""
EVERYWHERE = "*"
READERS = ("anyone", "accounts", "members")
"""Who can read what is public in a namespace: those without a token too, those with one, or only those with a role there."""


@dataclass(frozen=True, slots=True)
class Account:
    """An account as lists show it: its roles by namespace, without that in its own."""

    name: str
    created: str
    roles: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Namespace:
    """What holds in a namespace.

    Attributes:
        readers: One of READERS.
        max_bytes: Of all its distinct files; None for no limit.
        max_files: The number of those; None for no limit.
        adapters_only: Whether OCI clients may push adapters only, and what is attached to them.
    """

    name: str
    readers: str = READERS[0]
    max_bytes: int | None = None
    max_files: int | None = None
    adapters_only: bool = False


def check_role(role: str) -> None:
    """Raise UsageError for a word that is no role."""
    if role not in ROLES:
        raise UsageError(role, "not a role", f"Choose one of {', '.join(ROLES)}")


def check_namespace(name: str) -> str:
    """Return a name that a namespace or an account may have; RefError for another."""
    if "/" in name:
        raise RefError(name[:80], "is not a namespace", "Write it without a slash, like team")
    parse_name(f"{name}/x", name)
    return name


def least(role: str, other: str) -> str:
    """The role of two that may do less."""
    return min(role, other, key=ROLES.index)


# ---- accounts


def add(database: HubDatabase, name: str) -> None:
    """Add an account; one that was removed comes back without its roles and tokens. ConflictError if it is there."""
    check_namespace(name)
    with database.transaction():
        if database.select("SELECT 1 FROM accounts WHERE name = ? AND removed IS NULL", name):
            raise ConflictError(name, "an account with this name already exists", "Choose another name")
        ensure(database, name)


def ensure(database: HubDatabase, name: str) -> None:
    """Add an account if it is missing, within a transaction; who signed in as one that was removed is not it any more."""
    gone = "DELETE FROM identities WHERE account = ? AND account IN (SELECT name FROM accounts WHERE removed IS NOT NULL)"
    database.execute(gone, name)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    database.execute(
        "INSERT INTO accounts (name, created) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET removed = NULL", name, created
    )


def remove(database: HubDatabase, name: str) -> None:
    """Remove an account: its tokens are revoked and its roles are gone; what it pushed stays."""
    with database.transaction():
        if not database.execute("UPDATE accounts SET removed = ? WHERE name = ? AND removed IS NULL", time.time(), name):
            raise _no_account(name)
        database.execute("UPDATE tokens SET revoked = ? WHERE account = ? AND revoked IS NULL", time.time(), name)
        database.execute("DELETE FROM members WHERE account = ?", name)
        database.execute("DELETE FROM publishers WHERE account = ?", name)


def check_account(database: HubDatabase, name: str) -> None:
    """Raise NotFoundError without an account of this name."""
    if not database.select("SELECT 1 FROM accounts WHERE name = ? AND removed IS NULL", name):
        raise _no_account(name)


def _no_account(name: str) -> NotFoundError:
    return NotFoundError(name[:80], "no account with this name", code="no-such-account")


def listed(database: HubDatabase) -> list[Account]:
    """Return the accounts, by name."""
    rows = database.select("SELECT name, created FROM accounts WHERE removed IS NULL ORDER BY name")
    members = database.select("SELECT account, namespace, role FROM members ORDER BY namespace")
    return [
        Account(name, created, {namespace: role for who, namespace, role in members if who == name}) for name, created in rows
    ]


# ---- members


def set_member(database: HubDatabase, namespace: str, account: str, role: str) -> None:
    """Give an account a role in a namespace, in place of that which it had."""
    check_role(role)
    if namespace != EVERYWHERE:
        check_namespace(namespace)
    with database.transaction():
        check_account(database, account)
        sql = (
            "INSERT INTO members (namespace, account, role) VALUES (?, ?, ?)"
            " ON CONFLICT (namespace, account) DO UPDATE SET role = excluded.role, admission = NULL"
        )
        database.execute(sql, namespace, account, role)


def remove_member(database: HubDatabase, namespace: str, account: str) -> None:
    """Take an account's role in a namespace away; NotFoundError if it has none."""
    if not database.execute("DELETE FROM members WHERE namespace = ? AND account = ?", namespace, account):
        raise NotFoundError(f"{account[:80]} in {namespace[:80]}", "no such member", code="no-such-account")


def roles(database: HubDatabase, account: str) -> dict[str, str]:
    """The roles of an account by namespace, that in its own among them."""
    found = {str(name): str(role) for name, role in database.select(_MEMBER, account)}
    return {**found, account: ROLES[-1]}


_MEMBER = "SELECT namespace, role FROM members WHERE account = ? ORDER BY namespace"


# ---- namespaces


def namespace(database: HubDatabase, name: str) -> Namespace:
    """What holds in a namespace."""
    return next((one for one in namespaces(database) if one.name == name), Namespace(name))


def namespaces(database: HubDatabase) -> list[Namespace]:
    """The namespaces that something was settled for, by name."""
    sql = "SELECT name, readers, max_bytes, max_files, adapters_only FROM namespaces ORDER BY name"
    return [Namespace(name, readers, size, files, bool(only)) for name, readers, size, files, only in database.select(sql)]


def taken(database: HubDatabase) -> set[str]:
    """The namespaces that are somebody's here.

    Those of accounts, removed ones too; those with members or publishers, or a rule that makes members; those that a token is
    limited to.
    """
    sql = (
        "SELECT name FROM accounts UNION SELECT namespace FROM members UNION SELECT scope FROM publishers"
        " UNION SELECT namespace FROM admissions"
    )
    scopes = [scope for (scope,) in database.select(sql)]
    for (text,) in database.select("SELECT DISTINCT namespaces FROM tokens WHERE revoked IS NULL"):
        scopes += json_file.parse(text, "hub.db")
    return {str(scope).partition("/")[0] for scope in scopes} - {EVERYWHERE}


def settle(database: HubDatabase, wanted: Namespace) -> None:
    """Settle what holds in a namespace."""
    check_namespace(wanted.name)
    if wanted.readers not in READERS:
        raise UsageError("readers", f"{wanted.readers!r} is not one of {', '.join(READERS)}")
    database.execute(
        "INSERT INTO namespaces VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET readers = excluded.readers,"
        " max_bytes = excluded.max_bytes, max_files = excluded.max_files, adapters_only = excluded.adapters_only",
        *(wanted.name, wanted.readers, wanted.max_bytes, wanted.max_files, int(wanted.adapters_only)),
    )
