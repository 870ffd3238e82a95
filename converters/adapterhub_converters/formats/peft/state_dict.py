"""The tensors of an adapter under the names and in the layouts that peft saves them by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from adapterhub_converters.adapter import (
    AdaLora,
    Adapter,
    Delta,
    Hadamard,
    Kronecker,
    LowRankEmbedding,
    StackedLowRank,
    Vera,
)

from . import experts
from .keys import PREFIX, SHARED

What = tuple[str, str, str]
"""Which tensor of an adapter: of `pair` (target and part), `replaced`, `rows`, `copy` or `shared`."""


def state_dict(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors under the names peft saves them by."""
    names = tensor_names(adapter)
    turned = adapter.source.turned if adapter.source and adapter.source.format == "peft" else None
    return {names[what]: tensor for what, tensor in _tensors(adapter, turned)}


# A part of a delta as `parts` calls it, to the part of `classify` and to the end of its name.
_ENDS = {
    "lora_A": ("A", ".lora_A.weight"), "lora_B": ("B", ".lora_B.weight"),
    "magnitude": ("magnitude", ".lora_magnitude_vector"), "bias": ("bias", ".lora_B.bias"),
}  # fmt: skip
_EMBEDDING_ENDS = {
    **_ENDS, "lora_A": ("embedding_A", ".lora_embedding_A"), "lora_B": ("embedding_B", ".lora_embedding_B"),
}  # fmt: skip


def _end(delta: Delta, part: str) -> tuple[str, str]:
    if isinstance(delta, AdaLora | Hadamard | Kronecker | Vera):
        return part, f".{part}"
    return (_EMBEDDING_ENDS if isinstance(delta, LowRankEmbedding) else _ENDS)[part]


def tensor_names(adapter: Adapter) -> dict[What, str]:
    """The name in a PEFT file of everything an adapter has."""
    stacks = experts.by_module([t for t, delta in adapter.deltas.items() if isinstance(delta, StackedLowRank)])
    names: dict[What, str] = {}
    for target, delta in adapter.deltas.items():
        for part, _ in delta.parts():
            label, end = _end(delta, part)
            names["pair", target, label] = PREFIX + stacks.get(target, target) + end
    for name in adapter.replaced:
        names["replaced", name, ""] = PREFIX + _under_delta(name, adapter)
    for name in adapter.copies:
        names["copy", name, ""] = PREFIX + ".base_layer.".join(name.rsplit(".", 1))
    names |= {("shared", name, ""): key for key, name in SHARED.items() if name in adapter.shared}
    for target in adapter.rows:
        names["rows", target, ""] = f"{PREFIX}{target}.token_adapter.trainable_tokens_delta"
    return names


def _under_delta(name: str, adapter: Adapter) -> str:
    """A bias of a module that has a delta is saved from inside peft's wrapper."""
    module, _, kind = name.rpartition(".")
    return f"{module}.base_layer.bias" if kind == "bias" and module in adapter.deltas else name


def _tensors(adapter: Adapter, turned: frozenset[str] | None) -> Iterator[tuple[What, np.ndarray]]:
    for target, delta in adapter.deltas.items():
        if isinstance(delta, StackedLowRank):
            is_turned = experts.written_turned(target) if turned is None else target in turned
            lora_A, lora_B = experts.flattened(delta, is_turned=is_turned)
            yield from ((("pair", target, "A"), lora_A), (("pair", target, "B"), lora_B))
        else:
            yield from ((("pair", target, _end(delta, part)[0]), tensor) for part, tensor in delta.parts())
    yield from ((("shared", name, ""), tensor) for name, tensor in adapter.shared.items())
    yield from ((("replaced", name, ""), tensor) for name, tensor in adapter.replaced.items())
    yield from ((("copy", name, ""), tensor) for name, tensor in adapter.copies.items())
    yield from ((("rows", target, ""), rows.values) for target, rows in adapter.rows.items())
