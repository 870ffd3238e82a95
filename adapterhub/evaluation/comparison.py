"""The comparison of a base with and without an adapter: the same rows, the same arithmetic, and one model in memory.

Another adapter is compared on the same rows after the first, so that it takes no more memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub.evidence import paired_losses
from adapterhub.prompts import chat_template
from adapterhub.training import compute_device
from adapterhub.training.data import dataset as data
from adapterhub.training.data import document_files, overlap, record_shapes
from adapterhub.training.data.packed_rows import sample
from adapterhub.training.events import InitialAdapter
from adapterhub.training.model import adapter_transfer, quantized_cache
from adapterhub.training.model.base_files import BaseFiles
from adapterhub.training.model.base_model import Base
from adapterhub.training.model.loading import load
from adapterhub.training.model.probes import check_attention, isolates_documents, share_rows
from adapterhub.training.train_config import BaseConfig, PreferenceConfig
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import TrainedPrompt

from .document_losses import DocumentRows, document_rows
from .pairs import PairRows, are_pairs, preference_of
from .results import EvaluationOptions, EvaluationResult


def compare(
    adapter: InitialAdapter,
    base: Path,
    data_sets: Sequence[Sequence[Path]],
    options: EvaluationOptions,
    *,
    against: InitialAdapter | None = None,
    against_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> list[EvaluationResult]:
    """Evaluate in this process; arguments, results and errors are those of `adapterhub.evaluation.evaluate_sets`."""
    with compute_device.threads(options.threads):
        measurements, settings = _measure(adapter, base, data_sets, options, progress=progress, cache=cache)
        if against is not None:
            choices = {key: settings[key] for key in ("quantize", "dtype", "sequence", "loss", "rows")}
            rows_of_sets = [measurement.rows for measurement in measurements]
            options = EvaluationOptions(**choices)
            others = _other_losses(against, base, rows_of_sets, options, progress=progress, cache=cache)
        elif against_base:
            others = [measurement.base_losses for measurement in measurements]
        else:
            return [measurement.result for measurement in measurements]
    return [
        dataclasses.replace(
            measurement.result, against=paired_losses.compare(measurement.losses, other, measurement.rows.tokens)
        )
        for measurement, other in zip(measurements, others, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Measurement:
    """A data set as it was measured: the result, the rows, and the losses of each document with the adapter and without."""

    result: EvaluationResult
    rows: DocumentRows
    losses: NDArray[np.float64]
    base_losses: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _PreparedSet:
    """A data set in rows, with the notes about it."""

    dataset: data.Dataset
    rows: DocumentRows
    pairs: PairRows | None
    notes: tuple[str, ...]


def _measure(
    adapter: InitialAdapter,
    base: Path,
    data_sets: Sequence[Sequence[Path]],
    options: EvaluationOptions,
    *,
    progress: Callable[[int, int], None] | None,
    cache: Path | None,
) -> tuple[list[_Measurement], dict[str, Any]]:
    """Load the base once and measure all data sets with the adapter and without; return the settings too."""
    model, factors, settings, weights = _load(adapter, base, options, progress, cache)
    # For documents that share rows there is `isolates_documents`.
    free = compute_device.free(model.device)
    attention_notes = check_attention(model, settings["sequence"], free, factors.location, packed=False)
    adapter_transfer.copy_into_model(model, factors)
    # Losses are comparable only if the data are read and rendered as in the training.
    chat_template.apply(model.tokenizer, TrainedPrompt.read(adapter.path))
    prepared_sets = [_prepare(model, factors, files, options, settings) for files in data_sets]
    size = settings["rows"]
    with adapter_transfer.with_replaced_modules(model, factors):
        # Replaced modules are in use for the first losses only; `remove` then disables deltas and trained rows.
        adapted = [
            (item.rows.measure(model, size), item.pairs.sums(model, size) if item.pairs else None) for item in prepared_sets
        ]
    adapter_transfer.remove(model)
    notes = (*model.notes, *attention_notes, *adapter_transfer.other_weights(factors, weights))
    base_facts = {
        "quantize": settings["quantize"],
        "dtype": settings["dtype"],
        "weights": [{"path": item["path"], "digest": item["digest"]} for item in weights],
    }
    measurements = []
    for item, ((loss, losses), sums) in zip(prepared_sets, adapted, strict=True):
        base_loss, base_losses = item.rows.measure(model, size)
        if not (math.isfinite(loss) and math.isfinite(base_loss)):
            raise RefusedError(
                factors.location, f"the loss is {loss} with the adapter and {base_loss} without", code="diverged"
            )
        result = EvaluationResult(
            loss=loss,
            base_loss=base_loss,
            tokens=item.rows.rows.label_tokens,
            data=tuple({"path": file.path, "digest": file.digest} for file in item.dataset.files),
            base=base_facts,
            sequence=settings["sequence"],
            notes=(*notes, *item.notes),
            pairs=item.pairs.compare(sums, item.pairs.sums(model, size)) if item.pairs and sums else None,
            digest=adapter.digest,
            ref=adapter.ref,
        )
        measurements.append(_Measurement(result, item.rows, losses, base_losses))
    return measurements, settings


def _prepare(
    model: Base,
    factors: adapter_transfer.Factors,
    files: Sequence[Path],
    options: EvaluationOptions,
    settings: dict[str, Any],
) -> _PreparedSet:
    """Read a data set, and arrange it in rows."""
    recorded = _recorded_table(factors, "data")
    evaluated_files, training_files = ([_read_file(path, recorded) for path in paths] for paths in (files, options.trained_on))
    overlap_notes = overlap.note(data.shared_passages(training_files, evaluated_files))
    dataset = _build_dataset(model, evaluated_files, settings, pack_rows=recorded.get("pack") is not False)
    pairs, pair_notes = None, list[str]()
    if are_pairs(evaluated_files):
        pair_files = [_read_file(path, recorded, pairs=True) for path in files]
        preference = preference_of(_recorded_table(factors, "preference"))
        pairs, pair_notes = _pair_rows(model, pair_files, preference, settings["sequence"], options.tokens)
    notes = (*dataset.notes, *_trained_on_notes(factors, dataset), *overlap_notes, *pair_notes)
    return _PreparedSet(dataset, document_rows(dataset, options.tokens), pairs, notes)


def _other_losses(
    against: InitialAdapter,
    base: Path,
    rows_of_sets: Sequence[DocumentRows],
    options: EvaluationOptions,
    *,
    progress: Callable[[int, int], None] | None,
    cache: Path | None,
) -> list[NDArray[np.float64]]:
    """Return the losses of each document of rows under another adapter: its layers may differ, so the base is loaded again."""
    model, factors, settings, _ = _load(against, base, options, progress, cache)
    adapter_transfer.copy_into_model(model, factors)
    with adapter_transfer.with_replaced_modules(model, factors):
        measured = [rows.measure(model, settings["rows"]) for rows in rows_of_sets]
    if loss := next((loss for loss, _ in measured if not math.isfinite(loss)), 0.0):
        raise RefusedError(factors.location, f"the loss is {loss}", code="diverged")
    return [losses for _, losses in measured]


def _load(
    adapter: InitialAdapter,
    base: Path,
    options: EvaluationOptions,
    progress: Callable[[int, int], None] | None,
    cache: Path | None,
) -> tuple[Base, adapter_transfer.Factors, dict[str, Any], list[dict[str, Any]]]:
    """Load the base without the adapter; return it with the adapter's factors, the settings, and the digests of the weights."""
    with BaseFiles(base, cache) as base_files:
        factors = adapter_transfer.read(adapter, base_files.spec)
        settings = _settings(options, factors)
        config = BaseConfig(str(base), quantize=settings["quantize"], dtype=settings["dtype"])
        adapter_transfer.check_base(factors, base_files.spec, None)
        if not factors.pairs:
            raise RefusedError(factors.location, "has no low-rank delta to evaluate")
        entry, device = quantized_cache.entry_of(base_files, config, factors.config), compute_device.select("auto")
        model = load(
            base_files, config, factors.config, location=factors.location, progress=progress, entry=entry, device=device
        )
        return model, factors, settings, base_files.digests


