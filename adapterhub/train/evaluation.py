"""A base with and without an adapter on data that neither saw: the same rows, the same arithmetic, one model in memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub.train.model.base import load, threads
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RefusedError

from . import devices
from .config import BaseConfig
from .data import dataset as data
from .events import Given, Measured, Measuring
from .loop import loop
from .model import digest_cache, document_isolation, initial_adapter, quantized_cache


def evaluate(
    start: Given,
    base: Path,
    files: list[Path],
    asked: Measuring,
    *,
    progress: Callable[[int, int], None] | None = None,
    cache: Path | None = None,
) -> Measured:
    """See `adapterhub.train.evaluation`."""
    found = initial_adapter.read(start)
    initial_adapter.check_base(found, read_base(base), None)
    asked = _as_trained(asked, found)
    held = BaseConfig(str(base), quantize=asked.quantize, dtype=asked.dtype)  # type: ignore[arg-type]
    if not found.pairs:
        raise RefusedError(found.where, "has no low-rank delta to measure")
    weights = digest_cache.weights(base, cache)
    with threads(asked.threads):
        place = quantized_cache.place(cache, base, weights) if cache else None
        device = devices.chosen("auto")
        model = load(base, held, found.config, where=found.where, progress=progress, place=place, device=device)
        initial_adapter.put(model, found)
        assert asked.sequence and asked.loss and asked.rows  # noqa: S101, PT018 - `_as_trained` said them
        read = partial(data.load, files, model.tokenizer, sequence=asked.sequence, loss=asked.loss, seed=None)
        dataset = read(pack_rows=_packed(found))
        if document_isolation.shared(dataset.rows) and not document_isolation.separates(model):
            dataset = read(pack_rows=False)
        rows = dataset.rows if asked.tokens is None else data.some(dataset.rows, asked.tokens)
        with initial_adapter.replaced(model, found):
            with_adapter = loop.evaluate(model, rows, asked.rows)
        initial_adapter.take_out(model)
        alone = loop.evaluate(model, rows, asked.rows)
    if not (math.isfinite(with_adapter) and math.isfinite(alone)):
        raise RefusedError(found.where, f"the loss is {with_adapter} with the adapter and {alone} without")
    return Measured(
        loss=with_adapter,
        base_loss=alone,
        tokens=rows.label_tokens,
        data=tuple({"path": file.path, "digest": file.digest} for file in dataset.files),
        base={"quantize": asked.quantize, "dtype": asked.dtype, "weights": [_plain(item) for item in weights]},
        sequence=asked.sequence,
        notes=(*model.notes, *dataset.notes, *initial_adapter.other_weights(found, weights), *_seen(found, dataset)),
    )


def _plain(item: dict[str, Any]) -> dict[str, Any]:
    return {"path": item["path"], "digest": item["digest"]}


def _as_trained(asked: Measuring, found: initial_adapter.Factors) -> Measuring:
    """What wasn't said is as the adapter was trained, or as a training would be."""
    config: Any = (found.training.config if found.training else None) or {}
    optim = _table(config, "train")
    trained = {**_table(config, "base"), **_table(config, "data"), "rows": optim.get("micro_rows") or optim.get("rows")}
    defaults = {"quantize": "nf4", "dtype": "bfloat16", "sequence": 512, "loss": "completion", "rows": 4}
    kinds = {"quantize": ("nf4", "none"), "dtype": ("bfloat16", "float16", "float32"), "loss": ("all", "completion")}
    chosen: dict[str, Any] = {}
    for key, default in defaults.items():
        value = getattr(asked, key) if getattr(asked, key) is not None else trained.get(key)
        # A record of another trainer may say anything.
        known = value in kinds[key] if key in kinds else isinstance(value, int) and value > 0
        chosen[key] = value if known else default
    return dataclasses.replace(asked, **chosen)


def _packed(found: initial_adapter.Factors) -> bool:
    """Whether documents share rows, as they did in its training."""
    return _table(found.training.config if found.training else None, "data").get("pack") is not False


def _table(config: Any, key: str) -> dict[str, Any]:
    value = config.get(key) if isinstance(config, dict) else None
    return value if isinstance(value, dict) else {}


def _seen(found: initial_adapter.Factors, dataset: data.Dataset) -> list[str]:
    """A note where the adapter was trained on what it is asked about."""
    data = (found.training.data if found.training else None) or ()
    trained = {item.digest for item in data if item.split in (None, "train")}
    return [f"{file.path} was trained on: its perplexity proves nothing" for file in dataset.files if file.digest in trained]
