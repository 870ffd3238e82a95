"""Retention of versions: which versions of a name a gc keeps, and how the others are dropped.

The setting is an entry of the name's log. A version stays as long as a version that was made from it, which could not be made
again without it, and the version that a tag had before, if the tag's requirements say so. A withdrawn version stays for the
audit until it is asked for, whatever the setting, and then goes, whatever was made from it.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.index.queries import LogState, VersionRow
from adapterhub.ref import Ref, RefError
from adapterhub.registry import withdrawals
from adapterhub.registry.moves import now
from adapterhub.registry.registry import Registry
from adapterhub.registry.version_lookup import previous_number
from adapterhub.store.ref_log import entries_in_force
from adapterhub.store.store import Entry
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.manifest.keep_rule import KeepRule


def keep(registry: Registry, ref: Ref, rule: KeepRule | None) -> None:
    """Set which versions of a name a gc keeps, besides the tagged ones; None for all."""
    if ref != Ref(ref.name):
        raise RefError(str(ref), "retention is set for a whole name", f"Write {ref.name}")
    registry.row(ref)

    def decide(state: LogState) -> Entry | None:
        # Under the lock, the name may be gone by now.
        registry.row(ref)
        if keeps_all(registry, ref.name) if rule is None else setting(registry, ref.name) == rule:
            return None
        position = (ref.name, state.seq + 1)
        if rule is None:
            return Entry(*position, "keep-all", now(), previous=state.head)
        return Entry(*position, "keep", now(), previous=state.head, keep=rule.last, ttl=rule.ttl)

    registry.move(ref.name, decide)


def chosen_rule(registry: Registry, ref: Ref) -> KeepRule | None:
    """Return which versions a gc keeps of a name, which must exist; None for all."""
    return setting(registry, registry.row(ref).name)


def setting(registry: Registry, name: str) -> KeepRule | None:
    """Return which versions a gc keeps of a name by a choice; None for all, or without one."""
    from adapterhub.manifest.keep_rule import KeepRule  # which most commands do without

    text = queries.marks(registry.index, "keep", name).get("")
    return None if text is None else KeepRule(*map(int, text.split()))


def keeps_all(registry: Registry, name: str) -> bool:
    """Return whether all versions of a name are kept by a choice, which the index does not tell from none."""
    entries, _ = entries_in_force(registry.store.log.entries(name))
    choices = [entry.op for entry in entries if entry.op in ("keep", "keep-all")]
    return choices[-1:] == ["keep-all"]


class _Choices:
    """The names that keep all versions by a choice; a log is read once, and again after another entry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._choices: dict[tuple[str, Digest], bool] = {}  # by name and head of its log

    def keeps_all(self, name: str) -> bool:
        key = (name, queries.name(self._registry.index, name).head)
        if key not in self._choices:
            self._choices[key] = keeps_all(self._registry, name)
        return self._choices[key]


@dataclass(frozen=True)
class DroppedVersions:
    """The versions that a gc drops, and `parents`, which it would drop if nothing that stays was made from them."""

    numbers: dict[str, list[int]]
    parents: list[Ref]

    @property
    def refs(self) -> list[Ref]:
        """The dropped versions, sorted."""
        return [Ref(name, number=number) for name in sorted(self.numbers) for number in self.numbers[name]]


def drop(registry: Registry, rule: KeepRule | None, *, dry_run: bool, withdrawn: bool = False) -> DroppedVersions:
    """Drop the versions that need not be kept.

    Args:
        registry: The registry.
        rule: What is kept of names without a setting, besides the tagged versions; None for all.
        dry_run: Change nothing.
        withdrawn: Drop the withdrawn versions too, except those that a tag still means.
    """
    names = [name.name for name in queries.names(registry.index) if not name.deleted]
    dropped: dict[str, set[int]] = {}
    choices = _Choices(registry)
    has_changed = True
    while has_changed:  # a version can be dropped once its last child has been
        has_changed = False
        for name in names:
            if numbers := _drop(registry, name, rule, dropped, choices, dry_run=dry_run, withdrawn=withdrawn):
                dropped[name] = dropped.get(name, set()).union(numbers)
                has_changed = True
    droppable = {name: _droppable_versions(registry, name, rule, choices) for name in names}
    parents = [
        Ref(name, number=number) for name in names for number in sorted(droppable[name]) if number not in dropped.get(name, ())
    ]
    return DroppedVersions({name: sorted(numbers) for name, numbers in dropped.items()}, parents)


