"""Rollouts of versions: each change of a rollout's state is one entry of the candidate's log, decided under the write lock."""

from __future__ import annotations

from collections.abc import Callable

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.index_database import Index
from adapterhub.index.queries import LogState
from adapterhub.manifest import rollout_state
from adapterhub.manifest.rollout_state import RolloutState
from adapterhub.ref import Ref
from adapterhub.registry.ledger import Ledger
from adapterhub.registry.moves import now
from adapterhub.registry.version_lookup import find_row
from adapterhub.store.ref_log import TAG_MOVES, Entry, RefLog


def states(index: Index, name: str) -> dict[tuple[Digest, str], RolloutState]:
    """Return the states of a name's rollouts, by the digest of the candidate and the route."""
    by_candidate: dict[tuple[Digest, str], RolloutState] = {}
    for key, message in queries.marks(index, "rollout", name).items():
        digest, _, route = key.partition(" ")
        if state := rollout_state.parse(message):
            by_candidate[digest, route] = state
    return by_candidate


def state_of(index: Index, ref: Ref, route: str) -> RolloutState | None:
    """Return the state of the rollout of a version, named with its digest, on a route; None if it has not begun."""
    return states(index, ref.name).get((str(ref.digest), route))


def was_promoted(log: RefLog, ref: Ref, route: str, tag: str, *, after: int, last: int) -> bool:
    """Return whether a tag was moved to a candidate, named with its digest, since its rollout on a route last began.

    Args:
        after, last: Only the entries after the first of these are read, from the last one back.
    """
    for seq in range(last, after, -1):
        logged = log.entry(ref.name, seq)
        if logged is None or logged[0].digest != ref.digest:
            continue
        entry = logged[0]
        if entry.op in TAG_MOVES and tag in entry.tags:
            return True
        state = rollout_state.parse(entry.message) if entry.op == "rollout" else None
        if state and state.route == route and state.has_just_begun:
            return False
    return False


def change(
    ledger: Ledger, ref: Ref, route: str, decide: Callable[[RolloutState | None], RolloutState | None]
) -> RolloutState | None:
    """Write the state that follows the current one, by compare-and-swap: `decide` is called again if another writer was first.

    Args:
        ref: The candidate, with its digest.
        decide: Returns the next state, or the current one to write nothing.

    Returns:
        The state afterwards; None if there is none.

    Raises:
        NotFoundError: The candidate is not in the registry.
    """
    row = find_row(ledger, ref)

    def next_entry(log: LogState) -> Entry | None:
        find_row(ledger, row.ref)  # again, under the lock: it may have been removed since
        current = state_of(ledger.index, ref, route)
        following = decide(current)
        if following is None or following == current:
            return None
        position = (row.digest, row.manifest_size, row.number, (), log.head)
        return Entry(row.name, log.seq + 1, "rollout", now(), *position, message=following.dump())

    ledger.move(row.name, next_entry)
    return state_of(ledger.index, ref, route)
