"""Low-rank matrices as pairs of factors: sums, norms, angles and best approximations, never the dense matrix.

For `(m, n)` and a stacked rank R everything here costs O((m + n) R^2 + R^3) against O(m n min(m, n)) for a dense
SVD, and gives the same numbers: with `left = Q_l R_l` and `right.T = Q_r R_r`, the singular values of the product
are those of the small `R_l R_r.T`. Computed in float64, so that a result is as good as its rounding to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """The matrix `left @ right`; `left` is `(m, r)`, `right` `(r, n)`, float64."""

    left: F64Array
    right: F64Array

    @property
    def r(self) -> int:
        """How many columns `left` has; the rank is at most that."""
        return int(self.left.shape[1])


@dataclass(frozen=True, eq=False, slots=True)
class Spectrum:
    """A thin singular value decomposition: `u @ diag(s) @ vt`, `s` falling."""

    u: F64Array
    s: F64Array
    vt: F64Array

    @property
    def rank(self) -> int:
        """How many singular values are more than rounding noise; at least 1, so that zero has factors too."""
        noise = 16 * np.finfo(np.float64).eps * len(self.s) * self.s[0]
        return max(1, int(np.count_nonzero(self.s > noise)))

    def truncated(self, rank: int) -> Factors:
        """The closest matrix of that rank (Eckart-Young), its singular values shared between the factors."""
        root = np.sqrt(self.s[:rank])
        return Factors(self.u[:, :rank] * root, root[:, None] * self.vt[:rank])


def stacked(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """`sum(weight * term)`, exactly: `[left_1 …] @ [weight_1 * right_1; …]`."""
    left = np.concatenate([term.left for term in terms], axis=1)
    return Factors(left, np.concatenate([weight * term.right for term, weight in zip(terms, weights, strict=True)]))


def spectrum(matrix: Factors) -> Spectrum:
    """The singular values and vectors of the product."""
    q_left, r_left = np.linalg.qr(matrix.left)
    q_right, r_right = np.linalg.qr(matrix.right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return Spectrum(q_left @ u, s, vt @ q_right.T)


def norm(matrix: Factors) -> float:
    """Frobenius. Through QR, not through Gram matrices, which would lose half the digits of a small difference."""
    _, r_left = np.linalg.qr(matrix.left)
    _, r_right = np.linalg.qr(matrix.right.T)
    return float(np.linalg.norm(r_left @ r_right.T))


def distance(one: Factors, two: Factors) -> float:
    """The norm of the difference."""
    return norm(stacked([one, two], [1.0, -1.0]))


def inner(one: Factors, two: Factors) -> float:
    """`sum(one * two)` over all elements: `trace((left_1.T left_2) (right_2 right_1.T))`."""
    return float(np.sum((one.left.T @ two.left) * (one.right @ two.right.T)))


def cosines(terms: Sequence[Factors]) -> tuple[tuple[float, ...], ...]:
    """The cosine between every two terms, as if they were long vectors; 0 where one is zero."""
    lengths = [norm(term) for term in terms]
    return tuple(
        tuple(inner(a, b) / (x * y) if x * y else 0.0 for b, y in zip(terms, lengths, strict=True))
        for a, x in zip(terms, lengths, strict=True)
    )
