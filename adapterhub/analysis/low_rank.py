"""Low-rank matrices as pairs of factors: sums, norms, angles and best approximations, never the dense matrix.

For `(m, n)` and a stacked rank R every function here costs O((m + n) R^2 + R^3), against O(m n min(m, n)) for a dense SVD: with
orthonormal `Q_l` and `Q_r`, `left = Q_l R_l` and `right.T = Q_r R_r`, the singular values of the product are those of the small
`R_l R_r.T`. All is computed in float64, so that a result is as exact as its rounding to float32.

The bases come from Gram matrices, not from LAPACK's QR: (4096, 32) takes 0.3 ms against 2.7 ms, and the QR of an OpenBLAS
with two threads on two busy cores took 440 ms. A Gram matrix in float64 preserves what is above 1e-8 of the largest term;
below that, float32 factors cannot be told from rounding (6e-8). Products are computed in pieces that OpenBLAS gives to one
thread: its threads spin while they wait for each other, which on a busy machine takes a thousand times the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.adapter import Delta, Factored, Hadamard, Kronecker, LowRankEmbedding, StackedLowRank, as_pairs
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

F64Array = NDArray[np.float64]

_CANCELS = 1e-8  # of a sum of squares: a difference above this share of it is exact to 1e-8
_NOISE = 2.0**-24  # half a step of float32
_ONE_THREAD = 1 << 18  # multiplications in a product that OpenBLAS does not split (interface/gemm.c)


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """The matrix `left @ right`; `left` is `(m, r)`, `right` `(r, n)`, float64."""

    left: F64Array
    right: F64Array

    @property
    def r(self) -> int:
        """The number of columns of `left`, an upper bound of the rank."""
        return int(self.left.shape[1])


@dataclass(frozen=True, eq=False, slots=True)
class Spectrum:
    """A thin singular value decomposition: `u @ diag(s) @ vt`, `s` descending."""

    u: F64Array
    s: F64Array
    vt: F64Array

    @property
    def rank(self) -> int:
        """The number of singular values that float32 factors can represent next to the first; at least 1, also for zero."""
        return max(1, int(np.count_nonzero(self.s > _NOISE * self.s[0])))

    def truncate(self, rank: int) -> Factors:
        """Return the closest matrix of that rank (Eckart-Young), its singular values split between the factors."""
        root = np.sqrt(self.s[:rank])
        return Factors(self.u[:, :rank] * root, root[:, None] * self.vt[:rank])


def terms(delta: Delta) -> list[Factors]:
    """Return the matrices of a delta, its scaling included: one, or one for each expert of a stack.

    That of an embedding is `(d, vocab)`, the product of its factors; that of a convolution has the kernel in its columns.

    Raises:
        RefusedError: A convolution has a core, so that its product has another form; or the factors would be far larger.
    """
    if isinstance(delta, Factored):
        delta = as_pairs({"delta": delta})["delta"]
    lefts, rights = delta.lora_B.astype(np.float64), delta.scaling * delta.lora_A.astype(np.float64)
    if isinstance(delta, StackedLowRank):
        return [Factors(left, right) for left, right in zip(lefts, rights, strict=True)]
    return [Factors(lefts.reshape(lefts.shape[:2]), rights.reshape(len(rights), -1))]


def are_comparable(first: Delta, second: Delta) -> bool:
    """Return whether the matrices of two deltas can be compared: of the same shape and orientation."""
    embeddings = {isinstance(delta, LowRankEmbedding) for delta in (first, second)}
    return len(embeddings) == 1 and first.shape == second.shape


def times(tall: F64Array, small: F64Array) -> F64Array:
    """Return `tall @ small` for `(m, r)` and `(r, k)`."""
    out = np.empty((tall.shape[0], small.shape[1]))
    for piece in _pieces(len(tall), small.size):
        np.matmul(tall[piece], small, out=out[piece])
    return out


def transpose_times(first: F64Array, second: F64Array) -> F64Array:
    """Return `first.T @ second` for `(m, r)` and `(m, k)`: all inner products of their columns."""
    total = np.zeros((first.shape[1], second.shape[1]))
    for piece in _pieces(len(first), total.size):
        total += first[piece].T @ second[piece]
    return total


def _pieces(rows: int, work: int) -> Iterator[slice]:
    """Return ranges of rows, small enough for OpenBLAS to stay in one thread."""
    step = max(32, _ONE_THREAD // max(1, work))
    return (slice(start, start + step) for start in range(0, rows, step))


def stack_terms(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return `sum(weight * term)`, exactly: `[left_1 …] @ [weight_1 * right_1; …]`."""
    left = np.concatenate([term.left for term in terms], axis=1)
    return Factors(left, np.concatenate([weight * term.right for term, weight in zip(terms, weights, strict=True)]))


def spectrum(matrix: Factors) -> Spectrum:
    """Return the singular values and vectors of the product."""
    q_left, small, q_right = _reduce(matrix)
    u, s, vt = np.linalg.svd(small, full_matrices=False)
    return Spectrum(times(q_left, u), s, times(q_right, vt.T).T)


