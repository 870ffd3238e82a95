"""Decide whether a version meets the requirements of a tag (`project.tag_rules`), each with its value and its evidence.

All evidence is in the log of the name, with the version's signatures, or follows from its bytes. What cannot be read is not
met. `tag_gate` asks for every move of a tag, no matter who makes it.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

from adapterhub.digest import Digest
from adapterhub.evidence import paired_tests, sampled_bounds
from adapterhub.manifest import measurement, oci_manifest
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.project.tag_rules import UNMET, TagRules
from adapterhub.registry import signature_policy
from adapterhub.registry.ledger import StartOverError
from adapterhub.registry.version_facts import first_stored_problem
from adapterhub.store.ref_log import TAG_MOVES, Entry
from adapterhub.store.store import Store
from adapterhub_converters.errors import AdapterhubError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import approvals, metric_gates

_METRICS = {**metric_gates.DATA_GATES, **metric_gates.TEST_GATES}
_MAX_FINDINGS = 10_000  # of scans that are remembered
_NO_TESTS: tuple[Evaluation | None, str] = (None, "")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One requirement of a tag, as a version meets it or not.

    Attributes:
        rule: Its key below `require`, such as `approvals`.
        needed: What is required.
        value: What was there.
        is_met: Whether that is enough.
        evidence: Where that is; empty for nothing.
        file: The file that has the requirement.
    """

    rule: str
    needed: str
    value: str
    is_met: bool
    evidence: str
    file: str

    @property
    def problem(self) -> str:
        """What is missing, in a phrase."""
        return f"{self.rule}: {self.value} (needed: {self.needed})"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that a tag is to be moved to.

    Attributes:
        number: Its number; of a push that is being decided, the next one.
        entries: The log of its name, as far as it is in force, with such a push.
        mover: The user who moves the tag; empty if unknown.
        is_moved_by_program: Whether that is a program, such as a CI job, which anybody may have started.
        current: The number that the tag has now; 0 for none.
        reference: The number that it has, or had last if it was removed; 0 for none.
    """

    name: str
    number: int
    digest: Digest
    tag: str
    entries: Sequence[Entry]
    mover: str
    current: int = 0
    reference: int = 0
    is_moved_by_program: bool = False

    @property
    def push(self) -> Entry | None:
        """The entry that pushed the version."""
        return next((entry for entry in self.entries if entry.op == "push" and entry.number == self.number), None)

    def evaluation(self, name: str, number: int) -> tuple[Evaluation | None, str]:
        """Return the last evaluation of a version under a name, and its place in the log; None without one."""
        last = _NO_TESTS
        for entry in self.entries:
            if entry.op == "evaluate" and entry.number == number and (measured := measurement.parse(entry.message)):
                last = (measured, place_of(entry)) if measured.name == name else last
        return last


class VersionEvidence:
    """What is known of versions besides the logs.

    Args:
        store: The store with their files.
        read_signatures: Returns the signatures of a version by name and digest, none of them verified.
        read_authors: Returns who has made a version, by name and digest, besides the user who has pushed it.
        can_start_over: Returns whether files are to be scanned later, without the lock that is held now (`StartOverError`).
        clock: The time in seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        read_signatures: Callable[[str, Digest], Sequence[bytes]],
        read_authors: Callable[[str, Digest], Collection[str]],
        can_start_over: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.clock, self._store, self._read_signatures, self._read_authors = clock, store, read_signatures, read_authors
        self._can_start_over = can_start_over
        self._findings: dict[Digest, str] = {}

    def manifest(self, digest: Digest) -> Manifest:
        """Return the manifest of a version."""
        return oci_manifest.parse(self._store.read_document(digest), digest)

    def signatures(self, candidate: Candidate) -> Sequence[bytes]:
        """Return the signatures of a version."""
        return self._read_signatures(candidate.name, candidate.digest)

    def authors(self, candidate: Candidate) -> Collection[str]:
        """Return who has made a version, besides the user who has pushed it."""
        return self._read_authors(candidate.name, candidate.digest)

    def finding(self, digest: Digest) -> str:
        """Return the first problem that a scan of a version's files finds; empty for none. The bytes are read once.

        Raises:
            StartOverError: They are to be read without the lock.
        """
        if digest not in self._findings:
            if self._can_start_over():
                raise StartOverError(partial(self.finding, digest))
            if len(self._findings) >= _MAX_FINDINGS:
                self._findings.clear()
            self._findings[digest] = first_stored_problem(self._store, self.manifest(digest))
        return self._findings[digest]


