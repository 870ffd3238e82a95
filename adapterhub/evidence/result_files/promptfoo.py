"""promptfoo: the JSON of `promptfoo eval --output FILE.json`.

Each result has the headers of the response that it is about (`metadata.http.headers`), among them the version that answered.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub.evidence.version_names import VERSION_HEADER
from adapterhub_converters.errors import FormatError

from .imported_result import CODE, ImportedResult, case_rates, digest_of, evaluation_name, metric_table, rows, table, text

_API_ERROR = 2  # `ResultFailureReason.ERROR`: nothing answered


def matches(document: Mapping[str, Any]) -> bool:
    """Return whether a document is one of results."""
    return "evalId" in document or isinstance(table(document, "results").get("results"), list)


def read(document: Mapping[str, Any], path: Path) -> list[ImportedResult]:
    """Return the one result: the share of the tests that passed."""
    results = [table(result) for result in rows(table(document, "results"), "results")]
    if not results:
        raise FormatError(str(path), "has no results", code=CODE)
    passed = [result.get("success") is True for result in results]
    errors = [result for result in results if result.get("failureReason") == _API_ERROR]
    answered = [result for result in results if result.get("failureReason") != _API_ERROR]
    metrics = {
        "pass_rate": sum(passed) / len(passed),
        "passed": sum(passed),
        "samples": len(passed),
        "errors": len(errors),
    }
    names = [(_case_name(result, number), float(ok)) for number, (result, ok) in enumerate(zip(results, passed, strict=True))]
    return [
        ImportedResult(
            "promptfoo",
            text(table(document, "metadata"), "promptfooVersion"),
            evaluation_name(text(table(document, "config"), "description") or "promptfoo"),
            metric_table(metrics.items(), str(path)),
            digest_of([[table(result, "testCase"), table(result, "prompt").get("raw")] for result in results]),
            frozenset(map(_answered_by, answered)),
            cases=case_rates(names),
        )
    ]


def _case_name(result: Mapping[str, Any], number: int) -> str:
    index = result.get("testIdx")
    return text(table(result, "testCase"), "description") or f"test-{index if isinstance(index, int) else number}"


def _answered_by(result: Mapping[str, Any]) -> str:
    """Return the version in the headers of the response, else the name of the provider."""
    for metadata in (table(result, "metadata"), table(table(result, "response"), "metadata")):
        headers = {key.lower(): value for key, value in table(table(metadata, "http"), "headers").items()}
        if version := text(headers, VERSION_HEADER):
            return version
    return text(table(result, "provider"), "id").rpartition("openai:chat:")[2] or "an unnamed provider"
