"""The longer rules of a policy about what an adapter.json records: each compares a manifest with what is allowed.

A new rule begins in `settings_file`, with its key, and in `policy`, where the short ones are. A rule gives a `RuleCheck`: what
the version has, and what is wrong with that. `adapterhub/manifest/licensing.py` compares licenses.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from adapterhub.manifest import licensing
from adapterhub.manifest.package_files import shorten_names
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.manifest.measurement import Evaluation

BASE, PARENTS, DATA = PARTS = ("base", "parents", "data")
"""The parts of an adapter whose licenses a policy can restrict too."""
OWNER = "owner"
"""The recorder of what a push declares, as in `manifest.document`, which is slow to load."""
ACCOUNT = "account:"
"""The beginning of the recorder of what an account sends to a hub."""
_DAY = 86400  # seconds
_MAX_ANCESTORS = 1000


@dataclass(frozen=True, slots=True)
class RuleCheck:
    """One rule beside a version.

    Attributes:
        file: The file that has the rule.
        rule: Its key there.
        value: What the version has, for people.
        problem: Why that is not allowed; empty if it is.
    """

    file: str
    rule: str
    value: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The smallest and the largest allowed value of a metric, or None, and who may have recorded it, empty for anybody."""

    metric: str
    min: float | None = None
    max: float | None = None
    recorders: tuple[str, ...] = ()

    def violation(self, value: float | None) -> str:
        """Return what is wrong with a value, or with None for an unmeasured one; empty if it is allowed."""
        if value is None:
            return "was not measured"
        # Written as `not >=`, so that NaN is out of bounds too.
        if self.min is not None and not value >= self.min:
            return f"{value:g} is below {self.min:g}"
        return f"{value:g} is over {self.max:g}" if self.max is not None and not value <= self.max else ""

    def recorder_violation(self, recorder: str) -> str:
        """Return what is wrong with who recorded a value; empty if nothing is."""
        is_allowed = not self.recorders or recorder in self.recorders
        return "" if is_allowed else f"was recorded by {recorder}, not {' or '.join(self.recorders)}"


@dataclass(frozen=True, slots=True)
class AllowedBase:
    """A base model that is allowed, by its name.

    Attributes:
        repo: Its name on a hub.
        revisions: The allowed revisions; empty for any.
        weights: The digests of its weight files, which a training must have read; empty for any.
        license: The license of the model, which adapter.json does not have.
    """

    repo: str
    revisions: tuple[str, ...] = ()
    weights: tuple[Digest, ...] = ()
    license: str = ""

    def violation(self, revision: str | None, weights: Collection[Digest]) -> str:
        """Return what is wrong with an adapter's base of this name; empty if nothing is."""
        if self.revisions and revision not in self.revisions:
            return f"{self.repo} in the revision {revision or 'that is not recorded'}, which is not allowed"
        if self.weights and not weights:
            return f"{self.repo}, and no digests of its weights are recorded"
        if self.weights and not set(self.weights).issuperset(weights):
            return f"{self.repo} with other weights than are allowed"
        return ""


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One value of a metric, the digests of the data it was measured on, and who recorded it."""

    value: float
    data: Collection[Digest]
    recorder: str


@dataclass(frozen=True, slots=True)
class EvaluationRule:
    """A result that an adapter must have, of allowed data and by an allowed recorder.

    Attributes:
        bounds: The metric, its limits, and who may have recorded it.
        data: The digests of data sets, one of which it was measured on; empty for any.
    """

    bounds: Bounds
    data: tuple[Digest, ...] = ()

    @property
    def rule(self) -> str:
        """The key of the rule in the file."""
        return f"evaluations.{self.bounds.metric}"

    def violation(self, value: float | None, data: Collection[Digest]) -> str:
        """Return what is wrong with a result on data with these digests; empty if nothing is."""
        if reason := self.bounds.violation(value):
            return reason
        if self.data and not (data and set(self.data).issuperset(data)):
            return "was measured on other data than is allowed" if data else "does not say which data it was measured on"
        return ""

    def results(self, manifest: AdapterManifest, recorded: Iterable[Evaluation]) -> list[MetricResult]:
        """Return the results of the metric: those that adapter.json declares, and those of evaluations in a log.

        Whoever pushes a version can write any recorder into its adapter.json, so a declared result is its owner's.
        """
        metric = self.bounds.metric
        declared = [result for result in manifest.evaluations or () if result.metric == metric]
        return [
            *(MetricResult(result.value, [result.digest] if result.digest else [], OWNER) for result in declared),
            *(
                MetricResult(
                    evaluation.metrics[metric], [str(file.get("digest")) for file in evaluation.data], evaluation.recorder
                )
                for evaluation in recorded
                if metric in evaluation.metrics
            ),
        ]

    def violation_by(self, result: MetricResult) -> str:
        """Return what is wrong with a result of this metric; empty if nothing is."""
        return self.bounds.recorder_violation(result.recorder) or self.violation(result.value, result.data)


ReadParent = Callable[["Digest"], "AdapterManifest | None"]
"""Returns the adapter.json of a version by the digest of its manifest; None for one that is not at hand."""


def no_parent(_digest: Digest) -> None:
    """Return None: no other version is at hand."""


@dataclass(frozen=True, slots=True)
class Measurements:
    """What was measured of a version, at its push or later.

    Attributes:
        values: By the names of metrics that a search uses.
        recorder_of: Returns who recorded a metric; empty for one of adapter.json.
        evaluations: Returns the evaluations in logs.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    recorder_of: Callable[[str], str] = lambda _: OWNER
    evaluations: Callable[[], Sequence[Evaluation]] = tuple


