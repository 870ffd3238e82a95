"""Proposals: commits for `main` by accounts that may read a repository, until a writer accepts or refuses them.

The repository's document has them with their commits, so that a gc, a rename and a backup treat their files as all others. A
row of hub.db reserves the room of each, from before its document is written: by it, proposals are bounded for each account and
each namespace. The row is also what is left to do after a killed process: `settle` announces what the document says to the
webhooks, in one transaction with the row. Bytes that a refusal gives back count until a gc has had its time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapterhub.digest import Digest
from adapterhub.registry.moves import now
from adapterhub.registry.repository_documents import (
    ACCEPTED,
    OPEN,
    CommitRecord,
    Proposal,
    Repository,
    commit_id,
    open_proposals,
)
from adapterhub_converters.adapter_files import ADAPTER_JSON, determines_function
from adapterhub_converters.errors import ConflictError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import aliases, commits, request_context
from .access_control import Access, check_scope, may_write
from .accounts.access_tokens import Identity
from .accounts.accounts import Namespace
from .commits import View
from .hub_database import HubDatabase
from .publishing import Files
from .quotas import proposal_scope
from .uploads import LEASE_SECONDS
from .webhooks import Webhooks
from .workers import Worker

MAX_REASON = 1000
"""Characters of a reason for which a proposal is closed."""
_MAX_OPEN_OF_ACCOUNT, _MAX_OPEN = 10, 100  # proposals in a namespace
_MAX_BYTES = 16 << 30  # of the proposals in a namespace, and a quarter of what it may hold
_SHARES = 32  # into which those bytes are divided once half of them are taken: one for each account
_MAX_HOURLY = 30  # proposals that an account opens
_MAX_COMMITS = 100  # of a proposal, each in the place of the one before
_MAX_HOURLY_COMMITS = 200  # of the proposals of an account in a namespace
_MAX_CLOSED = 100  # proposals of a repository that are remembered, besides those that are open or were accepted
# Seconds in which a commit of a proposal is written, from the beginning of the hour in which its room is reserved.
_UNSETTLED = 2 * 3600.0
_OPENED = "opened"


def find(view: View, number: str) -> Proposal:
    """Return a proposal by its number. NotFoundError if there is none."""
    proposals = {} if view.frozen or view.repository is None else view.repository.proposals
    if number not in proposals:
        raise NotFoundError(f"{view.name}: {number[:20]}", "no such proposal", "List the proposals", code="no-such-proposal")
    return proposals[number]


def find_open(view: View, number: str) -> Proposal:
    """Return an open proposal by its number. NotFoundError if there is none, ConflictError for one that is closed."""
    proposal = find(view, number)
    _check_open(view.name, number, proposal)
    return proposal


def _check_open(name: str, number: str, proposal: Proposal) -> None:
    if proposal.state != OPEN:
        problem = f"was {proposal.state} by {proposal.closed_by}"
        raise ConflictError(f"{name}: proposal {number}", problem, "Open another one", code="proposal-closed")


# ---- room


@dataclass(frozen=True)
class Room:
    """The room of a proposal.

    Attributes:
        name: The repository.
        ident: The id of its commit.
        account: The account that has opened it.
        size: Bytes of its files that neither the repository has nor the commit that it takes the place of.
    """

    name: str
    ident: str
    account: str
    size: int


def reserve(database: HubDatabase, limits: Namespace, room: Room, *, replaced: str = "", number: str = "") -> None:
    """Reserve room for a proposal in the namespace that has these settings.

    `replaced`: The commit of the same proposal, `number`, that it takes the place of, whose room the caller then releases. The
    new room includes that one: what a commit leaves behind stays until a gc.

    Raises:
        RefusedError: The account, or the namespace, has as many proposals as it may have, or as large ones; or the proposal has
            as many commits, or the account has made as many in an hour.
    """
    first, last, current_time = f"{limits.name}/", f"{limits.name}0", time.time()  # "0" follows "/"
    sql = "SELECT account, size, closed FROM proposals WHERE name >= ? AND name < ? AND ident <> ?"
    insert = (
        "INSERT INTO proposals (name, ident, account, size, opened, announced, commits, hour, hourly_commits)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
    )
    earlier_sql = "SELECT size, opened, commits, hour, hourly_commits FROM proposals WHERE name = ? AND ident = ?"
    with database.transaction():
        earlier = database.select(earlier_sql, room.name, replaced)
        nothing = (0, current_time, 0, 0.0, 0)
        replaced_size, opened, commits_so_far, hour, hourly_commits = earlier[0] if earlier else nothing
        size = room.size + replaced_size
        if hour < current_time - 3600:
            hour, hourly_commits = current_time, 0
        if commits_so_far >= _MAX_COMMITS:
            problem = f"has {_MAX_COMMITS} commits, the most of a proposal"
            raise RefusedError(f"{room.name}: proposal {number}", problem, "Open another one", code="quota")
        _check_hourly_commits(database, limits.name, room.account)
        rows = database.select(sql, first, last, replaced)
        if not replaced:
            _check_count(database, limits.name, room.account, [account for account, _, closed in rows if closed is None])
        _check_bytes(limits, room.account, size, [(account, row_size) for account, row_size, _ in rows])
        values = (room.name, room.ident, room.account, size, opened, int(bool(replaced)), commits_so_far + 1)
        if not database.execute(insert, *values, hour, hourly_commits + 1):
            raise ConflictError(f"{room.name}@{room.ident}", "is proposed by another request now", "Try again")


def _check_count(database: HubDatabase, namespace: str, account: str, authors_of_open: Sequence[str]) -> None:
    """Refuse another proposal of an account in a namespace with these open ones, which are given by their authors."""
    open_count = authors_of_open.count(account)
    if open_count >= _MAX_OPEN_OF_ACCOUNT:
        problem = f"{account} has {_MAX_OPEN_OF_ACCOUNT} open proposals, the most of an account"
        raise RefusedError(namespace, problem, "Withdraw one, or wait for an answer", code="quota")
    if len(authors_of_open) >= _MAX_OPEN:
        raise RefusedError(namespace, f"has {_MAX_OPEN} open proposals, the most there may be", "Wait", code="quota")
    # So that a few accounts cannot take it all, the second half is for those that have none yet.
    if open_count and 2 * (len(authors_of_open) + 1) > _MAX_OPEN:
        problem = f"{account} has {open_count} open proposals, and more than half of the room is taken"
        raise RefusedError(namespace, problem, "Withdraw one, or wait for an answer", code="quota")
    recent_sql = "SELECT count(*) FROM proposals WHERE account = ? AND opened > ?"
    if database.select(recent_sql, account, time.time() - 3600)[0][0] >= _MAX_HOURLY:
        raise RefusedError(account, f"has opened {_MAX_HOURLY} proposals within an hour", "Wait", code="quota")


def _check_hourly_commits(database: HubDatabase, namespace: str, account: str) -> None:
    """Refuse another commit of an account to its proposals in a namespace, each of which counts those of an hour."""
    sql = "SELECT coalesce(sum(hourly_commits), 0) FROM proposals WHERE name >= ? AND name < ? AND account = ? AND hour > ?"
    if database.select(sql, f"{namespace}/", f"{namespace}0", account, time.time() - 3600)[0][0] >= _MAX_HOURLY_COMMITS:
        problem = f"has made {_MAX_HOURLY_COMMITS} commits to proposals in {namespace} within an hour"
        raise RefusedError(account, problem, "Wait", code="quota")


def _check_bytes(limits: Namespace, account: str, size: int, sizes: Sequence[tuple[str, int]]) -> None:
    """Refuse `size` bytes of an account in a namespace with these other proposals, each given by its author and bytes."""
    max_bytes = _MAX_BYTES if limits.max_bytes is None else min(_MAX_BYTES, limits.max_bytes // 4)
    used, own = sum(row_size for _, row_size in sizes), sum(row_size for author, row_size in sizes if author == account)
    if used + size > max_bytes:
        problem = f"its proposals may hold {max_bytes:,} bytes, hold {used:,}, and {size:,} more were to come"
        raise RefusedError(limits.name, problem, "Wait until others are closed and gone", code="quota")
    share = max_bytes // _SHARES
    if 2 * used > max_bytes and own + size > share:
        problem = f"may hold {share:,} bytes of its proposals while more than half of the room is taken"
        raise RefusedError(f"{limits.name}: {account}", problem, "Wait until others are closed and gone", code="quota")


def release(database: HubDatabase, name: str, ident: str) -> None:
    """Give up the room of a proposal that was not written."""
    database.execute("DELETE FROM proposals WHERE name = ? AND ident = ?", name, ident)


# ---- the document


def record(
    worker: Worker, name: str, number: str, proposal: Proposal, document: Digest, *, replaced: Proposal | None = None
) -> str:
    """Write a proposal, whose commit has the digest `document`; return its number. The oldest that were closed and not
    accepted are forgotten.

    `number` and `replaced` are those of the open proposal that it takes the place of, if any.

    Raises:
        ConflictError: That is closed, or another commit by now.
    """

    def edit(state: Repository) -> Repository:
        nonlocal number
        current = state.proposals.get(number)
        if replaced and (current is None or current.commit != replaced.commit or current.state != OPEN):
            raise ConflictError(f"{name}: proposal {number}", "was changed meanwhile", "Try again")
        if not replaced:
            number = str(max(map(int, state.proposals), default=0) + 1)
        # Who has made an accepted version approves it for no tag, however many proposals they open and withdraw after it.
        closed = [key for key, earlier in state.proposals.items() if earlier.state not in (OPEN, ACCEPTED)]
        forgotten = set(closed[: max(len(closed) - _MAX_CLOSED, 0)])
        remembered = {key: earlier for key, earlier in state.proposals.items() if key not in forgotten}
        dropped = replaced.commit if replaced else ""
        kept_commits = {ident: digest for ident, digest in state.commits.items() if ident != dropped}
        all_commits = {**kept_commits, proposal.commit: document}
        return replace(state, proposals={**remembered, number: proposal}, commits=all_commits)

    worker.repositories.change(name, edit, has_room=True)
    return number


def close(worker: Worker, name: str, number: str, *, state: str, account: str, reason: str = "", became: str = "") -> None:
    """Close an open proposal, and let its files go.

    Args:
        worker: The worker of this thread.
        name: The repository.
        number: The number of the proposal.
        state: What became of it: ACCEPTED, REFUSED or WITHDRAWN.
        account: The account that closes it.
        reason: Why.
        became: The id of the commit on `main` that it became.

    Raises:
        ConflictError: It is closed by now.
    """

    def edit(repository: Repository) -> Repository:
        proposal = repository.proposals.get(number)
        if proposal is None:
            raise NotFoundError(f"{name}: {number}", "no such proposal", code="no-such-proposal")
        _check_open(name, number, proposal)
        closed = replace(proposal, state=state, closed_by=account, closed=now(), reason=reason, became=became)
        needed = {became, *(head.commit for head in repository.heads.values())}
        needed_commits = {
            ident: digest for ident, digest in repository.commits.items() if ident != proposal.commit or ident in needed
        }
        return replace(repository, proposals={**repository.proposals, number: closed}, commits=needed_commits)

    # Never refused for lack of room: it makes some.
    worker.repositories.change(name, edit, has_room=True)


# ---- what follows a change of the document


def settle(worker: Worker, webhooks: Webhooks, name: str, ident: str) -> None:
    """Announce what became of a proposal, given by the id of its commit, and end its reservation if it is closed."""
    repository = worker.repositories.get(name)
    proposals = repository.proposals if repository else {}
    number = next((number for number, proposal in proposals.items() if proposal.commit == ident), "")
    sql = "SELECT hour, announced FROM proposals WHERE name = ? AND ident = ? AND closed IS NULL"
    with worker.database.transaction():
        rows = worker.database.select(sql, name, ident)
        for hour, announced in rows:
            if not number:
                if hour < time.time() - _UNSETTLED:
                    release(worker.database, name, ident)
                continue
            proposal = proposals[number]
            if not announced:
                webhooks.queue_event(name, _event(name, number, proposal, _OPENED))
            if proposal.state == OPEN:
                worker.database.execute("UPDATE proposals SET announced = 1 WHERE name = ? AND ident = ?", name, ident)
                continue
            webhooks.queue_event(name, _event(name, number, proposal, proposal.state))
            if proposal.state == ACCEPTED:
                release(worker.database, name, ident)
            else:
                update = "UPDATE proposals SET announced = 1, closed = ? WHERE name = ? AND ident = ?"
                worker.database.execute(update, time.time(), name, ident)
    webhooks.wake()


def _event(name: str, number: str, proposal: Proposal, state: str) -> Mapping[str, object]:
    event = {"event": f"proposal.{state}", "name": name, "proposal": int(number), "title": proposal.title}
    if state == _OPENED:
        return {**event, "author": proposal.author, "time": proposal.opened}
    return {
        **event,
        "author": proposal.closed_by,
        "time": proposal.closed,
        "reason": proposal.reason,
        "commit": proposal.became,
    }


def settle_all(worker: Worker, webhooks: Webhooks) -> None:
    """Settle what killed processes have left, and forget the bytes of closed proposals once a gc has had its time."""
    worker.database.execute("DELETE FROM proposals WHERE closed < ?", time.time() - 2 * LEASE_SECONDS)
    for name, ident in worker.database.select("SELECT name, ident FROM proposals WHERE closed IS NULL"):
        settle(worker, webhooks, name, ident)


# ---- what it changes


@dataclass(frozen=True)
class ProposedChange:
    """What an open proposal would change of `main`.

    Attributes:
        commit: The id of its commit.
        record: That commit.
        before: The files of the commit that it is about.
        files: The files that differ from those, by path: None for one that it removes.
        conflicts: What stands in its way: paths that `main` has changed since.
    """

    commit: str
    record: CommitRecord
    before: Files
    files: Mapping[str, tuple[Digest, int] | None]
    conflicts: Sequence[str]


def change_of(worker: Worker, view: View, proposal: Proposal) -> ProposedChange:
    """Return what an open proposal would change.

    What an adapter computes is said by its weights and its config together: if both sides have changed any of these, that is a
    conflict, as nobody has seen the two together.
    """
    record = worker.repositories.commit(view.repository or Repository(), proposal.commit)
    if record is None:
        raise NotFoundError(f"{view.name}@{proposal.commit}", "no such commit")
    before, current = commits.by_id(worker, view, record.parent).files, commits.find(worker, view, commits.HEAD).files
    if ADAPTER_JSON not in record.files:  # derived when it is accepted
        before = {path: file for path, file in before.items() if path != ADAPTER_JSON}
    paths = sorted({*record.files, *before})
    files = {path: record.files.get(path) for path in paths if record.files.get(path) != before.get(path)}
    # An adapter.json that is derived says nothing of its own.
    compared = {*current, *before} - ({ADAPTER_JSON} - files.keys())
    moved = {path for path in compared if current.get(path) != before.get(path)}
    conflicts = {path for path in moved & files.keys() if current.get(path) != files[path]}
    if any(map(determines_function, files)):
        conflicts |= {path for path in moved if determines_function(path) and current.get(path) != files.get(path, ("", -1))}
    return ProposedChange(proposal.commit, record, before, files, sorted(conflicts))


def upload_name(access: Access, identity: Identity | None, name: str) -> str:
    """Return the name under which uploads of a client for a repository count: its own, if it may write there.

    Raises:
        NoTokenError: A stranger proposes nothing.
        ForbiddenError: The token is limited to other names.
        GatedError: The client sees the repository, and may not read its files.
        RefusedError: The name is an alias of another repository.
    """
    if identity is None or may_write(identity, name):
        access.check_write(identity, name)
        return name
    check_scope(identity, name)
    request_context.current().record_change(name)
    aliases.check_writable_name(name)
    access.check_files(identity, name)
    return proposal_scope(identity.account, name)


def can_read(view: View, ident: str, account: str) -> bool:
    """Return whether a commit is no open proposal, or one of an account."""
    return all(proposal.commit != ident or proposal.author == account for proposal in open_proposals(view.repository).values())


def authors(worker: Worker, name: str, digest: Digest) -> set[str]:
    """Return the accounts that have proposed a version or committed it, as far as the repository remembers."""
    repository, ident = worker.repositories.get(name) or Repository(), commit_id(digest)
    commit = worker.repositories.commit(repository, ident)
    accounts = {commit.author} if commit else set()
    for proposal in repository.proposals.values():
        if proposal.became == ident:
            accounts.update((proposal.author, *proposal.co_authors))
    return accounts - {""}
