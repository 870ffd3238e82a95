"""Gated names: everybody who sees one sees its page, and only members and accounts with access read its files.

An account asks for access and thereby accepts the terms. A gate in the mode `auto` gives it at once, as on the Hugging Face
Hub, and one in the mode `manual` has it wait for an admin of the namespace. The tables are asked anew by each request for
a file, so that a gate and a revoked access hold at once in all processes of a hub.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from adapterhub.digest import sha256_bytes
from adapterhub_converters.errors import ConflictError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .accounts import accounts
from .hub_database import HubDatabase

AUTO, MANUAL = MODES = ("auto", "manual")
"""Whether access is given to each account that asks, or by an admin."""
PENDING, ACCEPTED, REJECTED = STATUSES = ("pending", "accepted", "rejected")
MAX_TERMS = 10_000
"""Characters of the terms."""
MAX_REQUESTS, MAX_WAITING, MAX_UNASKED = 500, 1_000, 10_000
"""Names that an account has asked for, accounts that wait for a name, and access given unasked in a namespace."""
_MAX_REASON = 500  # characters
_COLUMNS = "id, name, account, status, asked, terms, decided, decider, reason"


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate of a name: one of MODES, and the terms that an account accepts."""

    mode: str
    terms: str = ""


@dataclass(frozen=True, slots=True)
class AccessRequest:
    """An account's access to a gated name.

    Attributes:
        status: One of STATUSES.
        asked: Seconds since the epoch.
        terms: The digest of the terms as they were when it asked; empty if an admin gave access unasked.
        decided: When the status was set by an admin or, by `auto`, with the request; None if it never was.
        decider: The account that set it; empty for the gate itself.
        reason: Why an admin rejected it.
    """

    id: int
    name: str
    account: str
    status: str
    asked: float
    terms: str
    decided: float | None
    decider: str
    reason: str


OnChange = Callable[[AccessRequest], object]


# ---- gates


def set_gate(database: HubDatabase, name: str, gate: Gate | None) -> None:
    """Gate a name, or with None let all who see it read it again; the requests stay. UsageError for an unknown mode."""
    if gate is None:
        database.execute("DELETE FROM gates WHERE name = ?", name)
        return
    if gate.mode not in MODES:
        raise UsageError("gated", f"{gate.mode[:40]!r} is not one of {', '.join(MODES)}")
    if len(gate.terms) > MAX_TERMS:
        raise UsageError("terms", f"has more than {MAX_TERMS:,} characters")
    sql = (
        "INSERT INTO gates (name, mode, terms) VALUES (?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET mode = excluded.mode, terms = excluded.terms"
    )
    database.execute(sql, name, gate.mode, gate.terms.encode(errors="replace").decode())


def find_gate(database: HubDatabase, name: str) -> Gate | None:
    """Return the gate of a name; None for a name without one."""
    rows = database.select("SELECT mode, terms FROM gates WHERE name = ?", name)
    return Gate(*rows[0]) if rows else None


def check_gated(database: HubDatabase, name: str) -> Gate:
    """Return the gate of a name; UsageError for a name without one."""
    gate = find_gate(database, name)
    if gate is None:
        raise UsageError(name, "is not gated: whoever sees it reads its files")
    return gate


def access_status(database: HubDatabase, name: str, account: str) -> str | None:
    """Return one of STATUSES, empty for an account that has not asked, or None for a name without a gate."""
    sql = (
        "SELECT coalesce(r.status, '') FROM gates g LEFT JOIN access_requests r ON r.name = g.name AND r.account = ?"
        " WHERE g.name = ?"
    )
    rows = database.select(sql, account, name)
    return str(rows[0][0]) if rows else None


def modes(database: HubDatabase, names: Collection[str]) -> Mapping[str, str]:
    """Return the mode of each of a page of names that is gated."""
    if not names:
        return {}
    marks = ", ".join("?" * len(names))
    return dict(database.select(f"SELECT name, mode FROM gates WHERE name IN ({marks})", *names))  # noqa: S608 - marks


def gated_names(database: HubDatabase) -> tuple[str, ...]:
    """Return all names with a gate, sorted."""
    return tuple(name for (name,) in database.select("SELECT name FROM gates ORDER BY name"))


# ---- requests


def find_request(database: HubDatabase, name: str, account: str) -> AccessRequest | None:
    """Return the request of an account for a name; None if there is none."""
    sql = f"SELECT {_COLUMNS} FROM access_requests WHERE name = ? AND account = ?"  # noqa: S608 - ours
    rows = database.select(sql, name, account)
    return AccessRequest(*rows[0]) if rows else None


def list_requests(database: HubDatabase, name: str, status: str, *, after: int = 0, limit: int = 100) -> list[AccessRequest]:
    """Return the requests for a name with a status, in the order of their numbers, after one of them."""
    sql = f"SELECT {_COLUMNS} FROM access_requests WHERE name = ? AND status = ? AND id > ? ORDER BY id LIMIT ?"  # noqa: S608 - ours
    return [AccessRequest(*row) for row in database.select(sql, name, status, after, limit)]


def request_account(database: HubDatabase, name: str, ident: int) -> str:
    """Return the account of a request by its number; NotFoundError if the name has no such request."""
    rows = database.select("SELECT account FROM access_requests WHERE name = ? AND id = ?", name, ident)
    if not rows:
        raise _no_request(name)
    return str(rows[0][0])


