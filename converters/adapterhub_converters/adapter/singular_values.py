"""The largest singular values of a matrix and their vectors, without a full decomposition.

Restarted block Krylov iteration (Musco and Musco, arXiv 1504.05477, with the restarts of Baglama and Reichel, 2005): a random
block and its images under `matrix.T @ matrix` span a space, whose best directions begin the next round. It runs in float32 as
long as that is accurate enough, then in float64. Every triplet is checked against the matrix itself. A matrix that has not
converged to float32's rounding after some rounds, and every small one, is decomposed in full.
"""

from __future__ import annotations

import math

import numpy as np

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
"""`(m, r)`, `(r,)` and `(r, n)`, in the order of numpy's `svd`."""

MAX_DIRECT = 512  # rows or columns up to which a full decomposition is quick
_EXTRA_DIRECTIONS = (
    16  # directions beyond those requested, so that a cluster of equal values across the cut costs no extra rounds
)
_ROUNDS = 12  # in each precision, together at most a tenth of the time of a full decomposition
_DEPTH = 12  # blocks of one round
_ROUGH, _EXACT = 1e-5, 2.0**-25  # residuals relative to the largest value; LAPACK's in float32 are 2^-25 as well
_MIN_RATIO = 2.0**-10  # the smallest of the requested values, relative to the largest, that is found this way


def leading_triplets(matrix: np.ndarray, r: int) -> Triplets:
    """Return the `r` largest singular values of a float32 `(m, n)` matrix, in descending order, and their vectors.

    The result is as accurate as that of a full decomposition, and deterministic. It has at most as many values as the matrix.
    """
    r = min(r, *matrix.shape)
    if (scale := _scale(matrix)) != 1:
        U, S, Vt = leading_triplets(matrix / scale, r)
        with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite
            return U, S * scale, Vt
    # The iteration works on the shorter side.
    if matrix.shape[0] < matrix.shape[1]:
        U, S, Vt = leading_triplets(matrix.T, r)
        return Vt.T, S, U.T
    block = r + _EXTRA_DIRECTIONS
    # The space may take at most a third of the columns, or a full decomposition would be faster.
    depth = min(_DEPTH, matrix.shape[1] // (3 * block))
    triplets = _iterate(matrix, r, block, depth) if matrix.shape[1] > MAX_DIRECT and depth > 1 else None
    if triplets is None:
        U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
        triplets = U[:, :r], S[:r], Vt[:r]
    return triplets


def _scale(matrix: np.ndarray) -> np.float32:
    """Return a power of two that divides the matrix exactly, so that no product overflows or underflows; usually 1."""
    largest = float(np.abs(matrix).max(initial=0))
    return np.float32(1) if 2.0**-20 < largest < 2.0**20 or not largest else np.exp2(np.float32(math.frexp(largest)[1] - 1))


def _iterate(matrix: np.ndarray, r: int, block: int, depth: int) -> Triplets | None:
    """Return the triplets of a tall matrix, or None if they did not converge."""
    V = np.random.default_rng(0).standard_normal((matrix.shape[1], block), np.float32)
    for dtype, tolerance in ((np.float32, _ROUGH), (np.float64, _EXACT)):
        matrix, V = matrix.astype(dtype, copy=False), V.astype(dtype)
        for _ in range(_ROUNDS):
            U, S, V = _krylov_round(matrix, V, depth)
            if S[r - 1] <= _MIN_RATIO * S[0]:  # squared, it would be lost in rounding
                return None
            residual = matrix.T @ U[:, :r] - V[:, :r] * S[:r]  # that of matrix @ V is 0 by construction
            if np.linalg.norm(residual, axis=0).max() <= tolerance * S[0]:
                break
        else:
            return None
    return U[:, :r].astype(np.float32), S[:r].astype(np.float32), V[:, :r].T.astype(np.float32)


def _krylov_round(matrix: np.ndarray, V: np.ndarray, depth: int) -> Triplets:
    """Return the best `V.shape[1]` triplets in the space of `V` and its images, with the right vectors as columns."""
    block = V.shape[1]
    space = np.empty((matrix.shape[1], depth * block), matrix.dtype)
    images = np.empty((matrix.shape[0], depth * block), matrix.dtype)
    for step in range(depth):
        columns, earlier = slice(step * block, (step + 1) * block), space[:, : step * block]
        for _ in range(2):  # twice is enough for orthogonality
            V = _orthonormal(V - earlier @ (earlier.T @ V))
        space[:, columns], images[:, columns] = V, matrix @ V
        V = matrix.T @ images[:, columns]
    vectors, squares, _ = np.linalg.svd(images.T @ images)
    S = np.sqrt(squares[:block])
    return images @ (vectors[:, :block] * _inverse(S)), S, space @ vectors[:, :block]


def _orthonormal(block: np.ndarray) -> np.ndarray:
    """Return orthonormal columns with the same span; zero columns if there are fewer directions than columns.

    This uses matrix products instead of LAPACK's QR, whose threads wait in a spin loop: (14336, 384) took 36 s on busy cores.
    """
    vectors, squares, _ = np.linalg.svd(block.T @ block)
    is_significant = squares > 4 * len(squares) * np.finfo(block.dtype).eps * squares[0]
    result: np.ndarray = block @ (vectors * _inverse(np.sqrt(np.where(is_significant, squares, 0))))
    return result


def _inverse(values: np.ndarray) -> np.ndarray:
    """Return the inverse of each value, and 0 for 0."""
    result: np.ndarray = np.divide(1, values, out=np.zeros_like(values), where=values > 0)
    return result
