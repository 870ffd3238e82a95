"""Lookup of architectures by Hugging Face class or GGUF name, and permutation of rows to and from llama.cpp's order."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from adapterhub_converters.errors import NotUnderstoodError, RefusedError

from .adapter_only_models import ADAPTERS_ONLY
from .architecture import EMBEDDINGS, Architecture, Experts, Order, layer_of, path_in_layer
from .rule_named_models import BY_RULE
from .whole_models import ARCHITECTURES

__all__ = [
    "ADAPTERS",
    "ARCHITECTURES",
    "EMBEDDINGS",
    "Architecture",
    "Experts",
    "Order",
    "by_class",
    "by_gguf",
    "layer_of",
    "order_fits",
    "path_in_layer",
    "permute_rows",
    "piece_rows",
    "reorder_pair",
    "restore_pair",
    "rows_of_gguf",
    "unpermute_rows",
]

ADAPTERS = (*ARCHITECTURES, *BY_RULE, *ADAPTERS_ONLY)
"""Architectures whose adapters are converted; for those in `ARCHITECTURES`, adapters are also merged into their GGUF."""


def by_class(
    name: str,
    location: str,
    *,
    whole: bool = False,
    folder: bool = False,
    experts: bool = False,
    names: Collection[str] = (),
) -> Architecture:
    """Return the architecture of a Hugging Face class, with or without experts if several share it.

    Args:
        whole: Find only one into whose GGUF adapters are merged.
        folder: Find only one whose folders are converted as complete models.
        names: The names of the model's tensors, which tell rows of one class apart by their `marks`.

    Raises:
        RefusedError: The class is not listed, or only the names of its tensors would tell which architecture it is.
    """
    candidates = tuple(
        architecture for architecture in ADAPTERS if (architecture.whole or not whole) and (architecture.folder or not folder)
    )
    needs_model = whole or folder
    matches = [
        architecture
        for architecture in candidates
        if name in architecture.classes or (not needs_model and _with_head(name) in architecture.classes)
    ]
    if any(row.marks for row in matches):
        return _by_marks(matches, name, names, location)
    # The same class may have a dense variant and one with experts.
    if matches:
        return next((architecture for architecture in matches if (architecture.experts is not None) == experts), matches[0])
    # A vision or audio model: its text model is converted, under the prefix that transformers 5 gives it.
    for architecture in candidates:
        if name in architecture.wrapped and not whole:
            return dataclasses.replace(architecture, text="model.language_model", whole=False)
    if folder and any(name in row.classes or name in row.wrapped for row in ADAPTERS):
        raise RefusedError(location, f"only adapters of {name} are converted, not whole models")
    raise RefusedError(
        location,
        f"{name[:60] or 'a base whose config has no architectures'} has no verified mapping to llama.cpp",
        "Merge the adapter into its base instead, which works for every architecture",
        code="no-gguf-architecture",
    )


def _by_marks(rows: Sequence[Architecture], name: str, names: Collection[str], location: str) -> Architecture:
    """Return the row with the most marks among those of which the model has every mark."""
    if not names:
        problem = f"{name} is one of {', '.join(row.gguf for row in rows)} in llama.cpp, which only its weights tell"
        raise RefusedError(location, problem, "Name its base model", code="base-required")
    present = {mark for mark in {mark for row in rows for mark in row.marks} if any(mark in name for name in names)}
    return max((row for row in rows if present.issuperset(row.marks)), key=lambda row: len(row.marks))


def _with_head(name: str) -> str:
    """Return the class with an output layer for one without: embedding models are published as `Qwen3Model`."""
    return name.removesuffix("Model") + "ForCausalLM" if name.endswith("Model") else ""


def by_gguf(name: str, location: str, *, experts: bool = False, sections: bool = False) -> Architecture:
    """Return the architecture with a `general.architecture`.

    Several rows may share it: that with or without experts, and with or without sections of the rotary embedding, comes first.

    Raises:
        NotUnderstoodError: The name is not listed.
    """
    rows = rows_of_gguf(name)
    if not rows:
        problem = f"llama.cpp's {name[:40]!r} has no verified mapping to Hugging Face's names"
        raise NotUnderstoodError(location, problem)
    return min(rows, key=lambda row: ((row.experts is not None) != experts, row.unpaired != sections))


def rows_of_gguf(name: str) -> tuple[Architecture, ...]:
    """Return all rows with a `general.architecture`."""
    return tuple(row for row in ADAPTERS if row.gguf == name)


Pair = tuple[np.ndarray, np.ndarray]


def permute_rows(rows: np.ndarray, order: Order) -> np.ndarray:
    """Return `rows` `(out_features, …)` in llama.cpp's order instead of Hugging Face's; RefusedError if the order does not fit.

    The pairs are those of llama.cpp's `conversion/llama.py`, `permute`, the groups those of `falcon.py` and `bloom.py`.
    """
    return rows[_permutation(len(rows), order)] if order else rows


def unpermute_rows(rows: np.ndarray, order: Order) -> np.ndarray:
    """Return `rows` in Hugging Face's order instead of llama.cpp's."""
    return rows[np.argsort(_permutation(len(rows), order))] if order else rows


def reorder_pair(pair: Pair, order: Order, *, across: bool) -> Pair:
    """Return `lora_A` and `lora_B` in llama.cpp's order, which applies to columns if `across`, else to rows."""
    lora_A, lora_B = pair
    return (permute_rows(lora_A.T, order).T, lora_B) if across and order else (lora_A, permute_rows(lora_B, order))


