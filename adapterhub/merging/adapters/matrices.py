"""Deltas of a module as matrices, whatever their kind: conversion there and back, and how far adapters agree on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adapterhub.analysis.low_rank import Factors, inner, norm, terms, times
from adapterhub_converters.adapter import Delta, LowRank, LowRankConv, LowRankEmbedding, StackedLowRank
from adapterhub_converters.errors import RefusedError

_DENSE = 1e15  # the squares of 1e8 such elements are still below the largest float32

_SAMPLE = 1 << 16  # elements compared; the share in a larger matrix is good to 0.2 points

Mergeable = LowRank | LowRankEmbedding | LowRankConv | StackedLowRank


def mergeable_deltas(target: str, deltas: Sequence[Delta]) -> list[Mergeable]:
    """Return the deltas of one module, after checking that they are mergeable: of one kind and one shape."""
    first, mergeable = deltas[0], list[Mergeable]()
    for delta in deltas:
        fits = type(delta) is type(first) and delta.shape == first.shape and _is_transposed(delta) == _is_transposed(first)
        if not fits or not isinstance(delta, Mergeable):  # of other kinds, `factored_out` has left none
            raise RefusedError(target, f"the adapters change it differently: {_kind(first)} and {_kind(delta)}")
        mergeable.append(delta)
    return mergeable


def _is_transposed(delta: Delta) -> bool | None:
    """Return whether the base stores the weight as `(in, out)`; None if that is not known."""
    return getattr(delta, "transposed_base", False)


def _kind(delta: Delta) -> str:
    return f"{type(delta).__name__} {delta.shape}{' transposed' if _is_transposed(delta) else ''}"


def check_size(target: str, terms: Sequence[Factors], weights: Sequence[float], *, dense: bool) -> None:
    """Refuse deltas too large for float32 or, with `dense`, with squares of elements too large or too small for it."""
    for term, weight in zip(terms, weights, strict=True):
        bound = abs(weight) * term.r * float(np.abs(term.left).max(initial=0) * np.abs(term.right).max(initial=0))
        if not bound <= float(np.finfo(np.float32).max):
            raise RefusedError(target, "the weighted factors are over the largest float32")
        # Methods by element square the elements in float32; outside of this range the squares over- or underflow.
        if dense and bound and not 1 / _DENSE < bound < _DENSE:
            raise RefusedError(
                target, f"a delta of about {bound:.0e} is too far from 1 to be merged element by element in float32"
            )


def base_oriented_terms(delta: Mergeable) -> list[Factors]:
    """Return a delta oriented as in the base, with a row for each output or token: one matrix, or one for each expert."""
    return [reorient(delta, term) for term in terms(delta)]


def unscaled_terms(delta: Mergeable) -> list[Factors]:
    """Return `lora_B` and `lora_A` as stored, without the scaling."""
    return terms(replace(delta, alpha=float(delta.r), rslora=False))


def reorient(delta: Mergeable, term: Factors) -> Factors:
    """Convert between the product of the factors and the base's orientation: the table of an embedding is the transpose."""
    return Factors(term.right.T, term.left.T) if isinstance(delta, LowRankEmbedding) else term


def rounding_error(rounded: Factors, exact: Factors) -> float:
    """Return the norm of the difference of two matrices with nearly equal factors."""
    left = np.concatenate([rounded.left - exact.left, exact.left], axis=1)
    return norm(Factors(left, np.concatenate([rounded.right, rounded.right - exact.right])))


def zeros_like(like: Factors) -> Factors:
    """Return zeros of the same shape and rank 1."""
    return Factors(np.zeros((like.left.shape[0], 1)), np.zeros((1, like.right.shape[1])))


def delta_like(target: str, first: Mergeable, factors: Sequence[Factors]) -> Mergeable:
    """Return a delta of the same kind as `first` that adds these matrices, in float32 and with a scaling of 1."""
    lefts, rights = [item.left.astype(np.float32) for item in factors], [item.right.astype(np.float32) for item in factors]
    if not all(np.isfinite(array).all() for array in (*lefts, *rights)):
        raise RefusedError(target, "the weighted factors are over the largest float32")
    left, right, alpha = lefts[0], rights[0], float(factors[0].r)
    if isinstance(first, StackedLowRank):
        return StackedLowRank(np.stack(rights), np.stack(lefts), alpha, transposed_base=first.transposed_base)
    # An embedding's factors are stored transposed and must be contiguous in the file.
    if isinstance(first, LowRankEmbedding):
        return LowRankEmbedding(np.ascontiguousarray(left.T), np.ascontiguousarray(right.T), alpha)
    if isinstance(first, LowRankConv):
        kernel = first.lora_A.shape[1:]
        unit_kernel = (1,) * (len(kernel) - 1)
        return LowRankConv(right.reshape(-1, *kernel), left.reshape(*left.shape, *unit_kernel), alpha)
    return LowRank(right, left, alpha, transposed_base=first.transposed_base)


def stack_cosines(stacks: Sequence[Sequence[Factors]]) -> tuple[tuple[float, ...], ...]:
    """Return the cosines between the deltas of all pairs of adapters, as long vectors; 0 if one is zero.

    Args:
        stacks: `stacks[i][j]` is the i-th matrix of adapter j: modules of experts have several.
    """
    count = len(stacks[0])
    gram = np.zeros((count, count))
    for stack in stacks:
        gram += [[inner(first, second) if i >= j else 0.0 for j, second in enumerate(stack)] for i, first in enumerate(stack)]
    lengths = np.sqrt(np.maximum(0.0, np.diagonal(gram)))
    lengths = np.where(lengths > 0, lengths, np.inf)
    cosines = (gram + np.tril(gram, -1).T) / np.outer(lengths, lengths)
    return tuple(tuple(map(float, row)) for row in cosines)


def sign_conflict(terms: Sequence[Factors], weights: Sequence[float]) -> tuple[float, bool]:
    """Return the share of elements that some weighted adapters raise and others lower, and whether all elements were compared.

    In a matrix of more than 65,536 elements, that many are compared: random rows crossed with random columns, always the same.
    """
    m, n = terms[0].left.shape[0], terms[0].right.shape[1]
    exact = m * n <= _SAMPLE
    rows, columns = np.arange(m), np.arange(n)
    # Crossed rows and columns need only the factors of those, and the seed is fixed so that reports are reproducible.
    if not exact:
        random = np.random.default_rng(0)
        high = min(m, _SAMPLE // min(n, 256))
        rows = random.choice(m, high, replace=False)
        columns = random.choice(n, min(n, _SAMPLE // high), replace=False)
    raised = lowered = np.zeros((), bool)
    for term, weight in zip(terms, weights, strict=True):
        part = times(weight * term.left[rows], term.right[:, columns])
        raised, lowered = raised | (part > 0), lowered | (part < 0)
    return float(np.mean(raised & lowered)), exact
