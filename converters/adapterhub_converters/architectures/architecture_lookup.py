"""Lookup of architectures by Hugging Face class or GGUF name, and permutation of rows to and from llama.cpp's order."""

from __future__ import annotations

import dataclasses

import numpy as np

from adapterhub_converters.errors import NotUnderstoodError, RefusedError

from .architecture import Architecture, Experts, Order, layer_of, path_in_layer
from .by_rule import BY_RULE
from .table import ARCHITECTURES

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
    "reorder_pair",
    "restore_pair",
    "unpermute_rows",
]

ADAPTERS = (*ARCHITECTURES, *BY_RULE)
"""Architectures whose adapters are converted; for those in `ARCHITECTURES`, adapters are also merged into their GGUF."""
EMBEDDINGS = (
    "model.embed_tokens", "transformer.wte", "transformer.word_embeddings",
    "model.language_model.embed_tokens", "language_model.model.embed_tokens",
)  # fmt: skip
"""Names of the table of token embeddings."""


def by_class(name: str, location: str, *, whole: bool = False, folder: bool = False, experts: bool = False) -> Architecture:
    """Return the architecture of a Hugging Face class, with or without experts if several share it.

    Args:
        whole: Find only one into whose GGUF adapters are merged.
        folder: Find only one whose folders are converted as complete models.

    Raises:
        RefusedError: The class is not listed.
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
    # The same class may have a dense variant and one with experts.
    if matches:
        return next((architecture for architecture in matches if (architecture.experts is not None) == experts), matches[0])
    # A vision or audio model: its text model is converted, under the prefix that transformers 5 gives it.
    for architecture in candidates:
        if name in architecture.wrapped and not whole:
            return dataclasses.replace(architecture, text="model.language_model", whole=False)
    if folder and any(name in row.classes or name in row.wrapped for row in ADAPTERS):
        raise RefusedError(location, f"only adapters of {name} are converted, not whole models")
    names_listed = ", ".join(
        sorted(name for architecture in candidates for name in (*architecture.classes, *architecture.wrapped))
    )
    raise RefusedError(
        location,
        f"{name or 'an unnamed architecture'} has no verified mapping to llama.cpp",
        f"Known: {names_listed}",
        code="unsupported-architecture",
    )


def _with_head(name: str) -> str:
    """Return the class with an output layer for one without: embedding models are published as `Qwen3Model`."""
    return name.removesuffix("Model") + "ForCausalLM" if name.endswith("Model") else ""


def by_gguf(name: str, location: str, *, experts: bool = False) -> Architecture:
    """Return the architecture with a `general.architecture`, with or without experts if several share it.

    Raises:
        NotUnderstoodError: The name is not listed.
    """
    matches = [architecture for architecture in ADAPTERS if name == architecture.gguf]
    if matches:
        return next((architecture for architecture in matches if (architecture.experts is not None) == experts), matches[0])
    known_names = ", ".join(sorted({architecture.gguf for architecture in ADAPTERS}))
    problem = f"llama.cpp's {name[:40]!r} has no verified mapping to Hugging Face's names"
    raise NotUnderstoodError(location, problem, f"Known: {known_names}")


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
        case [first, keys, values, size]:
            return rows == first + keys * values * size


def _permutation(rows: int, order: Order) -> np.ndarray:
    """Return the index of the row that moves to each position."""
    if not order_fits(order, rows):
        raise RefusedError("", f"{rows} rows do not have the order {order}")
    numbers = np.arange(rows)
    if isinstance(order, int):
        return numbers.reshape(order, 2, -1).swapaxes(1, 2).reshape(-1)
    if len(order) == 4:
        first, keys, values, size = order
        # The rows before `first` are queries and keys, which stay.
        tiles = numbers[first:].reshape(keys, values, size).swapaxes(0, 1)
        return np.concatenate([numbers[:first], tiles.reshape(-1)])
    groups = numbers.reshape(order[0], order[1] + 2, -1)
    return np.concatenate([part.reshape(-1) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
