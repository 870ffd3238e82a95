"""Adapters into an adapter, module by module, without the base.

Ranks, targets, alphas and rsLoRA may differ: a module's terms are taken with their true scales, and a module that
only some adapters change gets those. What is no low-rank sum (DoRA, a bias, replaced weights) is refused by name.
The result is in float32 with alpha = r, so that its scale is 1 in every program, per-module ranks or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapterhub.factors import Factors, cosines, distance, norm, stacked, terms
from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding, Meta, Pair, plain_pairs
from adapterhub_converters.errors import RefusedError, UsageError

from .checks import check_adapter
from .methods import METHODS, Method


@dataclass(frozen=True)
class Merged:
    """One module of a merge.

    Attributes:
        ranks: Of the adapters that change it, in their order.
        rank: Of the result.
        error: Norm of result minus weighted sum over norm of the weighted sum, rounding to float32 included;
            0 to 1e-7 is rounding.
        cosines: Between those adapters' deltas, weights aside.
    """

    ranks: tuple[int, ...]
    rank: int
    error: float
    cosines: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MergeReport:
    """What a merge of adapters did, by module path."""

    method: str
    weights: tuple[float, ...]
    modules: Mapping[str, Merged]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """The largest of all modules."""
        return max((module.error for module in self.modules.values()), default=0.0)


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], *, method: str, rank: int | None = None
) -> tuple[Adapter, MergeReport]:
    """One adapter that does what the weighted adapters do together, as closely as `method` says.

    Args:
        adapters: Trained on one base.
        weights: One for each; negative ones subtract.
        method: A name in `METHODS`.
        rank: For `svd`: what to truncate to; the largest rank of each module when None.

    Raises:
        RefusedError: Something in the adapters is no low-rank sum, or they do not belong together.
        UsageError: No such method, or the weights don't match.
    """
    merge = _method(method, rank)
    if len(weights) != len(adapters) or not adapters:
        raise UsageError("weights", f"{len(weights)} weights for {len(adapters)} adapters")
    for adapter, weight in zip(adapters, weights, strict=True):
        check_adapter(adapter, weight)
        _check_sum(adapter)
    meta, notes = _meta(adapters)
    deltas: dict[str, Pair] = {}
    modules: dict[str, Merged] = {}
    weighted = list(zip(map(plain_pairs, adapters), weights, strict=True))
    for target in dict.fromkeys(target for found, _ in weighted for target in found):
        terms = [(found[target], weight) for found, weight in weighted if target in found]
        deltas[target], modules[target] = _module(target, terms, merge, rank)
    return Adapter(deltas, meta=meta), MergeReport(method, tuple(weights), modules, notes)


def _method(name: str, rank: int | None) -> Method:
    if name not in METHODS:
        raise UsageError("method", f"no {name!r}", f"There are {', '.join(METHODS)}")
    if rank is not None and rank < 1:
        raise UsageError("rank", f"{rank} is below 1")
    return METHODS[name]


def _check_sum(adapter: Adapter) -> None:
    for target, delta in adapter.deltas.items():
        if isinstance(delta, LowRank) and delta.magnitude is not None:
            raise RefusedError(target, "DoRA rescales the base's weight, which no sum of deltas does", "Fuse it into the base")
        if isinstance(delta, LowRank) and delta.bias is not None:
            raise RefusedError(target, "has a bias (lora_bias), which factors cannot hold", "Fuse it into the base")
    for name in (*adapter.replaced, *adapter.rows):
        raise RefusedError(
            name, "replaces weights of the base (modules_to_save, rows) instead of adding", "Fuse it into the base"
        )


def _meta(adapters: Sequence[Adapter]) -> tuple[Meta, tuple[str, ...]]:
    bases = _known(adapter.meta.base_model for adapter in adapters)
    if len(bases) > 1:
        raise RefusedError("base", f"the adapters were trained on different models: {', '.join(bases)}")
    revisions = _known(adapter.meta.revision for adapter in adapters)
    if len(revisions) > 1:
        raise RefusedError("base", f"the adapters were trained on different revisions of it: {', '.join(revisions)}")
    tasks = _known(adapter.meta.task_type for adapter in adapters)
    notes = (f"task_type left open: the adapters say {', '.join(tasks)}",) if len(tasks) > 1 else ()
    meta = Meta(_only(bases), _only(revisions), _only(tasks))
    return meta, notes


def _known(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _only(values: list[str]) -> str | None:
    return values[0] if len(values) == 1 else None


def _module(target: str, pairs: Sequence[tuple[Pair, float]], merge: Method, rank: int | None) -> tuple[Pair, Merged]:
    first = pairs[0][0]
    for delta, _ in pairs:
        if type(delta) is not type(first) or delta.shape != first.shape or _transposed(delta) != _transposed(first):
            raise RefusedError(target, f"the adapters change it differently: {_kind(first)} and {_kind(delta)}")
    matrices = [terms(delta)[0] for delta, _ in pairs]
    weights = [weight for _, weight in pairs]
    result = _delta_like(first, merge(matrices, weights, rank))
    wanted = stacked(matrices, weights)
    size = norm(wanted)
    error = distance(terms(result)[0], wanted) / size if size else 0.0
    return result, Merged(tuple(delta.r for delta, _ in pairs), result.r, error, cosines(matrices))


def _transposed(delta: Pair) -> bool:
    return isinstance(delta, LowRank) and delta.transposed_base


def _kind(delta: Pair) -> str:
    return f"{type(delta).__name__} {delta.shape}{' transposed' if _transposed(delta) else ''}"


def _delta_like(first: Pair, factors: Factors) -> Pair:
    lora_A, lora_B = factors.right.astype(np.float32), factors.left.astype(np.float32)
    if not (np.isfinite(lora_A).all() and np.isfinite(lora_B).all()):
        raise RefusedError("weight", "the weighted factors are over the largest float32")
    if isinstance(first, LowRankEmbedding):
        return LowRankEmbedding(lora_A, lora_B, alpha=float(factors.r))
    return LowRank(lora_A, lora_B, alpha=float(factors.r), transposed_base=first.transposed_base)