def ask(database: HubDatabase, name: str, account: str, *, on_change: OnChange = lambda _: None) -> AccessRequest:
    """Ask for access, which accepts the terms; a request that exists stays as it is.

    `on_change` is called with a new request in the transaction that adds it.

    Raises:
        UsageError: The name has no gate.
        RefusedError: The account has asked for too many names, or too many accounts wait for this one.
    """
    with database.transaction():
        gate = check_gated(database, name)
        if request := find_request(database, name, account):
            return request
        _check_room(database, name, account)
        now = time.time()
        status, decided = (ACCEPTED, now) if gate.mode == AUTO else (PENDING, None)
        digest = sha256_bytes(gate.terms.encode())
        values = (name, account, status, now, digest, decided, "", "")
        request = _insert(database, values)
        on_change(request)
        return request


def decide(
    database: HubDatabase,
    name: str,
    account: str,
    status: str,
    *,
    decider: str,
    reason: str = "",
    unasked: bool = False,
    on_change: OnChange = lambda _: None,
) -> AccessRequest:
    """Set the status of an account's request; with `unasked` also for an account that has not asked.

    `on_change` is called with the decided request in the same transaction.

    Raises:
        UsageError: The name has no gate, or the status is unknown.
        NotFoundError: The account has not asked, or does not exist.
        ConflictError: The request has this status already.
        RefusedError: Too many accounts were given access unasked.
    """
    if status not in STATUSES:
        raise UsageError("status", f"{status[:40]!r} is not one of {', '.join(STATUSES)}")
    with database.transaction():
        check_gated(database, name)
        request, now = find_request(database, name, account), time.time()
        if request is None and not unasked:
            raise _no_request(name)
        if request is None:
            accounts.check_account(database, account)
            _check_room_for_unasked(database, name)
            decided = _insert(database, (name, account, status, now, "", now, decider, ""))
        else:
            if request.status == status:
                raise ConflictError(name, f"the access of {account} is {status} already")
            sql = "UPDATE access_requests SET status = ?, decided = ?, decider = ?, reason = ? WHERE id = ?"
            values = status, now, decider, reason.encode(errors="replace").decode()[:_MAX_REASON]
            database.execute(sql, *values, request.id)
            decided = find_request(database, name, account) or request
        on_change(decided)
        return decided


def copy(database: HubDatabase, old: str, new: str) -> None:
    """Gate a new name like the old one, with the same access; within a transaction.

    What was changed under either name meanwhile holds: the stricter mode, and of each request the last decision.
    """
    gate = (
        "INSERT INTO gates (name, mode, terms) SELECT ?, mode, terms FROM gates WHERE name = ?"
        " ON CONFLICT (name) DO UPDATE SET mode = excluded.mode, terms = excluded.terms WHERE excluded.mode = ?"
    )
    database.execute(gate, new, old, MANUAL)
    columns = "account, status, asked, terms, decided, decider, reason"
    requests = (
        f"INSERT INTO access_requests (name, {columns}) SELECT ?, {columns} FROM access_requests WHERE name = ?"  # noqa: S608 - ours
        " ON CONFLICT (name, account) DO UPDATE SET status = excluded.status, decided = excluded.decided,"
        " decider = excluded.decider, reason = excluded.reason"
        " WHERE coalesce(excluded.decided, 0) > coalesce(access_requests.decided, 0)"
    )
    database.execute(requests, new, old)


def remove(database: HubDatabase, name: str) -> None:
    """Remove the gate of a name, with its requests; within a transaction."""
    database.execute("DELETE FROM gates WHERE name = ?", name)
    database.execute("DELETE FROM access_requests WHERE name = ?", name)


def _insert(database: HubDatabase, values: tuple[object, ...]) -> AccessRequest:
    """Add a request, within a transaction."""
    columns = "name, account, status, asked, terms, decided, decider, reason"
    sql = f"INSERT INTO access_requests ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING {_COLUMNS}"  # noqa: S608 - ours
    return AccessRequest(*database.select(sql, *values)[0])


def _check_room(database: HubDatabase, name: str, account: str) -> None:
    # What admins of others' namespaces gave it unasked must not count against it.
    ((count,),) = database.select("SELECT count(*) FROM access_requests WHERE account = ? AND terms <> ''", account)
    if count >= MAX_REQUESTS:
        raise RefusedError(name, f"{account} has asked for {MAX_REQUESTS} names, the most of an account")
    ((count,),) = database.select("SELECT count(*) FROM access_requests WHERE name = ? AND status = ?", name, PENDING)
    if count >= MAX_WAITING:
        raise RefusedError(name, f"{MAX_WAITING:,} accounts wait for access already", "Ask its owners to decide")


def _check_room_for_unasked(database: HubDatabase, name: str) -> None:
    namespace = name.partition("/")[0]
    sql = "SELECT count(*) FROM access_requests WHERE name >= ? AND name < ? AND terms = ''"
    ((count,),) = database.select(sql, f"{namespace}/", f"{namespace}0")  # "0" follows "/"
    if count >= MAX_UNASKED:
        raise RefusedError(name, f"{namespace} has given access unasked {MAX_UNASKED:,} times, the most there may be")


def _no_request(name: str) -> NotFoundError:
    return NotFoundError(name, "no such access request", "List the requests")
