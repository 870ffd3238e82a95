"""inspect_ai: a log in JSON, or as `.eval`, a zip archive with a `header.json` and a document of each sample.

The model of each sample's output is what the server wrote into its answer: a gateway of ours writes the version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from adapterhub.digest import sha256_bytes
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import FormatError, RefusedError

from .bounded_files import Archive
from .imported_result import CODE, ImportedResult, case_rates, digest_of, evaluation_name, metric_table, rows, table, text

_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # correct, partial, incorrect, no answer (scorer/_metric.py)


def matches(document: Mapping[str, Any]) -> bool:
    """Return whether a document is a log."""
    return isinstance(document.get("eval"), dict) and "status" in document


def read(document: Mapping[str, Any], path: Path) -> list[ImportedResult]:
    """Return the one result of a log in JSON."""
    return [_result(document, rows(document, "samples"), str(path))]


def read_archive(path: Path) -> list[ImportedResult]:
    """Return the one result of an archive."""
    with closing(Archive(path)) as archive:
        names = sorted(name for name in archive.members if name.startswith("samples/") and name.endswith(".json"))
        return [_result(archive.document("header.json"), (archive.document(name) for name in names), str(path))]


def _result(log: Mapping[str, Any], samples: Iterable[Any], location: str) -> ImportedResult:
    """Return the result of a log. RefusedError for a run that did not end well: its metrics are not of all samples."""
    if log.get("status") != "success":
        raise RefusedError(location, f"is of a run that ended as {str(log.get('status'))[:40]!r}", "Run it again")
    run = table(log, "eval")
    metrics = metric_table(_metrics(rows(table(log, "results"), "scores")), location)
    if not metrics:
        raise FormatError(location, "has no metric", code=CODE)
    count = table(log, "results").get("completed_samples")
    answered_by: set[str] = set()
    # One digest for each sample: an archive can have more text than fits into memory.
    digests: list[str] = []
    rates: list[tuple[str, float]] = []
    for sample in map(table, samples):
        answered_by.add(text(table(sample, "output"), "model") or "an unnamed model")
        digests.append(sha256_bytes(json_file.canonical_bytes([sample.get(key) for key in ("id", "epoch", "input", "target")])))
        rates += [(str(sample.get("id"))[:300], rate) for rate in _rates(sample)]
    return ImportedResult(
        "inspect_ai",
        text(table(run, "packages"), "inspect_ai"),
        evaluation_name(text(run, "task") or "inspect"),
        {**metrics, **({"samples": float(count)} if is_number(count) else {})},
        digest_of(sorted(digests)) if digests else "",
        frozenset(answered_by or {text(run, "model") or "an unnamed model"}),
        cases=case_rates(rates),
    )


def _metrics(scores: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield each metric under its name, or under its scorer's too if there are several."""
    for score in scores:
        for key, metric in table(score, "metrics").items():
            name = key.rpartition("/")[2]
            yield f"{text(score, 'name')}.{name}" if len(scores) > 1 else name, table(metric).get("value")


def _rates(sample: Mapping[str, Any]) -> list[float]:
    """Return the value of a sample's only score, between 0 and 1; nothing for several scores, or other values."""
    scores = list(table(sample, "scores").values())
    value = table(scores[0]).get("value") if len(scores) == 1 else None
    if isinstance(value, bool):
        return [float(value)]
    rate = _LETTERS.get(value) if isinstance(value, str) else value
    return [float(rate)] if is_number(rate) and 0 <= rate <= 1 else []
