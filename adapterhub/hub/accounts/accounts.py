"""Accounts, their roles in namespaces, and the settings of namespaces.

An account owns the namespace of its own name. A role in the namespace `*` holds in every namespace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict, Unpack

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import RefError, parse_name
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import ConflictError, NotFoundError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

ROLES = ("read", "write", "admin")
"""In ascending order, each including the ones before: read private adapters; push, tag and remove; manage members."""
EVERYWHERE = "*"
READERS = ("anyone", "accounts", "members")
"""Who can read a namespace's public adapters: anyone, clients with a token, or only accounts with a role there."""


@dataclass(frozen=True, slots=True)
class Account:
    """An account as shown in lists: its roles by namespace, except the one in its own."""

    name: str
    created: str
    roles: Mapping[str, str]
    disabled: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a namespace; `by_rule` if the role comes from a rule for people who sign in."""

    account: str
    role: str
    by_rule: bool


@dataclass(frozen=True, slots=True)
class Namespace:
    """The settings of a namespace.

    Attributes:
        readers: One of READERS.
        max_bytes: Limit for all its distinct files; None for no limit.
        max_files: Limit for the number of these files; None for no limit.
        adapters_only: Whether OCI clients may push only adapters and what is attached to them.
    """

    name: str
    readers: str = READERS[0]
    max_bytes: int | None = None
    max_files: int | None = None
    adapters_only: bool = False


class NamespaceChanges(TypedDict, total=False):
    """Settings of a namespace that change; the attributes are those of `Namespace`."""

    readers: str
    max_bytes: int | None
    max_files: int | None
    adapters_only: bool


def check_role(role: str) -> None:
    """Raise UsageError for an unknown role."""
    if role not in ROLES:
        raise UsageError(role, "not a role", f"Choose one of {', '.join(ROLES)}")


def check_namespace(name: str) -> str:
    """Return a valid name of a namespace or an account. RefError for any other text."""
    if "/" in name:
        raise RefError(name[:80], "is not a namespace", "Write it without a slash, like team")
    try:
        parse_name(f"{name}/x", name)
    except RefError as error:
        raise RefError(name, error.what, error.hint.removesuffix("/x")) from error
    return name


def lesser_role(role: str, other_role: str) -> str:
    """Return the lesser of two roles."""
    return min(role, other_role, key=ROLES.index)


# ---- accounts


def add(database: HubDatabase, name: str) -> None:
    """Add an account; a removed one comes back without its roles and tokens.

    Raises:
        ConflictError: The account exists.
    """
    check_namespace(name)
    with database.transaction():
        if database.select("SELECT 1 FROM accounts WHERE name = ? AND removed IS NULL", name):
            raise ConflictError(name, "an account with this name already exists", "Choose another name")
        ensure_account(database, name)


def ensure_account(database: HubDatabase, name: str) -> None:
    """Add an account if it is missing, within a transaction. Identities linked to a removed account of that name are lost."""
    sql = "DELETE FROM identities WHERE account = ? AND account IN (SELECT name FROM accounts WHERE removed IS NOT NULL)"
    database.execute(sql, name)
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    database.execute(
        "INSERT INTO accounts (name, created) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET removed = NULL", name, created
    )


def remove(database: HubDatabase, name: str, *, force: bool = True) -> None:
    """Remove an account: its tokens are revoked, its roles and its profile deleted; what it pushed stays.

    Raises:
        NotFoundError: There is no such account.
        ConflictError: It is the last admin of a namespace or of the hub, and `force` is not set.
    """
    with database.transaction():
        _check_other_admins(database, name, force=force)
        sql = "UPDATE accounts SET removed = ?, full_name = '', about = '', link = '' WHERE name = ? AND removed IS NULL"
        if not database.execute(sql, time.time(), name):
            raise _no_account(name)
        database.execute("UPDATE tokens SET revoked = ? WHERE account = ? AND revoked IS NULL", time.time(), name)
        database.execute("DELETE FROM members WHERE account = ?", name)
        database.execute("DELETE FROM publishers WHERE account = ?", name)
        for table in ("access_requests", "stars"):
            database.execute(f"DELETE FROM {table} WHERE account = ?", name)  # noqa: S608 - ours


def set_disabled(database: HubDatabase, name: str, *, disabled: bool, force: bool = True) -> None:
    """Refuse an account with all of its tokens, roles and sessions, or take it back as it was; errors as for `remove`."""
    with database.transaction():
        check_account(database, name)
        if disabled:
            _check_other_admins(database, name, force=force)
        database.execute("UPDATE accounts SET disabled = ? WHERE name = ?", time.time() if disabled else None, name)


def check_account(database: HubDatabase, name: str) -> None:
    """Raise NotFoundError unless an account of this name exists."""
    if not database.select("SELECT 1 FROM accounts WHERE name = ? AND removed IS NULL", name):
        raise _no_account(name)


def _no_account(name: str) -> NotFoundError:
    return NotFoundError(name[:80], "no account with this name", code="no-such-account")


@of_one_snapshot
def list_accounts(database: HubDatabase) -> list[Account]:
    """Return the accounts, by name."""
    rows = database.select("SELECT name, created, disabled FROM accounts WHERE removed IS NULL ORDER BY name")
    roles_by_account: dict[str, dict[str, str]] = {}
    for account, namespace, role in database.select("SELECT account, namespace, role FROM members ORDER BY namespace"):
        roles_by_account.setdefault(account, {})[namespace] = role
    return [Account(name, created, roles_by_account.get(name, {}), disabled is not None) for name, created, disabled in rows]


# ---- members


def members(database: HubDatabase, namespace: str) -> list[Member]:
    """Return the accounts with a role in a namespace, by name; its owner has none but is its admin."""
    sql = "SELECT account, role, admission IS NOT NULL FROM members WHERE namespace = ? ORDER BY account"
    return [Member(account, role, bool(by_rule)) for account, role, by_rule in database.select(sql, namespace)]


def set_member(database: HubDatabase, namespace: str, account: str, role: str, *, force: bool = True) -> None:
    """Give an account a role in a namespace, in place of any previous one.

    Raises:
        NotFoundError: There is no such account.
        ConflictError: It would no longer be an admin and is the last one, and `force` is not set.
    """
    check_role(role)
    if namespace != EVERYWHERE:
        check_namespace(namespace)
    with database.transaction():
        check_account(database, account)
        if role != ROLES[-1]:
            _check_other_admins(database, account, namespace, force=force)
        sql = (
            "INSERT INTO members (namespace, account, role) VALUES (?, ?, ?)"
            " ON CONFLICT (namespace, account) DO UPDATE SET role = excluded.role, admission = NULL"
        )
        database.execute(sql, namespace, account, role)


def remove_member(database: HubDatabase, namespace: str, account: str, *, force: bool = True) -> None:
    """Remove an account's role in a namespace; NotFoundError if it has none, and ConflictError as for `set_member`."""
    with database.transaction():
        _check_other_admins(database, account, namespace, force=force)
        if not database.execute("DELETE FROM members WHERE namespace = ? AND account = ?", namespace, account):
            raise NotFoundError(f"{account[:80]} in {namespace[:80]}", "no such member", code="no-such-account")


