"""Random low-rank deltas and the dense matrices they are, for the tests of merging."""

from __future__ import annotations

from typing import Any

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub_converters.adapter import Adapter, LowRank, Meta

Dense = np.ndarray[Any, np.dtype[np.float64]]


def low_rank(r: int, m: int = 12, n: int = 9, seed: int = 0, **more: Any) -> LowRank:
    rng = np.random.default_rng(seed)
    lora_A, lora_B = rng.normal(size=(r, n)).astype(np.float32), rng.normal(size=(m, r)).astype(np.float32)
    return LowRank(lora_A, lora_B, **{"alpha": 3.0, **more})


def dense(delta: Any) -> Dense:
    """`(out, in)`, or a stack of them; an embedding's is as its factors multiply."""
    product: Dense = delta.scaling * (delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64))
    return product


def adapter(*, base: str | None = "b", **deltas: Any) -> Adapter:
    return Adapter(deltas, meta=Meta(base_model=base))


def some(ranks: tuple[int, ...] = (3, 5), m: int = 12, n: int = 9) -> list[LowRank]:
    return [low_rank(r, m, n, seed, alpha=float(seed + 2), rslora=seed % 2 == 1) for seed, r in enumerate(ranks)]


def factors(delta: LowRank) -> Factors:
    return Factors(delta.lora_B.astype(np.float64), delta.scaling * delta.lora_A.astype(np.float64))