NO_MEASUREMENTS = Measurements()


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """What a policy asks about a version besides its adapter.json.

    Attributes:
        size: Bytes of its files, without adapter.json; None for the sum of those in the manifest.
        measurements: What was measured besides the metrics of its training.
        read_parent: Returns the adapter.json of a parent by its digest, None for one that is not at hand.
        find_problem: Returns the first problem that a scan of its files finds, empty for none; None if they are not at hand.
        now: The time, in UTC; None for that of the clock.
    """

    size: int | None = None
    measurements: Measurements = NO_MEASUREMENTS
    read_parent: ReadParent = no_parent
    find_problem: Callable[[], str] | None = None
    now: datetime.datetime | None = None


NO_FACTS = VersionFacts()


def base_violation(repo: str | None, revision: str | None, weights: Collection[Digest], allowed: Sequence[AllowedBase]) -> str:
    """Return what is wrong with a base among those that are allowed by name; empty if nothing is."""
    for base in allowed:
        if base.repo == repo:
            return base.violation(revision, weights)
    return f"{repo or 'without a name'}, which is not one of {shorten_names([base.repo for base in allowed])}"


def trained_weights(manifest: AdapterManifest) -> list[Digest]:
    """Return the digests of the weight files of the base that a training recorded."""
    return [file.digest for file in (manifest.training.weights if manifest.training else None) or ()]


# ---- licenses and data, of an adapter and of those that it was made from


def ancestors(manifest: AdapterManifest, read_parent: ReadParent) -> Iterator[tuple[str, AdapterManifest | None]]:
    """Yield the name and the adapter.json of each adapter that one was made from, directly or not, each once.

    The adapter.json of one that is not at hand is None, and so is that of those beyond the first thousand.
    """
    visited: set[Digest] = set()
    pending = deque(manifest.parents)
    while pending:
        parent = pending.popleft()
        if parent.digest not in visited:
            visited.add(parent.digest)
            # No honest adapter has so many ancestors, but a hostile manifest may.
            parent_manifest = read_parent(parent.digest) if len(visited) <= _MAX_ANCESTORS else None
            yield parent.ref or parent.digest[:19], parent_manifest
            pending.extend(parent_manifest.parents if parent_manifest else ())


def origin_of(manifest: AdapterManifest, read_parent: ReadParent) -> AdapterManifest:
    """Return the adapter.json that has the record of the training: that of the parent, if an adapter was converted."""
    is_converted = manifest.recipe is not None and manifest.recipe.kind == "convert" and bool(manifest.parents)
    return (read_parent(manifest.parents[0].digest) if is_converted else None) or manifest


def part_licenses(
    manifest: AdapterManifest, parts: Collection[str], bases: Sequence[AllowedBase], facts: VersionFacts
) -> Iterator[tuple[str, str | None]]:
    """Yield the name and the license of each part of an adapter; None for a license that nobody recorded."""
    if BASE in parts:
        repo = manifest.base.repo
        license_ = next((base.license for base in bases if base.repo == repo), "")
        yield f"base {repo or 'without a name'}", license_ or None
    if DATA in parts:
        yield from _data_licenses(manifest)
    for name, parent in ancestors(manifest, facts.read_parent):
        if PARENTS in parts:
            yield f"parent {name}", parent.license if parent else None
        if DATA in parts and parent is None:
            yield f"data of {name}", None
        elif DATA in parts and parent is not None:
            yield from _data_licenses(parent)