def restore_pair(pair: Pair, order: Order, *, across: bool) -> Pair:
    """Return `lora_A` and `lora_B` in Hugging Face's order: the inverse of `reorder_pair`."""
    lora_A, lora_B = pair
    if across and order:
        return np.ascontiguousarray(unpermute_rows(lora_A.T, order).T), lora_B
    return lora_A, unpermute_rows(lora_B, order)


def order_fits(order: Order, rows: int) -> bool:
    """Return whether an order fits a number of rows."""
    match order:
        case int():
            return not order or not rows % (2 * order)
        case [groups, queries]:
            return not rows % (groups * (queries + 2))
        case [heads, size, rotated]:
            return rows == heads * size and rotated <= size and not rotated % 2
        case [first, keys, values, size]:
            return rows == first + keys * values * size
        case [groups, *parts]:
            return rows == groups * sum(parts)


def piece_rows(order: Order) -> tuple[int, ...]:
    """Return the number of rows in each tensor that an order divides a module into; empty if it does not divide it."""
    if not isinstance(order, tuple) or len(order) != 5:
        return ()
    groups, *parts, gates = order
    return groups * sum(parts), groups * gates


def _permutation(rows: int, order: Order) -> np.ndarray:
    """Return the index of the row that moves to each position."""
    if not order_fits(order, rows):
        raise RefusedError("", f"{rows} rows do not have the order {order}")
    numbers = np.arange(rows)
    if isinstance(order, int):
        return numbers.reshape(order, 2, -1).swapaxes(1, 2).reshape(-1)
    if len(order) == 3:
        pairs = numbers.reshape(order[0], order[1])
        rotated = pairs[:, : order[2]]
        return np.concatenate([rotated[:, ::2], rotated[:, 1::2], pairs[:, order[2] :]], axis=1).reshape(-1)
    if len(order) == 5:
        blocks = np.split(numbers.reshape(order[0], -1), np.cumsum(order[1:-1]), axis=1)
        return np.concatenate([block.reshape(-1) for block in blocks])
    if len(order) == 4:
        first, keys, values, size = order
        # The rows before `first` are queries and keys, which stay.
        tiles = numbers[first:].reshape(keys, values, size).swapaxes(0, 1)
        return np.concatenate([numbers[:first], tiles.reshape(-1)])
    groups = numbers.reshape(order[0], order[1] + 2, -1)
    return np.concatenate([part.reshape(-1) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