@dataclass(frozen=True, slots=True)
class Assessment:
    """A version beside all requirements of a tag."""

    candidate: Candidate
    requirements: tuple[Requirement, ...]

    @property
    def missing(self) -> list[Requirement]:
        """The requirements that are not met."""
        return [requirement for requirement in self.requirements if not requirement.is_met]

    def check(self, *, is_stored: bool = True) -> None:
        """Raise RefusedError, which names all that is missing, unless every requirement is met.

        The hint is about the newest version of the name where this one `is_stored` nowhere, since its push is refused.
        """
        if missing := [requirement.problem for requirement in self.missing]:
            name, tag = self.candidate.name, self.candidate.tag
            ref = f"{name}:v{self.candidate.number}" if is_stored else name
            problem = f"v{self.candidate.number} does not meet its requirements: {'; '.join(missing)}"
            raise RefusedError(f"{name}:{tag}", problem, "Look at each of them", missing, code=UNMET, ref=ref, tag=tag)


def assess(candidate: Candidate, rules: Sequence[TagRules], evidence: VersionEvidence) -> Assessment:
    """Compare a version with the requirements on a tag of every file that has some."""
    return Assessment(
        candidate, tuple(requirement for table in rules for requirement in _requirements(candidate, table, evidence))
    )


def assess_new(candidate: Candidate, rules: Sequence[TagRules], evidence: VersionEvidence) -> Assessment:
    """Compare a version that is not stored yet with the requirements on what the log says of it."""
    return assess(candidate, [replace(table, attestations=(), signers=(), scan="") for table in rules], evidence)


def _requirements(candidate: Candidate, rules: TagRules, evidence: VersionEvidence) -> Iterator[Requirement]:
    def result(rule: str, needed: str, decide: Callable[[], tuple[bool, str, str]]) -> Requirement:
        try:
            is_met, value, place = decide()
        except (AdapterhubError, ImportError) as error:
            reason = error.what if isinstance(error, AdapterhubError) else str(error)
            is_met, value, place = False, f"cannot be read: {reason}", ""
        return Requirement(rule, needed, value, is_met, place, rules.file)

    if rules.source:
        yield result("from", rules.source, partial(_was_tagged, candidate, rules.source))
    for name, gate in rules.gates:
        yield result(f"eval.{name}", gate, partial(_gate, candidate, name, gate, rules))
    for kind in rules.attestations:
        yield result(f"attestations.{kind}", "by a signer", partial(_attested, candidate, kind, rules, evidence))
    if rules.signers:
        yield result("signers", "a signature", partial(_signed, candidate, rules, evidence))
    if rules.approvals:
        needed = f"{rules.approvals}{' others' if rules.from_others else ''}"
        yield result("approvals", needed, partial(_approved, candidate, rules, evidence))
    if rules.scan:
        yield result("scan", rules.scan, partial(_scanned, candidate, evidence))
    if rules.age:
        yield result("age", _duration(rules.age), partial(_aged, candidate, rules.age, evidence))


def place_of(entry: Entry) -> str:
    """Return where an entry is, for people."""
    return f"log entry {entry.seq}"


def _was_tagged(candidate: Candidate, source: str) -> tuple[bool, str, str]:
    moves = [entry for entry in candidate.entries if entry.op in TAG_MOVES and source in entry.tags]
    place = next((place_of(entry) for entry in reversed(moves) if entry.number == candidate.number), "")
    return bool(place), f"is or was {source}" if place else f"was never {source}", place


def _gate(candidate: Candidate, name: str, text: str, rules: TagRules) -> tuple[bool, str, str]:
    measured, place = candidate.evaluation(name, candidate.number)
    claim = paired_tests.parse_claim(text)
    gate = None if claim else metric_gates.parse_gate(text, rules.where(f"require.eval.{name}"), None)
    if measured is None:
        return False, "was not measured", ""
    if claim is not None:
        return _compare(candidate, measured, claim, place)
    assert gate is not None  # noqa: S101 - as there is no claim
    metric = _METRICS.get(gate.metric.replace(" ", "").lower(), gate.metric)
    if metric not in measured.metrics:
        return False, f"{metric} was not measured", place
    bounds = [(bound.operator, bound.value) for bound in gate.bounds]
    is_met, value = sampled_bounds.verdict(sampled_bounds.sampled_value(measured.metrics, metric), bounds)
    return is_met, value, place


