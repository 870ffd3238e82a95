"""Checks of the adapters and weights of any merge, before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.errors import RefusedError

WeightedAdapters = Sequence[tuple[Adapter, float]]
"""Adapters and their weights."""
_FLOATS = (dtypes.BF16, dtypes.F16, dtypes.F32, dtypes.F64)


def check_adapter(adapter: Adapter, weight: float) -> None:
    """Refuse an adapter with numbers that are not finite, or whose tensors alone do not determine its delta."""
    if not math.isfinite(weight):
        raise RefusedError("weight", f"{weight} is not a finite number")
    # PiSSA, OLoRA and the like subtract from the base's weights at the start, so the factors alone are not the delta.
    if adapter.meta.init != "default":
        raise RefusedError(
            "adapter",
            f"initialized by {adapter.meta.init}, which changed the base's own weights before training",
            "Convert it to a plain LoRA with peft (path_initial_model_for_weight_conversion)",
        )
    for target, delta in adapter.deltas.items():
        if not math.isfinite(delta.scaling):
            raise RefusedError(target, f"alpha {delta.alpha} does not give a finite scaling")
    # Some tuners store positions or signs as integers beside their factors; only the rest must be finite floats.
    integer_parts = {part for change in adapter.tuned.values() for part in change.tuner.integers}
    for name, tensor in adapter.tensors():
        if name.rpartition(".")[2] in integer_parts:
            continue
        if tensor.dtype not in _FLOATS:
            raise RefusedError(name, f"{tensor.dtype} is not a type of floats")
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise RefusedError(name, "contains NaN or Inf", code="non-finite")
