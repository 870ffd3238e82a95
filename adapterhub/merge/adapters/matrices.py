"""One module's deltas as matrices, whatever kind of module it is, and a matrix as a delta of that kind again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adapterhub.analysis.low_rank import Factors, norm, terms
from adapterhub_converters.adapter import Delta, LowRank, LowRankConv, LowRankEmbedding, StackedLowRank
from adapterhub_converters.errors import RefusedError

_DENSE = 1e15  # the squares of 1e8 such elements are still below the largest float32

Mergeable = LowRank | LowRankEmbedding | LowRankConv | StackedLowRank


def alike(target: str, deltas: Sequence[Delta]) -> list[Mergeable]:
    """The deltas of one module, if they can be merged: of one kind and one shape."""
    first, same = deltas[0], list[Mergeable]()
    for delta in deltas:
        if not isinstance(delta, Mergeable):
            raise RefusedError(target, f"a delta of the kind {type(delta).__name__} cannot be merged yet")
        if type(delta) is not type(first) or delta.shape != first.shape or _transposed(delta) != _transposed(first):
            raise RefusedError(target, f"the adapters change it differently: {_kind(first)} and {_kind(delta)}")
        same.append(delta)
    return same


def _transposed(delta: Delta) -> bool | None:
    return getattr(delta, "transposed_base", False)


def _kind(delta: Delta) -> str:
    return f"{type(delta).__name__} {delta.shape}{' transposed' if _transposed(delta) else ''}"


def check_size(target: str, terms: Sequence[Factors], weights: Sequence[float], *, dense: bool) -> None:
    """Refuse what is too large for float32, or where squares of dense elements are taken in it, too large or small for that."""
    for term, weight in zip(terms, weights, strict=True):
        bound = abs(weight) * term.r * float(np.abs(term.left).max(initial=0) * np.abs(term.right).max(initial=0))
        if not bound <= float(np.finfo(np.float32).max):
            raise RefusedError(target, "the weighted factors are over the largest float32")
        if dense and bound and not 1 / _DENSE < bound < _DENSE:
            raise RefusedError(
                target, f"a delta of about {bound:.0e} is too far from 1 to be merged element by element in float32"
            )


def oriented(delta: Mergeable) -> list[Factors]:
    """What a delta adds as the base has it, so that a row is an output or a token: one matrix, or one for each expert."""
    return [turned(delta, term) for term in terms(delta)]


def unscaled(delta: Mergeable) -> list[Factors]:
    """`lora_B` and `lora_A` as the adapter has them."""
    return terms(replace(delta, alpha=float(delta.r), rslora=False))


def turned(delta: Mergeable, term: Factors) -> Factors:
    """From how the factors multiply to how the base has it, and back: an embedding's table is the transpose."""
    return Factors(term.right.T, term.left.T) if isinstance(delta, LowRankEmbedding) else term


def rounding(rounded: Factors, exact: Factors) -> float:
    """The norm of the difference of two matrices whose factors are nearly the same."""
    left = np.concatenate([rounded.left - exact.left, exact.left], axis=1)
    return norm(Factors(left, np.concatenate([rounded.right, rounded.right - exact.right])))


def zero(like: Factors) -> Factors:
    """Zeros of the same shape, of rank 1."""
    return Factors(np.zeros((like.left.shape[0], 1)), np.zeros((1, like.right.shape[1])))


def delta_like(target: str, first: Mergeable, factors: Sequence[Factors]) -> Mergeable:
    """A delta of the kind of `first` that adds these matrices, in float32 and with a scale of 1."""
    lefts, rights = [item.left.astype(np.float32) for item in factors], [item.right.astype(np.float32) for item in factors]
    if not all(np.isfinite(array).all() for array in (*lefts, *rights)):
        raise RefusedError(target, "the weighted factors are over the largest float32")
    left, right, alpha = lefts[0], rights[0], float(factors[0].r)
    if isinstance(first, StackedLowRank):
        return StackedLowRank(np.stack(rights), np.stack(lefts), alpha, transposed_base=first.transposed_base)
    if isinstance(first, LowRankEmbedding):
        return LowRankEmbedding(np.ascontiguousarray(left.T), np.ascontiguousarray(right.T), alpha)
    if isinstance(first, LowRankConv):
        kernel = first.lora_A.shape[1:]
        ones = (1,) * (len(kernel) - 1)
        return LowRankConv(right.reshape(-1, *kernel), left.reshape(*left.shape, *ones), alpha)
    return LowRank(right, left, alpha, transposed_base=first.transposed_base)
