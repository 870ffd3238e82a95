"""The result of a task, from a file of any tool: its metrics, its data, the tool, and the models that answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any

from adapterhub.digest import sha256_bytes
from adapterhub.manifest.measurement import MAX_METRICS
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

CODE = "malformed-results"
"""The code of the error for a file that is not the result of a tool that is known here."""
MAX_CASES = 1000
"""Samples whose own results are kept; of more, only the metrics are."""
_MAX_NAME = 40  # characters of the names of evaluations and metrics
_MAX_CASE = 60


@dataclass(frozen=True)
class ImportedResult:
    """The result of a task.

    Attributes:
        tool: The program that measured, and its `tool_version`.
        task: The name of the task, as a name of an evaluation.
        metrics: Name to value; `samples` is their number.
        data_digest: The digest of the data set; empty if the file does not tell.
        answered_by: The models that answered, by the file: their names, with a digest where the answers named it. One for each
            different name of all samples that have an answer.
        adapter_path: The folder of the adapter that the tool loaded itself; empty if it asked a server.
        began: When the tool began, in seconds since 1970 (UTC); None if the file does not tell.
        cases: The share of right answers by the name of a sample; empty if the file does not tell, or has too many.
    """

    tool: str
    tool_version: str
    task: str
    metrics: Mapping[str, float]
    data_digest: str
    answered_by: frozenset[str]
    adapter_path: str = ""
    began: float | None = None
    cases: Mapping[str, float] = field(default_factory=dict)


def evaluation_name(text: str) -> str:
    """Return a text as the name of an evaluation: lower-case letters, digits, - and _, with a letter first."""
    name = "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "-" for char in text.lower()).strip("-_")
    return (name if name[:1].isalpha() else f"t-{name}")[:_MAX_NAME]


def metric_table(items: Iterable[tuple[str, Any]], location: str) -> dict[str, float]:
    """Return the numbers among named values, under names that a metric may have.

    Raises:
        FormatError: Two get one name, or there are too many.
    """
    metrics: dict[str, float] = {}
    for text, value in items:
        if not is_number(value) or not abs(value) < 1e308:
            continue
        name = "".join(char if char.isascii() and (char.isalnum() or char in "_.-") else "-" for char in text)[:_MAX_NAME]
        name = name if name[:1].isalpha() else f"m-{name}"[:_MAX_NAME]
        if name in metrics:
            raise FormatError(location, f"two metrics would have the name {name!r}", code=CODE)
        metrics[name] = float(value)
    if len(metrics) > MAX_METRICS:
        raise FormatError(location, f"has over {MAX_METRICS} metrics of one task", code=CODE)
    return metrics


def case_rates(samples: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Return the mean of the values of each sample by its name; nothing if there are too many names."""
    values: dict[str, list[float]] = {}
    for name, value in samples:
        printable = "".join(char if char.isprintable() else " " for char in name)[:_MAX_CASE] or "-"
        values.setdefault(printable, []).append(value)
        if len(values) > MAX_CASES:
            return {}
    return {name: sum(rates) / len(rates) for name, rates in values.items()}


def digest_of(document: object) -> str:
    """Return the digest of a data set, as the JSON that a tool wrote of it."""
    return sha256_bytes(json_file.canonical_bytes(document))


def table(value: Any, key: str = "") -> Mapping[str, Any]:
    """Return a value, or that of one of its keys, if it is an object; else an empty one."""
    inner = value.get(key) if key and isinstance(value, dict) else value
    return inner if isinstance(inner, dict) else {}


def rows(value: Any, key: str) -> list[Any]:
    """Return the list under a key of an object; else an empty one."""
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, list) else []


def text(value: Any, key: str) -> str:
    """Return the text under a key of an object, shortened; empty if there is none."""
    inner = value.get(key) if isinstance(value, dict) else None
    return inner[:300] if isinstance(inner, str) else ""
