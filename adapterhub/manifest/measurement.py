"""Evaluations of an adapter on held-out data, each as one line of text that a log can hold and an index can read.

A version and its adapter.json are immutable; an evaluation is added to the version later, like a deprecation, and may be
repeated with other data. A search finds its numbers under `<name>_<metric>`: `eval_perplexity` by default.
`registry.measurement_log` records evaluations.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from adapterhub_converters import safe_regex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

DEFAULT = "eval"
REPORTED = "reported"
"""The name of the metrics that a push reports, as another program measured them."""
MAX_METRICS = 100
"""Metrics of an evaluation."""
_NAME = safe_regex.Pattern(r"[a-z][a-z0-9_-]{0,39}")
_METRIC = safe_regex.Pattern(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")
_MAX_ACCOUNT = 200  # characters
MAX_TEXT = 100_000
"""Characters of an evaluation in a log."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        name: A later evaluation with the same name replaces it.
        metrics: Name to value.
        data: Path and digest of each data file.
        base: How the base was loaded: `quantize`, `dtype`, and the digests of its `weights`; or which program measured.
        cases: The pass rate of each test by name, where tests were run.
        account: The account that sent it to a hub, which measured nothing itself; empty where it was recorded without a hub.
    """

    name: str
    metrics: Mapping[str, float]
    data: tuple[Mapping[str, Any], ...] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    cases: Mapping[str, float] = field(default_factory=dict)
    account: str = ""

    def dump(self) -> str:
        """Return the text for a log."""
        data, cases = [dict(item) for item in self.data], {"cases": dict(self.cases)} if self.cases else {}
        account = {"account": self.account} if self.account else {}
        document: dict[str, Any] = {"name": self.name, "metrics": dict(self.metrics), "data": data, **cases, **account}
        # Always in the same form: an evaluation with the same text is not recorded twice.
        return json.dumps({**document, "base": dict(self.base)}, sort_keys=True, allow_nan=False)

    def document(self) -> dict[str, Any]:
        """Return the evaluation as JSON."""
        return json_file.parse_object(self.dump(), self.name)

    def has_same_tests(self, other: Evaluation) -> bool:
        """Return whether both ran the same tests, so that their pass rates can be compared test by test."""
        data, other_data = ([file.get("digest") for file in evaluation.data] for evaluation in (self, other))
        return bool(self.cases) and self.cases.keys() == other.cases.keys() and data == other_data

    @property
    def recorder(self) -> str:
        """The source of the numbers: at a hub `account:NAME`, whatever tool that names; else the tool, owner or adapterhub.

        A tool is that of imported results; `owner` is of reported metrics.
        """
        if self.account:
            return f"account:{self.account}"
        tool, version = self.base.get("tool"), self.base.get("version")
        if isinstance(tool, str) and tool:
            return f"{tool} {version}"[:64] if isinstance(version, str) and version else tool[:64]
        return "owner" if self.name == REPORTED else "adapterhub"

    @property
    def searchable_metrics(self) -> dict[str, float]:
        """Metrics under the names that a search uses."""
        return {f"{self.name}_{metric}": value for metric, value in self.metrics.items()}


def check_name(name: str, location: str) -> str:
    """Return `name` if an evaluation may have it, else raise UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            location,
            f"{name[:60]!r} is not a valid name for an evaluation",
            "Use lower-case letters, digits, - and _, as in sql-test",
        )
    return name


def reported_evaluation(metrics: Mapping[str, float], location: str) -> Evaluation:
    """Return the evaluation for metrics that another program measured.

    Raises:
        UsageError: A name or value is not valid for a metric, or there are too many.
    """
    if len(metrics) > MAX_METRICS:
        raise UsageError(location, f"over {MAX_METRICS} metrics", "Report the most important ones")
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name):
            raise UsageError(
                location,
                f"{name[:60]!r} is not a valid name for a metric",
                "Use letters, digits, ., - and _, as in exact_match",
            )
        if not _is_number(value):
            raise UsageError(location, f"{name}={value} is not a number", "Write NAME=VALUE, as in exact_match=0.71")
    return Evaluation(REPORTED, dict(metrics))


def parse(text: str) -> Evaluation | None:
    """Parse the text of a log entry; None if it is not an evaluation, as logs from elsewhere may contain anything."""
    try:
        document = json_file.parse(text, "") if len(text) <= MAX_TEXT else None
    except FormatError:
        return None
    if not isinstance(document, dict) or not isinstance(document.get("name"), str) or not _NAME.fullmatch(document["name"]):
        return None
    metrics, data, base = (document.get(key) for key in ("metrics", "data", "base"))
    if not isinstance(metrics, dict) or not isinstance(data, list) or not isinstance(base, dict):
        return None
    numbers = {key: float(value) for key, value in metrics.items() if _METRIC.fullmatch(key) and _is_number(value)}
    # A log from elsewhere may have any number of them.
    numbers = dict(itertools.islice(numbers.items(), MAX_METRICS))
    cases = document.get("cases")
    rates = {key: float(rate) for key, rate in (cases if isinstance(cases, dict) else {}).items() if _is_number(rate)}
    account = document.get("account", "")
    if not isinstance(account, str) or len(account) > _MAX_ACCOUNT:
        return None
    return Evaluation(document["name"], numbers, tuple(item for item in data if isinstance(item, dict)), base, rates, account)


def _is_number(value: object) -> bool:
    # NaN and infinity, which are not valid JSON, are not less than the bound.
    return json_file.is_number(value) and abs(value) < 1e308


def summary_line(text: str) -> str:
    """Return a summary of a log entry for people; a text that is not an evaluation is returned as it is."""
    evaluation = parse(text)
    if evaluation is None:
        return text
    metrics = ", ".join(f"{key} {value:g}" for key, value in evaluation.metrics.items())
    return f"{evaluation.name}: {metrics} (recorded by {evaluation.recorder})"


def evaluations_of(marks: Mapping[str, str], number: int) -> list[Evaluation]:
    """Return the evaluations of one version, taken from the marks of its name, sorted by name."""
    evaluations = (parse(text) for key, text in sorted(marks.items()) if key.partition(" ")[0] == str(number))
    return [evaluation for evaluation in evaluations if evaluation]


def version_evaluations(marks: Mapping[str, str], number: int) -> list[dict[str, Any]]:
    """Return the evaluations of one version as JSON, as `evaluations_of` does."""
    return [evaluation.document() for evaluation in evaluations_of(marks, number)]
