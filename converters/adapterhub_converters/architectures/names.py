"""Look up architectures by Hugging Face class or GGUF name, and permute rows to and from llama.cpp's order."""

from __future__ import annotations

import dataclasses

import numpy as np

from adapterhub_converters.errors import NotUnderstoodError, RefusedError

from .architecture import Architecture, Experts, Order, in_layer, layer_of
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
    "divides",
    "in_layer",
    "layer_of",
    "ordered",
    "permuted",
    "reordered",
    "unpermuted",
]

ADAPTERS = (*ARCHITECTURES, *BY_RULE)
"""Architectures of which adapters are converted; `ARCHITECTURES` are those into whose GGUF adapters are merged, too."""
EMBEDDINGS = (
    "model.embed_tokens", "transformer.wte", "transformer.word_embeddings",
    "model.language_model.embed_tokens", "language_model.model.embed_tokens",
)  # fmt: skip
"""Names of the table of token embeddings."""


def by_class(name: str, where: str, *, whole: bool = False, folder: bool = False, experts: bool = False) -> Architecture:
    """The architecture of a Hugging Face class, with or without experts if that decides.

    Args:
        whole: Find only one into whose GGUF adapters are merged.
        folder: Find only one whose folders are converted as a whole.

    Raises RefusedError for an unlisted class.
    """
    known = tuple(one for one in ADAPTERS if (one.whole or not whole) and (one.folder or not folder))
    models = whole or folder
    found = [one for one in known if name in one.classes or (not models and _with_head(name) in one.classes)]
    if found:
        return next((one for one in found if (one.experts is not None) == experts), found[0])
    for architecture in known:
        if name in architecture.wrapped and not whole:
            return dataclasses.replace(architecture, text="model.language_model", whole=False)
    if folder and any(name in one.classes or name in one.wrapped for one in ADAPTERS):
        raise RefusedError(where, f"only adapters of {name} are converted, not whole models")
    listed = ", ".join(sorted(name for architecture in known for name in (*architecture.classes, *architecture.wrapped)))
    raise RefusedError(
        where,
        f"{name or 'an unnamed architecture'} has no verified mapping to llama.cpp",
        f"Known: {listed}",
        code="unsupported-architecture",
    )


def _with_head(name: str) -> str:
    """The class with an output layer of one without: embedding models are published as `Qwen3Model`."""
    return name.removesuffix("Model") + "ForCausalLM" if name.endswith("Model") else ""


def by_gguf(name: str, where: str, *, experts: bool = False) -> Architecture:
    """The architecture with a `general.architecture`, with or without experts if several share it.

    Raises NotUnderstoodError for an unlisted name.
    """
    found = [architecture for architecture in ADAPTERS if name == architecture.gguf]
    if found:
        return next((one for one in found if (one.experts is not None) == experts), found[0])
    known = ", ".join(sorted({architecture.gguf for architecture in ADAPTERS}))
    what = f"llama.cpp's {name[:40]!r} has no verified mapping to Hugging Face's names"
    raise NotUnderstoodError(where, what, f"Known: {known}")


Pair = tuple[np.ndarray, np.ndarray]


def permuted(rows: np.ndarray, order: Order) -> np.ndarray:
    """`rows` `(out_features, …)` from Hugging Face's order to llama.cpp's; RefusedError if their number does not fit it.

    The pairs are those of llama.cpp's `conversion/llama.py`, `permute`, the groups those of `falcon.py` and `bloom.py`.
    """
    return rows[_permutation(len(rows), order)] if order else rows


def unpermuted(rows: np.ndarray, order: Order) -> np.ndarray:
    """The inverse of `permuted`."""
    return rows[np.argsort(_permutation(len(rows), order))] if order else rows


def reordered(pair: Pair, order: Order, *, across: bool) -> Pair:
    """`lora_A` and `lora_B` in llama.cpp's order, which is one of columns if `across`, else of rows."""
    lora_A, lora_B = pair
    return (permuted(lora_A.T, order).T, lora_B) if across and order else (lora_A, permuted(lora_B, order))


def ordered(pair: Pair, order: Order, *, across: bool) -> Pair:
    """The inverse of `reordered`."""
    lora_A, lora_B = pair
    if across and order:
        return np.ascontiguousarray(unpermuted(lora_A.T, order).T), lora_B
    return lora_A, unpermuted(lora_B, order)


def divides(order: Order, rows: int) -> bool:
    """Whether an order fits a number of rows."""
    match order:
        case int():
            return not order or not rows % (2 * order)
        case [groups, queries]:
            return not rows % (groups * (queries + 2))
        case [first, keys, values, size]:
            return rows == first + keys * values * size


def _permutation(rows: int, order: Order) -> np.ndarray:
    """The index of the row that moves to each position."""
    if not divides(order, rows):
        raise RefusedError("", f"{rows} rows do not have the order {order}")
    numbers = np.arange(rows)
    if isinstance(order, int):
        return numbers.reshape(order, 2, -1).swapaxes(1, 2).reshape(-1)
    if len(order) == 4:
        first, keys, values, size = order
        tiles = numbers[first:].reshape(keys, values, size).swapaxes(0, 1)
        return np.concatenate([numbers[:first], tiles.reshape(-1)])
    groups = numbers.reshape(order[0], order[1] + 2, -1)
    return np.concatenate([part.reshape(-1) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
