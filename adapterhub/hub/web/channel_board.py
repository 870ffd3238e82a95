"""The board of an adapter's channels: what each tag means, since when and why, and what its next version still needs.

A channel is a tag that moves: `latest`, those with requirements (`[promote.TAG]`) and their sources, in the order in which a
version goes through them, then any other tag but version numbers. The decider (`registry.releases.tag_gate`) is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from adapterhub import semver
from adapterhub.digest import Digest
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import measurement
from adapterhub.ref import LATEST
from adapterhub.registry import withdrawals
from adapterhub.registry.version_lookup import previous_number
from adapterhub.store.ref_log import TAG_MOVES, Entry, entries_in_force
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.project.tag_rules import TagRules
    from adapterhub.registry.releases.approvals import Person
    from adapterhub.registry.releases.tag_requirements import Requirement

_MAX_CHANNELS = 30
_OPS = ("approve", "delete", *TAG_MOVES)  # what a board needs of a log, in which much else may be long


@dataclass(frozen=True, slots=True)
class Step:
    """The version that a tag may move to next.

    Attributes:
        row: The version.
        source: The tag that means it.
        requirements: Those of the tag, as the version meets them or not.
        needs_approval: Whether people have to approve it.
        excluded: Accounts whose approval would not count, or was given.
    """

    row: VersionRow
    source: str
    requirements: Sequence[Requirement]
    needs_approval: bool
    excluded: Collection[str]

    @property
    def missing(self) -> int:
        """How many requirements are not met."""
        return sum(not requirement.is_met for requirement in self.requirements)


@dataclass(frozen=True, slots=True)
class Channel:
    """A tag.

    Attributes:
        row: The version that it means; None for a tag that has requirements and means none yet.
        withdrawn: Why that was withdrawn; None if it can be used.
        move: The log entry that pointed the tag at it.
        evaluations: Those of the version.
        approved_by: The people who approved it for this tag.
        previous: The number of the version that a rollback goes to; 0 for none.
        step: What comes next; None for nothing.
    """

    tag: str
    row: VersionRow | None
    withdrawn: str | None
    move: Entry | None
    evaluations: Sequence[Mapping[str, Any]]
    approved_by: Sequence[str]
    previous: int
    is_protected: bool
    step: Step | None


@dataclass(frozen=True, slots=True)
class Board:
    """The channels of an adapter, and how many others there are."""

    channels: Sequence[Channel]
    others: int


class BoardReader:
    """Reads the board of a name from its index, its log, and by asking the decider.

    Args:
        worker: The worker.
        name: The name.
        mover: The account that would move the tags; empty for nobody.
    """

    def __init__(self, worker: Worker, name: str, mover: str) -> None:
        self._registry, self._name, self._mover = worker.registry, name, mover
        index = worker.registry.index
        with index.snapshot():
            last_seq = queries.name(index, name).seq
            rows = queries.versions(index, name=name)
            self._marks = {kind: queries.marks(index, kind, name) for kind in ("evaluate", "protect")}
            self._withdrawn: Mapping[Digest, str] = withdrawals.reasons(index, name)
        self._by_number = {row.number: row for row in rows}
        self._holders = {tag: row for row in rows for tag in row.tags}
        gate = worker.registry.gate
        self._rules = {tag: gate.rules(tag) for tag in gate.gated_tags()}
        self._sources = {tag: _source_of(rules) for tag, rules in self._rules.items()}
        counted = {
            (row.number, tag)
            for tag, source in self._sources.items()
            for row in (self._holders.get(tag), self._holders.get(source))
            if row
        }
        # None that came after what the index has said; and messages of other entries may take gigabytes.
        logged = (
            entry if any((entry.number, tag) in counted for tag in entry.tags) else replace(entry, message="")
            for entry in takewhile(lambda entry: entry.seq <= last_seq, worker.registry.store.log.entries(name))
            if entry.op in _OPS
        )
        self._entries, _ = entries_in_force(logged)

    def read(self) -> Board:
        """Return the board."""
        pipeline = {*self._rules, *self._sources.values()} - {LATEST}
        ordered = sorted(pipeline, key=lambda tag: (depth(tag, self._sources), tag))
        others = [tag for tag in self._holders if tag not in {LATEST, *pipeline} and semver.parse(tag) is None]
        others.sort(key=lambda tag: (-self._holders[tag].number, tag))
        tags = [LATEST, *ordered, *others][:_MAX_CHANNELS]
        return Board([self._channel(tag) for tag in tags], len(self._holders.keys() - set(tags)))

    def _channel(self, tag: str) -> Channel:
        row, rules = self._holders.get(tag), self._rules.get(tag, [])
        moves = [entry for entry in self._entries if entry.op in TAG_MOVES and tag in entry.tags] if row else []
        people = self._people(row, tag, rules) if row and rules else []
        return Channel(
            tag=tag,
            row=row,
            withdrawn=self._withdrawn.get(row.digest) if row else None,
            move=self._complete(moves[-1]) if moves else None,
            evaluations=measurement.version_evaluations(self._marks["evaluate"], row.number) if row else [],
            approved_by=[person.titles[0] for person in people],
            previous=previous_number(moves, tag, self._is_usable) if tag != LATEST else 0,
            is_protected=tag in self._marks["protect"],
            step=self._step(tag, row, rules) if rules else None,
        )

    def _is_usable(self, number: int) -> bool:
        row = self._by_number.get(number)
        return row is not None and row.digest not in self._withdrawn

    def _complete(self, entry: Entry) -> Entry:
        """Return an entry with its message."""
        logged = self._registry.store.log.entry(self._name, entry.seq)
        return logged[0] if logged else entry

    def _step(self, tag: str, current: VersionRow | None, rules: Sequence[TagRules]) -> Step | None:
        source = self._sources[tag]
        row = self._holders.get(source)
        if row is None or row == current or row.digest in self._withdrawn:
            return None
        assessment = self._registry.gate.assess(self._name, row.number, row.digest, tag, mover=self._mover)
        excluded = {account for person in self._people(row, tag, rules) for account in person.accounts}
        if any(table.from_others for table in rules):
            excluded |= {entry.author for entry in self._entries if entry.op == "push" and entry.number == row.number}
        return Step(row, source, assessment.requirements, any(table.approvals for table in rules), excluded)

    def _people(self, row: VersionRow, tag: str, rules: Sequence[TagRules]) -> Sequence[Person]:
        """Return who approved a version for a tag; nobody if the keys that count cannot be read."""
        from adapterhub.registry.releases import approvals  # with the statistics, which most pages do without

        subject = approvals.Subject(self._name, row.number, row.digest, tag)
        keys = list(dict.fromkeys(key for table in rules for key in table.approvers))
        try:
            return approvals.count(self._entries, subject, keys).people
        except AdapterhubError:  # which the requirement says, too
            return []


def _source_of(rules: Iterable[TagRules]) -> str:
    """Return the tag from which versions come to another: the newest push if its requirements name none."""
    return next((table.source for table in rules if table.source), LATEST)


def depth(tag: str, sources: Mapping[str, str]) -> int:
    """Return how many tags a version has before it gets to one; requirements may also lead in a circle."""
    passed: list[str] = []
    while tag in sources and tag not in passed:
        passed.append(tag)
        tag = sources[tag]
    return len(passed)
