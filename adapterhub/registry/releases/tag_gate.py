"""The gate before every move of a tag: the decider of tags that have requirements, and no tag to a withdrawn version.

`Ledger.move`, through which all entries of a name's log go, asks it under the lock: there is no other way to a tag.
That a tag is protected is found before, by `registry.moves`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from adapterhub.digest import Digest
from adapterhub.index import queries
from adapterhub.project.tag_rules import UNMET
from adapterhub.registry import signature_policy, withdrawals
from adapterhub.registry.ledger import Ledger
from adapterhub.registry.moves import now
from adapterhub.store.ref_log import TAG_MOVES, Entry, entries_in_force
from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from adapterhub.project.policy import Policy
    from adapterhub.project.tag_rules import TagRules

    from .tag_requirements import Assessment, VersionEvidence

_MOVES = ("push", "tag", "rollback")


class TagGate:
    """The gate of one open registry.

    Args:
        ledger: Its logs and index.
        registry_rules: Returns the policy in the registry's own folder; None for none.

    Attributes:
        rules_of_caller: Returns the policy of the caller that opened the registry, such as that of a project; None for none.
        read_signatures: Returns the signatures of a version by name and digest, wherever the registry's owner keeps them.
        read_authors: Returns who has made a version, by name and digest, besides the user who has pushed it.
        is_moved_by_program: Returns whether who moves tags now is a program, such as a CI job, and not a person.
    """

    def __init__(self, ledger: Ledger, registry_rules: Callable[[], Policy | None]) -> None:
        self._ledger, self._registry_rules = ledger, registry_rules
        self.rules_of_caller: Callable[[], Policy | None] = lambda: None
        self.read_signatures: Callable[[str, Digest], Sequence[bytes]] = self._stored_signatures
        self.read_authors: Callable[[str, Digest], Collection[str]] = lambda _name, _digest: ()
        self.is_moved_by_program: Callable[[], bool] = lambda: False

    def _stored_signatures(self, _name: str, digest: Digest) -> Sequence[bytes]:
        return self._ledger.store.signatures.read(digest, signature_policy.LIMIT)

    @cached_property
    def evidence(self) -> VersionEvidence:
        """What is known of versions besides the logs."""
        from .tag_requirements import VersionEvidence  # with the statistics, which most commands do without

        # Looked up when it is called, as a hub sets it after the registry is open.
        def read_signatures(name: str, digest: Digest) -> Sequence[bytes]:
            return self.read_signatures(name, digest)

        def read_authors(name: str, digest: Digest) -> Collection[str]:
            return self.read_authors(name, digest)

        def can_start_over() -> bool:
            return self._ledger.can_start_over

        return VersionEvidence(self._ledger.store, read_signatures, read_authors, can_start_over)

    def policies(self) -> list[Policy]:
        """Return the policies in force: the registry's, and that of the caller that opened it."""
        # Each once: a project's policy may be the registry's own file.
        policies = (self._registry_rules(), self.rules_of_caller())
        return list(dict.fromkeys(policy for policy in policies if policy is not None))

    def rules(self, tag: str) -> list[TagRules]:
        """Return the requirements on a tag: the registry's, and those of the caller that opened it."""
        return list(dict.fromkeys(rules for policy in self.policies() for rules in policy.tag_rules(tag)))

    def gated_tags(self) -> set[str]:
        """Return the tags that have requirements."""
        return set().union(*(policy.gated_tags() for policy in self.policies()))

    def kept_tags(self) -> set[str]:
        """Return the tags whose previous version a gc keeps."""
        return {tag for tag in self.gated_tags() if any(rules.keep_previous for rules in self.rules(tag))}

    def position(self, name: str, tag: str) -> tuple[int, int]:
        """Return the number that a tag has now, 0 for none, and how many entries the log of its name has."""
        index = self._ledger.index
        with index.snapshot():
            return queries.tags(index, name).get(tag, 0), queries.name(index, name).seq

    def assess(
        self,
        name: str,
        number: int,
        digest: Digest,
        tag: str,
        *,
        mover: str,
        pending: Entry | None = None,
        position: tuple[int, int] | None = None,
    ) -> Assessment:
        """Compare a version with the requirements on a tag.

        Args:
            name: The name.
            number: The number of the version.
            digest: Its digest.
            tag: The tag.
            mover: The user who moves it.
            pending: The entry with which the move would be made, if that also pushes the version.
            position: The `position` of the tag at which the version was looked up; None for now.
        """
        from . import tag_requirements  # with the statistics, which most commands do without

        rules = self.rules(tag)
        current, last = position or self.position(name, tag)
        reference = current or (self._last_number(name, tag, last) if rules else 0)

        def is_evidence(entry: Entry) -> bool:
            if entry.op == "approve":
                return entry.number == number and tag in entry.tags
            return entry.op == "evaluate" and entry.number in (number, reference)

        entries = self._entries(name, last, is_evidence) if rules else []
        if pending is not None and pending.op == "push":
            entries = [*entries, pending]
        by_program = bool(rules) and self.is_moved_by_program()
        candidate = tag_requirements.Candidate(name, number, digest, tag, entries, mover, current, reference, by_program)
        return tag_requirements.assess(candidate, rules, self.evidence)

    def _entries(self, name: str, last: int, is_evidence: Callable[[Entry], bool]) -> Sequence[Entry]:
        """Return the first `last` entries in force, with the messages of evidence alone: those of all may take gigabytes."""
        logged = (
            entry if is_evidence(entry) else replace(entry, message="")
            for entry in self._ledger.store.log.entries(name)
            if entry.seq <= last
        )
        return entries_in_force(logged)[0]

    def _last_number(self, name: str, tag: str, last: int) -> int:
        """Return the number of the version that a tag meant last, before it was removed; 0 if it never meant one."""
        entries = reversed(self._entries(name, last, lambda _: False))
        return next((entry.number for entry in entries if entry.op in TAG_MOVES and tag in entry.tags), 0)

    def check(self, entry: Entry) -> None:
        """Raise RefusedError for an entry that moves a tag to a version that does not meet its requirements, or is withdrawn.

        A rollback goes back to a version that the tag had, and was decided about then.
        """
        if entry.op not in _MOVES:
            return
        withdrawals.check(self._ledger.index, entry.name, entry.number, entry.digest)
        for tag in entry.tags if entry.op != "rollback" else ():
            if self.rules(tag):
                assessment = self.assess(entry.name, entry.number, entry.digest, tag, mover=entry.author, pending=entry)
                assessment.check(is_stored=entry.op != "push")

    def check_new(self, name: str, tags: Collection[str], find_digest: Callable[[], Digest]) -> None:
        """Check the tags of a push before its files are stored, as far as the log decides: it says nothing of a new version.

        Args:
            name: The name.
            tags: The tags that are to move.
            find_digest: Returns the digest of the version, called where a new one would be refused.

        Raises:
            RefusedError: The version is new, and does not meet the requirements of a tag.
        """
        if not any(map(self.rules, tags)):
            return
        from . import tag_requirements  # with the statistics, which most commands do without

        state = self._ledger.current(name)
        entry = Entry(name, state.seq + 1, "push", now(), number=state.number + 1, tags=tuple(tags), author=self._ledger.author)
        for tag in tags:
            candidate = tag_requirements.Candidate(name, entry.number, "", tag, [entry], entry.author)
            assessment = tag_requirements.assess_new(candidate, self.rules(tag), self.evidence)
            if assessment.missing and not queries.versions(self._ledger.index, name=name, digest=find_digest()):
                assessment.check(is_stored=False)

    def check_name(self, name: str, tag: str, is_content_of: Callable[[Digest], bool]) -> None:
        """Check a name beside the registry's tags, such as a branch that a hub keeps, which is about to lead to some content.

        `is_content_of` returns whether that is the version with a digest.

        Raises:
            RefusedError: The tag of this name has requirements, and does not mean this content.
        """
        number = queries.tags(self._ledger.index, name).get(tag, 0)
        rows = queries.versions(self._ledger.index, name=name, number=number) if number else []
        if not (rows and is_content_of(rows[0].digest)):
            problem = "has requirements, and leads only to the version that was promoted to it"
            raise RefusedError(f"{name}:{tag}", problem, "Promote a version", code=UNMET, ref=name, tag=tag)
