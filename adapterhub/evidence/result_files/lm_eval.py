"""lm-evaluation-harness: `results_<time>.json`, and beside it `samples_<task>_<time>.jsonl` of `--log_samples`.

A metric has the key `metric,filter`, its error `metric_stderr,filter` (lm_eval/evaluator_utils.py). The file names the model
that was asked for, not who answered: a name with a digest is one version, `peft=DIR` the folder that the harness loaded itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub.digest import is_hex
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import FormatError

from . import bounded_files
from .imported_result import CODE, ImportedResult, case_rates, digest_of, evaluation_name, metric_table, table, text

_TOOL = "lm-evaluation-harness"
_MAX_ARGUMENTS = 10_000  # characters


def matches(document: Mapping[str, Any]) -> bool:
    """Return whether a document is one of results."""
    return "lm_eval_version" in document or ("configs" in document and "n-samples" in document)


def results_file(samples: Path) -> Path:
    """Return the file of results beside a file of samples, by the time in their names."""
    return samples.with_name(f"results_{samples.stem.rpartition('_')[2]}.json")


def read(document: Mapping[str, Any], path: Path, *, only: str = "") -> list[ImportedResult]:
    """Return the result of each task; `only` of one whose samples file has this name."""
    model_args = _arguments(table(document, "config").get("model_args"))
    adapter = text(model_args, "peft")
    name = text(document, "model_name") or text(model_args, "model") or text(model_args, "pretrained")
    results = []
    for task, values in table(document, "results").items():
        if " " in table(values):  # a group without a metric of its own, a heading of its tasks (evaluator_utils.py)
            continue
        samples = f"samples_{task}_{path.stem.partition('_')[2]}.jsonl"
        if only and samples != only:
            continue
        location = f"{path}: {task[:60]}"
        metrics = metric_table(_metrics(table(values)), location)
        if not metrics:
            raise FormatError(location, "has no metric", code=CODE)
        count = table(table(document, "n-samples"), task).get("effective")
        cases, digest = _samples(path.parent / samples) if _is_beside(samples, path) else ({}, "")
        task_hash = text(table(document, "task_hashes"), task)
        results.append(
            ImportedResult(
                _TOOL,
                text(document, "lm_eval_version"),
                evaluation_name(task),
                {**metrics, **({"samples": float(count)} if is_number(count) else {})},
                digest or (f"sha256:{task_hash}" if is_hex(task_hash) else ""),
                frozenset([name] if name and not adapter else []),
                adapter,
                float(began) if is_number(began := document.get("date")) else None,
                cases,
            )
        )
    if not results:
        raise FormatError(str(path), "has no results of a task", code=CODE)
    return results


def _is_beside(name: str, path: Path) -> bool:
    """Return whether there is a file in the folder of `path`: the name of a task is a stranger's, and could lead elsewhere."""
    return path.stem.startswith("results_") and os.path.basename(name) == name and os.path.isfile(path.parent / name)


def _arguments(value: object) -> Mapping[str, Any]:
    """Return the arguments of a model, which earlier versions wrote as on the command line: `pretrained=DIR,peft=DIR`."""
    if not isinstance(value, str):
        return table(value)
    return {key: text for key, equals, text in (part.partition("=") for part in value[:_MAX_ARGUMENTS].split(",")) if equals}


def _metrics(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name, comma, filter_name = key.partition(",")
        if comma:
            yield name if filter_name in ("none", "") else f"{name}.{filter_name}", value


def _samples(path: Path) -> tuple[dict[str, float], str]:
    """Return the rate of each document, by its first metric between 0 and 1, and the digest of all documents."""
    rates: list[tuple[str, float]] = []
    hashes: set[str] = set()
    for sample in bounded_files.lines(path):
        hashes.add(text(sample, "doc_hash"))
        names = sample.get("metrics")
        values = [sample.get(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []
        value = next((value for value in values if is_number(value) and 0 <= value <= 1), None)
        if value is not None:
            rates.append((f"doc-{sample.get('doc_id')}", float(value)))
    return case_rates(rates), digest_of(sorted(hashes))
