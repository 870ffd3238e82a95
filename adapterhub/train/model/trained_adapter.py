"""What the trained layers of a model add to the base in its files, in the canonical form that every format is written from."""

from __future__ import annotations

import math
from typing import Any

from adapterhub.train.config import TrainConfig
from adapterhub.train.layers.embeddings import LoRAEmbedding, token_rows
from adapterhub.train.layers.experts import LoRAStack
from adapterhub.train.layers.inits import plain
from adapterhub.train.layers.lora import lora_layers
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, Meta, Rows, StackedLowRank

from .base import Base
from .weights import as_numpy


def adapter(config: TrainConfig, base: Base) -> Adapter:
    """The adapter that `base` carries, float32 as it was trained."""
    deltas = {path: _delta(layer) for path, layer in lora_layers(base.model)}
    rows = {}
    table = token_rows(base.model)
    if table is not None:
        path = next(path for path, module in base.model.named_modules() if module is table)
        rows[path] = Rows(table.ids, as_numpy(table.rows))
    meta = Meta(config.base.name, config.base.revision, "CAUSAL_LM", dropout=config.lora.dropout)
    return Adapter(deltas, rows=rows, meta=meta)


def _delta(layer: Any) -> Delta:
    if isinstance(layer, LoRAEmbedding):
        return LowRankEmbedding(as_numpy(layer.lora_A), as_numpy(layer.lora_B), layer.alpha, layer.rslora)
    if isinstance(layer, LoRAStack):
        return StackedLowRank(as_numpy(layer.lora_A), as_numpy(layer.lora_B), layer.alpha, layer.rslora, layer.transposed)
    A, B, alpha = layer.lora_A, layer.lora_B, layer.alpha
    if layer.initial is not None:
        A, B = plain(A, B, layer.initial)
        alpha *= math.sqrt(2) if layer.rslora else 2  # the same scale at twice the rank
    magnitude = as_numpy(layer.magnitude) if hasattr(layer, "magnitude") else None
    bias = None if layer.lora_bias is None else as_numpy(layer.lora_bias)
    return LowRank(
        as_numpy(A), as_numpy(B), alpha, layer.rslora, magnitude=magnitude, bias=bias, transposed_base=layer.transposed
    )