def _compare(candidate: Candidate, measured: Evaluation, claim: paired_tests.Claim, place: str) -> tuple[bool, str, str]:
    """Compare the recorded tests of a version with those of the version that the tag means, test by test.

    A tag that was removed is compared with what it meant last: otherwise, removing it would be a way around.
    """
    number, tense = candidate.reference, "means now" if candidate.current else "meant last"
    if not number:
        return True, f"{candidate.tag} means no version yet", place
    if number == candidate.number:
        return True, f"is what {candidate.tag} {tense}", place
    reference, reference_place = candidate.evaluation(measured.name, number)
    if reference is None:
        return False, f"v{number}, which it {tense}, was not measured", place
    if not measured.has_same_tests(reference):
        return False, f"v{number} was measured on other tests", f"{place}, {reference_place}"
    is_met, value = claim.verdict(paired_tests.compare_rates(measured.cases, reference.cases))
    return is_met, value, f"{place}, {reference_place}"


def _attested(candidate: Candidate, kind: str, rules: TagRules, evidence: VersionEvidence) -> tuple[bool, str, str]:
    from adapterhub.trust import attestation
    from adapterhub.trust.keys import read_trusted  # needs cryptography

    keys, location = read_trusted(rules.signers), f"{candidate.name}:v{candidate.number}"
    try:
        attested = attestation.find_accepted(evidence.signatures(candidate), kind, keys, candidate.digest, location)
    except AdapterhubError as error:
        return False, error.what, ""
    return True, f"by {attested.signer.title}", "a signature of the version"


def _signed(candidate: Candidate, rules: TagRules, evidence: VersionEvidence) -> tuple[bool, str, str]:
    from adapterhub.trust import bundle
    from adapterhub.trust.keys import read_trusted  # needs cryptography

    keys, files = read_trusted(rules.signers), signature_policy.signed_files(evidence.manifest(candidate.digest))
    location = f"{candidate.name}:v{candidate.number}"
    try:
        signatures = evidence.signatures(candidate)
        signed = bundle.find_accepted(signatures, keys, files, candidate.name, location, digest=candidate.digest)
    except AdapterhubError as error:
        return False, error.what, ""
    return True, f"by {signed.signer.title}", "a signature of the version"


def _approved(candidate: Candidate, rules: TagRules, evidence: VersionEvidence) -> tuple[bool, str, str]:
    count = approvals.count(
        candidate.entries,
        approvals.Subject(candidate.name, candidate.number, candidate.digest, candidate.tag),
        rules.approvers,
    )
    if rules.from_others and count.total:
        push = candidate.push
        if push is None or not push.author:
            return False, "the log does not say who pushed it", ""
        files = signature_policy.signed_files(evidence.manifest(candidate.digest))
        signatures = evidence.signatures(candidate)
        count = count.without(
            {push.author, candidate.mover, *evidence.authors(candidate)},
            approvals.file_signers(signatures, files, rules.approvers, candidate.name),
        )
        if candidate.is_moved_by_program:
            count = count.without_unknown_mover()
    return count.total >= rules.approvals, count.text(rules.approvals), count.places


def _scanned(candidate: Candidate, evidence: VersionEvidence) -> tuple[bool, str, str]:
    finding = evidence.finding(candidate.digest)
    return not finding, finding or "clean", "scanned now"


def _aged(candidate: Candidate, seconds: int, evidence: VersionEvidence) -> tuple[bool, str, str]:
    push = candidate.push
    if push is None:
        return False, "the log does not say when it was pushed", ""
    try:
        pushed_at = datetime.datetime.fromisoformat(push.time).timestamp()
    except ValueError as error:
        raise UsageError(place_of(push), f"has no time: {push.time[:40]!r}") from error
    age = evidence.clock() - pushed_at
    value = f"pushed {_duration(int(age))} ago" if age >= 0 else "pushed in the future, by the clock of this machine"
    return age >= seconds, value, place_of(push)


def _duration(seconds: int) -> str:
    """Return a duration in its largest unit, rounded down."""
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= unit:
            return f"{seconds // unit}{letter}"
    return f"{seconds}s"