def _build_dataset(
    model: Base, files: list[document_files.DataFile], settings: dict[str, Any], *, pack_rows: bool
) -> data.Dataset:
    """Encode and pack the documents of `files`, each into rows of its own if the model would let them attend to each other."""
    sequence, loss = settings["sequence"], settings["loss"]
    dataset = data.build(files, model.tokenizer, sequence=sequence, loss=loss, seed=None, pack_rows=pack_rows)
    if share_rows(dataset.packed) and not isolates_documents(model):
        dataset = data.build(files, model.tokenizer, sequence=sequence, loss=loss, seed=None, pack_rows=False)
    return dataset


def _pair_rows(
    model: Base, files: list[document_files.DataFile], preference: PreferenceConfig, sequence: int, tokens: int | None
) -> tuple[PairRows | None, list[str]]:
    """Return the rows of pairs, or None with a note: each side needs its answer in half a row, and is a document of its own."""
    problem = "" if isolates_documents(model) else "the model lets the sides of a pair see each other"
    try:
        dataset = data.build(files, model.tokenizer, sequence=sequence, loss="completion", seed=None, pairs=True)
    except RefusedError as error:
        problem = error.what
    if problem:
        return None, [f"the sides of the pairs are not compared: {problem}"]
    rows = dataset.rows if tokens is None else sample(dataset.packed, tokens)
    return PairRows(rows, preference), [note for note in dataset.notes if " pairs are left out" in note]