def _data_licenses(manifest: AdapterManifest) -> Iterator[tuple[str, str | None]]:
    for dataset in (manifest.training.data if manifest.training else None) or ():
        yield f"data {dataset.name or dataset.path or dataset.digest}", dataset.license
    for source in manifest.data_sources or ():
        yield f"data {source.name or source.address or source.kind}", source.license


def license_violation(name: str, license_: str | None, allowed: Sequence[str]) -> str:
    """Return what is wrong with the license of a part; empty if nothing is."""
    return "" if licensing.permits(license_, allowed) else f"the license of {name} is {license_ or 'not recorded'}"


def data_violations(manifest: AdapterManifest, allowed: Sequence[str], facts: VersionFacts) -> Iterator[tuple[str, str]]:
    """Yield each data set that an adapter or one of its ancestors was trained on, with what is wrong; empty if nothing is.

    Data is allowed by its digest, or by a pattern of its name or address. A path is no name: everybody chooses their own.
    """
    if not manifest.parents or _has_data(manifest):
        yield from _own_data_violations("the adapter", manifest, allowed)
    for name, parent in ancestors(manifest, facts.read_parent):
        if parent is None:
            yield f"parent {name}", f"the data of its parent {name} is not at hand"
        elif not parent.parents or _has_data(parent):
            yield from _own_data_violations(name, parent, allowed)


def _has_data(manifest: AdapterManifest) -> bool:
    return bool(manifest.data_sources or (manifest.training and manifest.training.data))


def _own_data_violations(name: str, manifest: AdapterManifest, allowed: Sequence[str]) -> Iterator[tuple[str, str]]:
    for dataset in (manifest.training.data if manifest.training else None) or ():
        yield _data_violation(dataset.name or dataset.path, dataset.digest, (dataset.name,), allowed)
    for source in manifest.data_sources or ():
        yield _data_violation(source.name or source.address or source.kind, None, (source.name, source.address), allowed)
    if not _has_data(manifest):
        yield "not recorded", f"no data of {name} is recorded"


def _data_violation(
    title: str | None, digest: Digest | None, names: Collection[str | None], allowed: Sequence[str]
) -> tuple[str, str]:
    title = title or "without a name"
    # A name in the form of a digest does not stand for one: everybody chooses their own.
    values = [digest, *(name for name in names if name and not name.startswith("sha256:"))]
    is_allowed = any(fnmatchcase(value, pattern) for value in values if value for pattern in allowed)
    return title, "" if is_allowed else f"{title} is not one of the data that is allowed"


# ---- time


def expiry(manifest: AdapterManifest, read_parent: ReadParent, now: datetime.datetime) -> tuple[str, str]:
    """Return the first day on which an adapter or one of its ancestors expires, and what is wrong with them."""
    days, problems = [manifest.expires], []
    for name, parent in ancestors(manifest, read_parent):
        days.append(parent.expires if parent else None)
        problems += [] if parent else [f"its parent {name} is not at hand, and may have expired"]
    # Each day for itself: ISO 8601 has forms that do not sort as texts.
    recorded_days = sorted(filter(None, days))
    expired = [problem for day in recorded_days if (problem := expiry_violation(day, now))]
    return recorded_days[0] if recorded_days else "does not expire", next(iter([*expired, *problems]), "")


def expiry_violation(expires: str, now: datetime.datetime) -> str:
    """Return what is wrong with the day on which an adapter expires; empty if nothing is."""
    day = parse_time(expires)
    return f"it expired on {expires[:10]}" if day is None or day <= now else ""


def age_violation(date: str | None, max_age: int, now: datetime.datetime) -> tuple[str, str]:
    """Return the age of an adapter in words, and what is wrong with it.

    Args:
        date: The end of its training, or the day of its release.
        max_age: In seconds.
        now: The time.
    """
    time = parse_time(date or "")
    if time is None:
        return "not recorded", "neither the end of its training nor the day of its release is recorded"
    age = (now - time).total_seconds()
    if age < -_DAY:  # a clock may be a little ahead; a date to come would never grow old
        return f"made on {time:%Y-%m-%d}", f"was made on {time:%Y-%m-%d}, which is yet to come"
    text = f"{max(age, 0) / _DAY:.0f} days"
    return text, f"{text} are over {max_age / _DAY:g}" if age > max_age else ""


def parse_time(text: str) -> datetime.datetime | None:
    """Return a time or a day in ISO 8601, in UTC unless it has an offset; None for a text of another form."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
