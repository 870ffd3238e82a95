"""Methods in the subspace that the adapters span together: aligned, whitened, flattened. No dense delta is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from adapterhub.analysis.low_rank import Factors, basis, spectrum, stack_terms, times, transpose_times

from .element_rules import draw_mask, drop, elect, trim, weighted_sum
from .method_table import Between, Density, Lambda, OneOf, Random

F64Array = NDArray[np.float64]
_NOISE = 1e-7  # of the largest singular value: what the square root of a Gram matrix cannot tell from zero


def knots(terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.2, lambda_: Lambda = 1.0) -> Factors:
    """Align the deltas in one left basis, and merge their parts in it by TIES.

    Formula: U S ties([V_1', …]), where U S [V_1' … V_N'] = [D_1 … D_N] is a singular value decomposition
    Rank: the sum of the ranks, or less
    Paper: Model merging with SVD to tie the Knots (Stoica et al., 2024, arXiv 2410.19735)
    Cost: O((m + n) R^2)
    """
    left, s, cores = _align(terms)
    aligned = [core / s[:, None] for core in cores]
    return Factors(left * s, lambda_ * elect([_trim(part, density) for part in aligned], weights))


def core_space(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    rule: Annotated[str, OneOf(("ties", "linear", "dare_ties", "dare_linear")), "merge of the cores"] = "ties",
    density: Density = 0.2,
    lambda_: Lambda = 1.0,
    random: Random,
) -> Factors:
    """Write the deltas as small cores between common bases, and merge the cores element by element.

    The bases are those of the stacked deltas, not of the stacked factors as in the paper: they have the same span, and do not
    depend on how a delta is factored. With `linear` the result is the weighted sum.

    Formula: U rule([C_1 …]) V', where C_i = U' D_i V, U has the left singular vectors of [D_1 … D_N], and V the right ones
        of [D_1; …; D_N]
    Rank: the sum of the ranks, or less
    Paper: Accurate and Efficient Low-Rank Model Merging in Core Space (Panariello et al., 2025, arXiv 2509.17786)
    Cost: O((m + n) R^2)
    """
    left, _, _ = _align(terms)
    right, _, _ = _align([Factors(term.right.T, term.left.T) for term in terms])
    cores = [transpose_times(left, term.left) @ transpose_times(term.right.T, right) for term in terms]
    if rule.endswith("ties") and not rule.startswith("dare"):
        cores = [_trim(core, density) for core in cores]
    elif rule.startswith("dare"):
        masks = (draw_mask(random.generator(index), core.shape, density) for index, core in enumerate(cores))
        cores = [drop(core, mask, density) for core, mask in zip(cores, masks, strict=True)]
    merged = (elect if rule.endswith("ties") else weighted_sum)(cores, weights)
    return Factors(times(left, lambda_ * merged), right.T)


def tsv(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    share: Annotated[float, Between(0, 1, above=True), "share of each adapter's singular vectors to use"] = 1.0,
    lambda_: Lambda = 1.0,
) -> Factors:
    """Take each adapter's leading singular vectors, and rotate them until those of different adapters do not overlap.

    Formula: lambda * W(U) S W(V)', where U = [U_1 …], S = diag(w_i S_i) and V = [V_1 …] are the first `share` of each
        adapter's singular triplets, and W(X) = P Q' for the singular value decomposition X = P D Q' (its directions with
        a D of zero left out)
    Rank: the sum of the ranks that were kept, or less
    Paper: Task Singular Vectors: Reducing Task Interference in Model Merging (Gargiulo et al., 2024, arXiv 2412.00081)
    Cost: O((m + n) R^2)
    """
    firsts = []
    for term in terms:
        term_spectrum = spectrum(term)
        firsts.append((term_spectrum, max(1, round(share * term_spectrum.rank))))
    left = _whiten(np.concatenate([term_spectrum.u[:, :k] for term_spectrum, k in firsts], axis=1))
    right = _whiten(np.concatenate([term_spectrum.vt[:k].T for term_spectrum, k in firsts], axis=1))
    values = np.concatenate([weight * term_spectrum.s[:k] for (term_spectrum, k), weight in zip(firsts, weights, strict=True)])
    return Factors(left * (lambda_ * values), right.T)


def iso_c(terms: Sequence[Factors], weights: Sequence[float], *, lambda_: Lambda = 1.0) -> Factors:
    """The weighted sum with all its singular values made equal.

    The mean is over the singular values that are not zero: a sum of adapters has far fewer of them than rows and columns.

    Formula: lambda * mean(S) U V', where U S V' = sum(w_i D_i)
    Rank: that of the sum, unless one is given
    Paper: No Task Left Behind: Isotropic Model Merging (Marczak et al., 2025, arXiv 2502.04959)
    Cost: O((m + n) R^2)
    """
    sum_spectrum = spectrum(stack_terms(terms, weights))
    values = sum_spectrum.s[: sum_spectrum.rank]
    return Factors(lambda_ * values.mean() * sum_spectrum.u[:, : sum_spectrum.rank], sum_spectrum.vt[: sum_spectrum.rank])


def _align(terms: Sequence[Factors]) -> tuple[F64Array, F64Array, list[F64Array]]:
    """Return the left singular vectors and the values of `[D_1 … D_N]`, and every `D_i` in them: `left.T @ D_i`."""
    # Unit columns: the basis must not depend on how a delta is split between its factors.
    lengths = [np.linalg.norm(term.left, axis=0) for term in terms]
    units = [term.left / np.where(length, length, 1) for term, length in zip(terms, lengths, strict=True)]
    q, _ = basis(np.concatenate(units, axis=1))
    cores = [transpose_times(q, term.left) @ term.right for term in terms]
    vectors, squares, _ = np.linalg.svd(sum(core @ core.T for core in cores))
    s = np.sqrt(squares)
    keep = s > _NOISE * s[0]
    keep[0] = True
    turn = vectors[:, keep]
    s = np.where(s[keep] > 0, s[keep], 1.0)
    return times(q, turn), s, [turn.T @ core for core in cores]


def _whiten(columns: F64Array) -> F64Array:
    """Return the nearest matrix with orthonormal columns; of the same span if there are more columns than directions."""
    vectors, squares, _ = np.linalg.svd(transpose_times(columns, columns))
    keep = squares > _NOISE**2 * squares[0]
    # The inverse root of the Gram matrix, on the directions that the columns have.
    return times(columns, (vectors[:, keep] / np.sqrt(squares[keep])) @ vectors[:, keep].T)


def _trim(array: F64Array, density: float) -> F64Array:
    """Zero all but the `density` largest magnitudes."""
    count = int(density * array.size)
    least = float(np.partition(np.abs(array), array.size - count, axis=None)[array.size - count]) if count else np.inf
    return trim(array, least)