def _read_file(path: Path, recorded: dict[str, Any], *, pairs: bool = False) -> document_files.DataFile:
    """Read a file as the training read its data, or by its own keys if it lacks the training data's columns."""
    column_pairs, split = recorded.get("columns"), recorded.get("split_text")
    # The record of another trainer may contain anything.
    is_valid = isinstance(column_pairs, list) and all(
        isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in column_pairs
    )
    columns: Any = dict(column_pairs or ()) if is_valid else None
    options = document_files.Options(columns, split if split in ("paragraphs", "lines") else "no", pairs)
    try:
        return document_files.read(path, options)
    except record_shapes.ColumnsError:
        if not options.columns:
            raise
        return document_files.read(path, dataclasses.replace(options, columns=None))


def _settings(options: EvaluationOptions, factors: adapter_transfer.Factors) -> dict[str, Any]:
    """Return the settings: the given options, else the values of the adapter's training, else the usual defaults."""
    optim = _recorded_table(factors, "train")
    rows = optim.get("micro_rows") or optim.get("rows")
    recorded = {**_recorded_table(factors, "base"), **_recorded_table(factors, "data"), "rows": rows}
    defaults = {"quantize": "nf4", "dtype": "bfloat16", "sequence": 512, "loss": "completion", "rows": 4}
    choices = {"quantize": ("nf4", "none"), "dtype": ("bfloat16", "float16", "float32"), "loss": ("all", "completion")}
    settings: dict[str, Any] = {}
    for key, default in defaults.items():
        value = getattr(options, key) if getattr(options, key) is not None else recorded.get(key)
        # The record of another trainer may contain anything: an invalid value counts as missing.
        valid = value in choices[key] if key in choices else isinstance(value, int) and value > 0
        settings[key] = value if valid else default
    return settings


def _recorded_table(factors: adapter_transfer.Factors, key: str) -> dict[str, Any]:
    """Return a table of the config that the adapter was trained with; empty if there is none."""
    config: Any = factors.training.config if factors.training else None
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def _trained_on_notes(factors: adapter_transfer.Factors, dataset: data.Dataset) -> list[str]:
    """Return a note for each file that the adapter was trained on."""
    files = (factors.training.data if factors.training else None) or ()
    digests = {item.digest for item in files if item.split in (None, "train")}
    return [f"{file.path} was trained on: its perplexity proves nothing" for file in dataset.files if file.digest in digests]
