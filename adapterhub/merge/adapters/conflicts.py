"""How far adapters are from agreeing on a module, before anything is merged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapterhub.analysis.low_rank import Factors, inner, times

_SAMPLE = 1 << 16  # elements; the share of a larger matrix is good to 0.2 points


def stack_cosines(stacks: Sequence[Sequence[Factors]]) -> tuple[tuple[float, ...], ...]:
    """The cosine between every two adapters' deltas, each one long vector; 0 where one is zero.

    `stacks[i][j]` is the i-th matrix of adapter j: modules of experts have several.
    """
    count = len(stacks[0])
    gram = np.zeros((count, count))
    for stack in stacks:
        gram += [[inner(one, two) if i >= j else 0.0 for j, two in enumerate(stack)] for i, one in enumerate(stack)]
    lengths = np.sqrt(np.maximum(0.0, np.diagonal(gram)))
    lengths = np.where(lengths > 0, lengths, np.inf)
    whole = (gram + np.tril(gram, -1).T) / np.outer(lengths, lengths)
    return tuple(tuple(map(float, row)) for row in whole)


def sign_conflict(terms: Sequence[Factors], weights: Sequence[float]) -> tuple[float, bool]:
    """The share of elements that some weighted adapters raise and others lower, and whether all elements were looked at.

    Of a matrix of more than 65,536 elements, that many are looked at: random rows crossed with random columns, always
    the same ones.
    """
    m, n = terms[0].left.shape[0], terms[0].right.shape[1]
    exact = m * n <= _SAMPLE
    rows, columns = np.arange(m), np.arange(n)
    if not exact:
        random = np.random.default_rng(0)
        high = min(m, _SAMPLE // min(n, 256))
        rows = random.choice(m, high, replace=False)
        columns = random.choice(n, min(n, _SAMPLE // high), replace=False)
    up = down = np.zeros((), bool)
    for term, weight in zip(terms, weights, strict=True):
        part = times(weight * term.left[rows], term.right[:, columns])
        up, down = up | (part > 0), down | (part < 0)
    return float(np.mean(up & down)), exact