def _drop(
    registry: Registry,
    name: str,
    rule: KeepRule | None,
    dropped: dict[str, set[int]],
    choices: _Choices,
    *,
    dry_run: bool,
    withdrawn: bool,
) -> list[int]:
    """Drop the versions of a name that need not be kept and have no child that stays; return their numbers."""
    numbers: list[int] = []

    def droppable_numbers() -> list[int]:
        droppable = _without_parents(registry, name, _droppable_versions(registry, name, rule, choices), dropped)
        taken_down = _withdrawn_versions(registry, name) - dropped.get(name, set()) if withdrawn else set()
        return sorted(taken_down.union(droppable))

    def decide(state: LogState) -> Entry | None:
        numbers[:] = [] if state.deleted else droppable_numbers()
        if not numbers:
            return None
        return Entry(name, state.seq + 1, "drop", now(), previous=state.head, numbers=tuple(numbers))

    # Looked up before the move, so that a name with nothing to drop takes no lock.
    if dry_run:
        return droppable_numbers()
    if droppable_numbers():
        registry.move(name, decide)
    return numbers


def _droppable_versions(registry: Registry, name: str, rule: KeepRule | None, choices: _Choices) -> dict[int, Digest]:
    """Return the versions of a name that need not be kept for their own sake."""
    choice = setting(registry, name)
    rule = choice or rule
    droppable = droppable_versions(queries.versions(registry.index, name=name), rule) if rule else {}
    if not droppable or (choice is None and choices.keeps_all(name)):
        return {}
    previous, withdrawn = _previous_versions(registry, name), withdrawals.reasons(registry.index, name)
    return {number: digest for number, digest in droppable.items() if number not in previous and digest not in withdrawn}


def _previous_versions(registry: Registry, name: str) -> set[int]:
    """Return the versions to which a rollback would go of the tags whose requirements have them kept."""
    tags = registry.gate.kept_tags() & queries.tags(registry.index, name).keys()
    if not tags:
        return set()
    withdrawn = withdrawals.reasons(registry.index, name)
    usable = {row.number for row in queries.versions(registry.index, name=name) if row.digest not in withdrawn}
    entries, _ = entries_in_force(registry.store.log.entries(name))
    return {previous_number(entries, tag, usable.__contains__) for tag in tags}


def _withdrawn_versions(registry: Registry, name: str) -> set[int]:
    """Return the withdrawn versions of a name that no tag means."""
    withdrawn = withdrawals.reasons(registry.index, name)
    rows = queries.versions(registry.index, name=name) if withdrawn else []
    return {row.number for row in rows if row.digest in withdrawn and not row.tags}


def droppable_versions(rows: Iterable[VersionRow], rule: KeepRule) -> dict[int, Digest]:
    """Return the versions that neither the rule nor a tag keeps; `rows` are sorted newest first."""
    since = time.time() - rule.ttl if rule.ttl else float("inf")
    return {
        row.number: row.digest
        for position, row in enumerate(rows)
        if position >= rule.last and not row.tags and datetime.datetime.fromisoformat(row.time).timestamp() < since
    }


def _without_parents(registry: Registry, name: str, droppable: dict[int, Digest], dropped: dict[str, set[int]]) -> list[int]:
    """Return the numbers in `droppable` whose children, if any, are dropped with them or already in `dropped`."""
    leaving = set(droppable) - dropped.get(name, set())
    children = {number: registry.children(droppable[number]) for number in leaving}

    def is_retained(row: VersionRow) -> bool:
        return row.number not in dropped.get(row.name, ()) and not (row.name == name and row.number in leaving)

    before = None
    # Sparing one version can spare its parents, so repeat until nothing changes.
    while leaving != before:
        before = leaving
        leaving = {number for number in leaving if not any(is_retained(row) for row in children[number])}
    return sorted(leaving)
