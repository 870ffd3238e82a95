"""What admins of a namespace manage: its members, who reads it, and what it may hold, for which they ask.

Only an admin of the hub gives more room, and takes or gives roles in every namespace (EVERYWHERE).
"""

from __future__ import annotations

import time

from adapterhub.hub import request_context
from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE, Member, Namespace
from adapterhub.hub.hub_database import HubDatabase
from adapterhub_converters.errors import NotFoundError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

_MAX_REASON = 500  # characters
_MAX_LIMIT = 1 << 60  # bytes or files


@dataclass(frozen=True, slots=True)
class QuotaRequest:
    """A request for a larger quota, by an account, in bytes and files; None for no limit."""

    namespace: str
    account: str
    max_bytes: int | None
    max_files: int | None
    reason: str
    time: float


# ---- members


def list_members(database: HubDatabase, identity: Identity | None, namespace: str) -> list[Member]:
    """Return the members of a namespace, for its admins."""
    check_admin(identity, namespace)
    return accounts.members(database, namespace)


def set_member(
    database: HubDatabase, identity: Identity | None, namespace: str, account: str, role: str, *, force: bool = False
) -> None:
    """Give an account a role in a namespace; errors as for `accounts.set_member`."""
    check_admin(identity, namespace)
    accounts.set_member(database, namespace, account, role, force=force)
    request_context.current().record_detail(account=account, role=role)


def remove_member(
    database: HubDatabase, identity: Identity | None, namespace: str, account: str, *, force: bool = False
) -> None:
    """Take an account's role in a namespace away; errors as for `accounts.remove_member`."""
    check_admin(identity, namespace)
    accounts.remove_member(database, namespace, account, force=force)
    request_context.current().record_detail(account=account)


# ---- settings


def set_readers(
    database: HubDatabase,
    identity: Identity | None,
    namespace: str,
    *,
    readers: str | None = None,
    adapters_only: bool | None = None,
) -> Namespace:
    """Set who reads the public adapters of a namespace, and which artifacts it takes; None leaves a setting as it is."""
    check_admin(identity, namespace)
    accounts.check_namespace(namespace)
    changes = accounts.NamespaceChanges()
    if readers is not None:
        changes["readers"] = readers
    if adapters_only is not None:
        changes["adapters_only"] = adapters_only
    request_context.current().record_detail(readers=readers, adapters_only=adapters_only)
    return accounts.change_namespace(database, namespace, **changes)


def set_quota(
    database: HubDatabase, identity: Identity | None, namespace: str, max_bytes: int | None, max_files: int | None
) -> Namespace:
    """Set what a namespace may hold, for admins of the hub; this answers what its admins asked for. None for no limit."""
    check_admin(identity, EVERYWHERE)
    accounts.check_namespace(namespace)
    _check_limits(max_bytes, max_files)
    settings = accounts.change_namespace(database, namespace, max_bytes=max_bytes, max_files=max_files)
    database.execute("DELETE FROM quota_requests WHERE namespace = ?", namespace)
    request_context.current().record_change(namespace)
    request_context.current().record_detail(max_bytes=max_bytes or "none", max_files=max_files or "none")
    return settings


def request_quota(
    database: HubDatabase,
    identity: Identity | None,
    namespace: str,
    *,
    max_bytes: int | None,
    max_files: int | None,
    reason: str = "",
) -> None:
    """Ask the admins of the hub for a quota, in place of an earlier request of the namespace."""
    identity = check_admin(identity, namespace)
    accounts.check_namespace(namespace)
    _check_limits(max_bytes, max_files)
    if len(reason) > _MAX_REASON or not reason.replace("\n", "").replace("\r", "").isprintable():
        raise UsageError("reason", f"is not a text of at most {_MAX_REASON} characters")
    sql = (
        "INSERT INTO quota_requests (namespace, account, max_bytes, max_files, reason, time) VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (namespace) DO UPDATE SET account = excluded.account, max_bytes = excluded.max_bytes,"
        " max_files = excluded.max_files, reason = excluded.reason, time = excluded.time"
    )
    database.execute(sql, namespace, identity.account, max_bytes, max_files, reason, time.time())
    request_context.current().record_detail(max_bytes=max_bytes or "none", max_files=max_files or "none")


def drop_quota_request(database: HubDatabase, identity: Identity | None, namespace: str) -> None:
    """Withdraw the request of a namespace, or as an admin of the hub refuse it. NotFoundError without one."""
    check_admin(identity, namespace)
    if not database.execute("DELETE FROM quota_requests WHERE namespace = ?", namespace):
        raise NotFoundError(namespace, "asks for no quota")


def quota_requests(database: HubDatabase, namespace: str = "") -> list[QuotaRequest]:
    """Return the open requests, the oldest first; of one namespace if it is given."""
    sql = (
        "SELECT namespace, account, max_bytes, max_files, reason, time FROM quota_requests"
        " WHERE ? = '' OR namespace = ? ORDER BY time"
    )
    return [QuotaRequest(*row) for row in database.select(sql, namespace, namespace)]


def _check_limits(max_bytes: int | None, max_files: int | None) -> None:
    for key, limit in (("max_bytes", max_bytes), ("max_files", max_files)):
        if limit is not None and not 0 < limit <= _MAX_LIMIT:
            raise UsageError(key, f"{limit} is not a limit", "Choose a number above 0, or none")