def singular_values(matrix: Factors) -> F64Array:
    """Return the singular values of the product, descending."""
    return np.asarray(np.linalg.svd(_reduce(matrix)[1], compute_uv=False), np.float64)


def _reduce(matrix: Factors) -> tuple[F64Array, F64Array, F64Array]:
    """Return orthonormal `q_left` and `q_right`, and `small` such that `q_left @ small @ q_right.T` is the product."""
    # Unit columns and rows, so that the result does not depend on how a delta is split between its factors.
    columns, rows = (np.linalg.norm(matrix.left, axis=0), np.linalg.norm(matrix.right, axis=1))
    q_left, r_left = basis(matrix.left / np.where(columns, columns, 1))
    q_right, r_right = basis(matrix.right.T / np.where(rows, rows, 1))
    return q_left, (r_left * (columns * rows)) @ r_right.T, q_right


def basis(x: F64Array) -> tuple[F64Array, F64Array]:
    """Return orthonormal `q` `(m, k)` and `q.T @ x`, with `q @ q.T @ x = x` up to 1e-8 of `x`.

    Two rounds, as in CholeskyQR2 (Yamamoto et al., 2015): the second restores what the first lost in squaring.
    """
    q = x
    for _ in range(2):
        vectors, values, _ = np.linalg.svd(transpose_times(q, q))  # of a symmetric matrix; the threads of eigh spin, see above
        keep = values > len(values) * np.finfo(np.float64).eps * max(float(values[0]), np.finfo(np.float64).tiny)
        keep[0] = True  # of a zero matrix too, so that no result is empty
        q = times(q, vectors[:, keep] / np.sqrt(np.maximum(values[keep], np.finfo(np.float64).tiny)))
    return q, transpose_times(q, x)


def norm(matrix: Factors) -> float:
    """Return the Frobenius norm; NaN if the factors contain one."""
    return float(np.sqrt(np.maximum(0.0, inner(matrix, matrix))))


def delta_norm(delta: Delta) -> float | None:
    """Return the Frobenius norm of a delta; None if it has no factors, or they contain NaN."""
    try:
        total = math.hypot(*map(norm, terms(delta)))
    except RefusedError:
        return None
    return total if math.isfinite(total) else None


def norm_cost(delta: Delta) -> int:
    """Return roughly the multiplications of `delta_norm`, from shapes alone; reading and converting a number counts as 16."""
    r = delta.pair_rank if isinstance(delta, Hadamard | Kronecker) else delta.r
    stack, rows, *columns = delta.shape if isinstance(delta, StackedLowRank) else (1, *delta.shape)
    return stack * (rows + math.prod(columns)) * r * (r + 16)


def distance(first: Factors, second: Factors) -> float:
    """Return the norm of the difference: exactly 0 for the same factors, otherwise with noise below 1e-14 of their norms.

    Computed from inner products if they do not cancel; else from the differences of the factors, which are small if one matrix
    is the other rounded; else from the triangles of the stacked factors, which cancel at the rounding of float64.
    """
    if first.r == second.r:
        left_change, right_change = (
            Factors(first.left - second.left, first.right),
            Factors(second.left, first.right - second.right),
        )
        # Equal factors: exactly 0, without the noise of the sums below.
        if not (left_change.left.any() or right_change.right.any()):
            return 0.0
    else:
        left_change, right_change = first, Factors(-second.left, second.right)
    for x, y in ((first, Factors(-second.left, second.right)), (left_change, right_change)):
        squares = inner(x, x), 2 * inner(x, y), inner(y, y)
        # No cancellation: the sum has at least half of its digits left.
        if sum(squares) > _CANCELS * (squares[0] + squares[2]):
            return float(np.sqrt(sum(squares)))
    difference = stack_terms([first, second], [1.0, -1.0])
    columns, rows = (np.linalg.norm(difference.left, axis=0), np.linalg.norm(difference.right, axis=1))
    left = _triangle(difference.left / np.where(columns, columns, 1))
    right = _triangle(difference.right.T / np.where(rows, rows, 1))
    return float(np.linalg.norm(times(left * (columns * rows), np.ascontiguousarray(right.T))))


def _triangle(x: F64Array) -> F64Array:
    """Return `c` with `c.T @ c = x.T @ x`, as exact as R of a QR: a second basis covers what the first lost (1e-8 of `x`)."""
    q, c = basis(x)
    remainder = x - times(q, c)
    return np.concatenate([c, basis(remainder)[1]]) if remainder.any() else c


def inner(first: Factors, second: Factors) -> float:
    """Return `sum(first * second)` over all elements: `trace((left_1.T left_2) (right_2 right_1.T))`."""
    return float(np.sum(transpose_times(first.left, second.left) * transpose_times(first.right.T, second.right.T)))


def cosines(terms: Sequence[Factors]) -> tuple[tuple[float, ...], ...]:
    """Return the cosines between all pairs of terms, as long vectors; 0 if one is zero."""
    lengths = [norm(term) for term in terms]
    return tuple(
        tuple(inner(a, b) / (x * y) if x * y else 0.0 for b, y in zip(terms, lengths, strict=True))
        for a, x in zip(terms, lengths, strict=True)
    )
