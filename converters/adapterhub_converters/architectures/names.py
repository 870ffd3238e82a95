"""Look up architectures by Hugging Face class or GGUF name, and permute rows to and from llama.cpp's order."""

from __future__ import annotations

import numpy as np

from adapterhub_converters.errors import RefusedError

from .architecture import Architecture, Experts, Order, in_layer, layer_of
from .table import ARCHITECTURES

__all__ = [
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
    "permuted",
    "unpermuted",
]

EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "transformer.word_embeddings")
"""Names of the table of token embeddings."""


def by_class(name: str, where: str) -> Architecture:
    """The architecture of a Hugging Face class; RefusedError for an unlisted class."""
    for architecture in ARCHITECTURES:
        if name in architecture.classes:
            return architecture
    known = ", ".join(sorted(name for architecture in ARCHITECTURES for name in architecture.classes))
    raise RefusedError(where, f"{name or 'an unnamed architecture'} has no verified mapping to llama.cpp", f"Known: {known}")


def by_gguf(name: str, where: str, *, experts: bool = False) -> Architecture:
    """The architecture with a `general.architecture`, with or without experts if several share it.

    Raises RefusedError for an unlisted name.
    """
    found = [architecture for architecture in ARCHITECTURES if name == architecture.gguf]
    if found:
        return next((one for one in found if (one.experts is not None) == experts), found[0])
    known = ", ".join(sorted({architecture.gguf for architecture in ARCHITECTURES}))
    raise RefusedError(where, f"llama.cpp's {name[:40]!r} has no verified mapping to Hugging Face's names", f"Known: {known}")


def permuted(rows: np.ndarray, order: Order) -> np.ndarray:
    """`rows` `(out_features, …)` from Hugging Face's order to llama.cpp's; RefusedError if their number does not fit it.

    The pairs are those of llama.cpp's `conversion/llama.py`, `permute`, the groups those of `falcon.py` and `bloom.py`.
    """
    return rows[_permutation(len(rows), order)] if order else rows


def unpermuted(rows: np.ndarray, order: Order) -> np.ndarray:
    """The inverse of `permuted`."""
    return rows[np.argsort(_permutation(len(rows), order))] if order else rows


def divides(order: Order, rows: int) -> bool:
    """Whether an order fits a number of rows."""
    return not rows % (2 * order if isinstance(order, int) else order[0] * (order[1] + 2)) if order else True


def _permutation(rows: int, order: Order) -> np.ndarray:
    """The index of the row that moves to each position."""
    if not divides(order, rows):
        raise RefusedError("", f"{rows} rows do not have the order {order}")
    numbers = np.arange(rows)
    if isinstance(order, int):
        return numbers.reshape(order, 2, -1).swapaxes(1, 2).reshape(-1)
    groups = numbers.reshape(order[0], order[1] + 2, -1)
    return np.concatenate([part.reshape(-1) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