def _check_other_admins(database: HubDatabase, account: str, namespace: str = "", *, force: bool) -> None:
    """Refuse to take an account from the admins of a namespace, or of all without one, that have no other.

    A namespace that an account owns has that one, too.
    """
    if force:
        return
    sql = (
        "SELECT m.namespace FROM members m WHERE m.account = ? AND m.role = 'admin' AND (? = '' OR m.namespace = ?)"
        " AND NOT EXISTS (SELECT 1 FROM members o JOIN accounts a ON a.name = o.account WHERE o.namespace = m.namespace"
        " AND o.role = 'admin' AND o.account <> m.account AND a.disabled IS NULL)"
        " AND NOT EXISTS (SELECT 1 FROM accounts a WHERE a.name = m.namespace AND a.removed IS NULL AND a.disabled IS NULL)"
        " ORDER BY m.namespace"
    )
    if spaces := [str(space) for (space,) in database.select(sql, account, namespace, namespace)]:
        where = ", ".join("the whole hub" if space == EVERYWHERE else space for space in spaces[:5])
        problem = f"is the last admin of {where}"
        raise ConflictError(account, problem, "Make another account an admin first, or force it", code="last-admin")


def roles(database: HubDatabase, account: str) -> dict[str, str]:
    """Return the roles of an account by namespace, including the one in its own."""
    by_namespace = {str(name): str(role) for name, role in database.select(_MEMBER, account)}
    return {**by_namespace, account: ROLES[-1]}


_MEMBER = "SELECT namespace, role FROM members WHERE account = ? ORDER BY namespace"


# ---- namespaces


def namespace_settings(database: HubDatabase, name: str) -> Namespace:
    """Return the settings of a namespace."""
    return next((row for row in namespaces(database) if row.name == name), Namespace(name))


def namespaces(database: HubDatabase) -> list[Namespace]:
    """Return the namespaces that have settings, by name."""
    sql = "SELECT name, readers, max_bytes, max_files, adapters_only FROM namespaces ORDER BY name"
    return [Namespace(name, readers, size, files, bool(only)) for name, readers, size, files, only in database.select(sql)]


@of_one_snapshot
def owned_namespaces(database: HubDatabase) -> set[str]:
    """Return the namespaces that belong to somebody here.

    These are the ones of accounts, including removed ones; with members, publishers, or a rule that adds members; and those a
    token is limited to.
    """
    sql = (
        "SELECT name FROM accounts UNION SELECT namespace FROM members UNION SELECT scope FROM publishers"
        " UNION SELECT namespace FROM admissions"
    )
    scopes = [scope for (scope,) in database.select(sql)]
    for (text,) in database.select("SELECT DISTINCT namespaces FROM tokens WHERE revoked IS NULL"):
        scopes += json_file.parse(text, "hub.db")
    return {str(scope).partition("/")[0] for scope in scopes} - {EVERYWHERE}


def change_namespace(database: HubDatabase, name: str, **changes: Unpack[NamespaceChanges]) -> Namespace:
    """Change some settings of a namespace, leave the others as they are, and return all of them."""
    # In one transaction: another process may change another setting at the same time.
    with database.transaction():
        settings = replace(namespace_settings(database, name), **changes)
        set_namespace(database, settings)
    return settings


def set_namespace(database: HubDatabase, settings: Namespace) -> None:
    """Set the settings of a namespace."""
    check_namespace(settings.name)
    if settings.readers not in READERS:
        raise UsageError("readers", f"{settings.readers!r} is not one of {', '.join(READERS)}")
    database.execute(
        "INSERT INTO namespaces (name, readers, max_bytes, max_files, adapters_only) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET readers = excluded.readers,"
        " max_bytes = excluded.max_bytes, max_files = excluded.max_files, adapters_only = excluded.adapters_only",
        *(settings.name, settings.readers, settings.max_bytes, settings.max_files, int(settings.adapters_only)),
    )
