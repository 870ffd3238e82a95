"""Parts of adapters other than low-rank deltas (biases, replaced weights and rows), summed where that is exact.

An adapter that replaces a weight W by X adds X - W. If the weights of the adapters that replace it sum to 1, W cancels and the
result is the weighted sum of the X. Any other case is refused, as is any method that is not a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from adapterhub.merging.adapter_checks import WeightedAdapters
from adapterhub_converters.adapter import Adapter, LowRank, LowRankConv, Rows
from adapterhub_converters.errors import RefusedError

from .methods import Method

_INTO_BASE = "Merge it into the base"
_OR_INTO_BASE = "Use linear or svd, or merge it into the base"
_AS_A_SUM = "Merge it without a method"


def check_unmerged(adapters: Iterable[Adapter], method: Method, *, into_base: bool = False) -> None:
    """Refuse the parts that the method cannot merge; the error names the part."""
    dora_hint, hint = (_AS_A_SUM, _AS_A_SUM) if into_base else (_INTO_BASE, _OR_INTO_BASE)
    for adapter in adapters:
        for target, delta in adapter.deltas.items():
            if getattr(delta, "magnitude", None) is not None:
                raise RefusedError(target, "DoRA rescales the base's weight, which a sum of deltas cannot do", dora_hint)
            if getattr(delta, "bias", None) is not None and not method.sums:
                raise RefusedError(target, f"has a bias (lora_bias), which {method.name} does not merge", hint)
        for name in (*adapter.replaced, *adapter.rows, *adapter.added):
            if not method.sums:
                verb = "adds to a parameter" if name in adapter.added else "replaces weights"
                reason = f"{verb} of the base, which {method.name} does not merge"
                raise RefusedError(name, reason, hint)


def merged_biases(weighted: WeightedAdapters) -> dict[str, np.ndarray]:
    """Return the weighted sum of biases by target; for all linear modules if for one, as in peft."""
    sums: dict[str, np.ndarray] = {}
    sides: dict[str, int] = {}
    for adapter, weight in weighted:
        for target, delta in adapter.deltas.items():
            if not isinstance(delta, LowRank | LowRankConv):
                sides[target] = -1
                continue
            sides[target] = delta.shape[0]
            if delta.bias is not None:
                added = weight * delta.scaling * delta.bias.astype(np.float64)
                sums[target] = sums.get(target, np.zeros(delta.shape[0])) + added
    if not sums:
        return {}
    # peft's `lora_bias` is one switch for all modules, so modules without a bias get one of zeros.
    for target, side in sides.items():
        if side < 0:
            reason = "cannot have a bias, and in peft lora_bias applies to all modules of an adapter or to none"
            raise RefusedError(target, reason, _INTO_BASE)
    return {target: _f32(sums.get(target, np.zeros(side)), target) for target, side in sides.items()}


def merged_replacements(weighted: WeightedAdapters) -> dict[str, np.ndarray]:
    """Return the weighted sum of replacements by parameter path."""
    return _sum_replacements([(adapter.replaced, weight) for adapter, weight in weighted])


def merged_rows(weighted: WeightedAdapters) -> dict[str, Rows]:
    """Return the weighted sums of replaced rows by module path of the table."""
    tables = dict.fromkeys(name for adapter, _ in weighted for name in adapter.rows)
    result = {}
    for name in tables:
        rows_by_adapter = [
            ({f"{name} row {i}": row for i, row in zip(replaced_rows.ids, replaced_rows.values, strict=True)}, weight)
            for adapter, weight in weighted
            if (replaced_rows := adapter.rows.get(name)) is not None
        ]
        sums = _sum_replacements(rows_by_adapter)
        by_id = {int(key.rpartition(" ")[2]): row for key, row in sums.items()}
        result[name] = Rows(tuple(sorted(by_id)), np.stack([by_id[i] for i in sorted(by_id)]))
    return result


def _sum_replacements(weighted: Sequence[tuple[Mapping[str, np.ndarray], float]]) -> dict[str, np.ndarray]:
    """Return the weighted sum of each replaced tensor; refuse weights that do not sum to 1."""
    result = {}
    for name in dict.fromkeys(name for tensors, _ in weighted for name in tensors):
        replacements = [(tensors[name], weight) for tensors, weight in weighted if name in tensors]
        total = math.fsum(weight for _, weight in replacements)
        # Otherwise a multiple of the base's own weight would remain in the sum.
        if abs(total - 1) > 1e-9:
            reason = f"replaces a weight of the base, and the weights of the adapters that do sum to {total:g}"
            raise RefusedError(name, reason, "Let them sum to 1, or merge it into the base")
        # A single replacement keeps its dtype and its bits.
        first = replacements[0][0]
        if any(tensor.shape != first.shape for tensor, _ in replacements):
            raise RefusedError(name, "the adapters replace it by tensors of different shapes")
        if len(replacements) == 1:
            result[name] = first
            continue
        result[name] = _f32(np.add.reduce([weight * tensor.astype(np.float64) for tensor, weight in replacements]), name)
    return result


def _f32(array: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # an error, not a warning
        result: np.ndarray = array.astype(np.float32)
    if not np.isfinite(result).all():
        raise RefusedError(name, "the weighted sum is over the largest float32")
    return result
