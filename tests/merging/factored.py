"""Random low-rank deltas, the dense matrices they are, and merges of them as dense matrices, for the tests of merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub.merging import METHODS, combine
from adapterhub_converters.adapter import Adapter, LowRank, Meta

Dense = np.ndarray[Any, np.dtype[np.float64]]


def low_rank(r: int, m: int = 12, n: int = 9, seed: int = 0, **fields: Any) -> LowRank:
    rng = np.random.default_rng(seed)
    lora_A, lora_B = rng.normal(size=(r, n)).astype(np.float32), rng.normal(size=(m, r)).astype(np.float32)
    return LowRank(lora_A, lora_B, **{"alpha": 3.0, **fields})


def dense(delta: Any) -> Dense:
    """`(out, in)`, or a stack of them; an embedding's is as its factors multiply."""
    product: Dense = delta.scaling * (delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64))
    return product


def adapter(*, base: str | None = "b", **deltas: Any) -> Adapter:
    return Adapter(deltas, meta=Meta(base_model=base))


def two_deltas(ranks: tuple[int, ...] = (3, 5), m: int = 12, n: int = 9) -> list[LowRank]:
    return [low_rank(r, m, n, seed, alpha=float(seed + 2), rslora=seed % 2 == 1) for seed, r in enumerate(ranks)]


def factors(delta: LowRank) -> Factors:
    return Factors(delta.lora_B.astype(np.float64), delta.scaling * delta.lora_A.astype(np.float64))


FULL = 9  # the smaller side of the matrices here, so that nothing is truncated


def merged(deltas: Sequence[Any], weights: Sequence[float], method: str, *, rank: Any = FULL, **parameters: Any) -> Dense:
    cut: dict[str, Any] = {"rank": rank if METHODS[method].cuts else None}
    result, _ = combine([adapter(q=delta) for delta in deltas], weights, method=method, parameters=parameters, **cut)
    return dense(result.deltas["q"])


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def trim(x: Dense, density: float) -> Dense:
    least = np.sort(np.abs(x), axis=None)[::-1][int(density * x.size) - 1]
    return np.where(np.abs(x) >= least, x, 0)


def elect(parts: Sequence[Dense], weights: Sequence[float]) -> Dense:
    weighted = np.stack([weight * part for part, weight in zip(parts, weights, strict=True)])
    agrees = np.sign(weighted) == np.sign(weighted.sum(axis=0))
    agrees &= weighted != 0
    share = np.abs(np.array(weights))[:, None, None] * agrees
    return (weighted * agrees).sum(axis=0) / np.where(share.sum(axis=0) > 0, share.sum(axis=0), 1)
