"""Methods that work on the elements of the dense deltas, as in their papers: by tiles of rows, then the closest thin product.

The elements to keep are chosen in each module separately. If several elements have exactly the threshold's magnitude, all of
them are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub.merging.adapters.tiled_matrix import F32Array, TiledMatrix, dense_rows, magnitude_thresholds, sum_of_squares
from adapterhub_converters.errors import ParameterError

from .element_rules import draw_mask, drop, elect, keep_probabilities, trim, weighted_sum
from .method_table import Between, Density, Lambda, Random


def ties(terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.2, lambda_: Lambda = 1.0) -> TiledMatrix:
    """Trim the small elements, elect a sign for each position, and average the elements that have it.

    Formula: lambda * sum(w_i x_i) / sum(|w_i|) over the i with sign(w_i x_i) = sign(sum(w_i x_i)), where x_i is D_i
        without all but the `density` largest magnitudes
    Rank: the largest among the adapters, unless one is given
    Paper: TIES-Merging: Resolving Interference When Merging Models (Yadav et al., 2023, arXiv 2306.01708)
    Cost: O(m n R), in memory a tile
    """
    return _merge_tiles(terms, _trim(terms, density), lambda parts: elect(parts, weights) * np.float32(lambda_))


def magnitude_prune(terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.5) -> TiledMatrix:
    """The weighted sum of the deltas without their small elements.

    Formula: sum(w_i x_i), where x_i is D_i without all but the `density` largest magnitudes
    Rank: the largest among the adapters, unless one is given
    Paper: Learning both Weights and Connections for Efficient Neural Networks (Han et al., 2015, arXiv 1506.02626)
    Cost: O(m n R), in memory a tile
    """
    return _merge_tiles(terms, _trim(terms, density), lambda parts: weighted_sum(parts, weights))


def breadcrumbs(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    density: Density = 0.9,
    gamma: Annotated[float, Between(0, 1), "share of the largest elements to drop"] = 0.01,
    lambda_: Lambda = 1.0,
) -> TiledMatrix:
    """The weighted sum of the deltas without their outliers and without their small elements.

    Formula: lambda * sum(w_i x_i), where x_i is D_i without the `gamma` largest magnitudes, and of the rest without
        all but the largest that make up `density` of all
    Rank: the largest among the adapters, unless one is given
    Paper: Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks (Davari & Belilovsky, 2023, arXiv 2312.06795)
    Cost: O(m n R), in memory a tile
    """
    if density + gamma > 1 + 1e-9:
        raise ParameterError("density", f"{density:g} and gamma {gamma:g} sum to more than 1", "Let them sum to 1 at most")
    size = _size(terms[0])
    outliers = int(gamma * size)
    # Both bounds of a term in one call, since each call passes over all tiles.
    bounds = [magnitude_thresholds(_tiled(term), (min(size, outliers + int(density * size)), outliers)) for term in terms]

    def keep(part: F32Array, index: int, _start: int) -> F32Array:
        return trim(part, *bounds[index])

    return _merge_tiles(terms, keep, lambda parts: weighted_sum(parts, weights) * np.float32(lambda_))


def dare_linear(terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.5, random: Random) -> TiledMatrix:
    """Drop random elements, scale up the rest, and sum.

    Formula: sum(w_i m_i * D_i / density), where each element of m_i is 1 with the probability `density`, else 0
    Rank: the largest among the adapters, unless one is given
    Paper: Language Models are Super Mario (Yu et al., 2023, arXiv 2311.03099)
    Cost: O(m n R), in memory a tile
    """
    return _merge_tiles(terms, _drop(density, random), lambda parts: weighted_sum(parts, weights))


def dare_ties(
    terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.5, lambda_: Lambda = 1.0, random: Random
) -> TiledMatrix:
    """Drop random elements, scale up the rest, elect a sign for each position, and average the elements that have it.

    Formula: as ties, where x_i is m_i * D_i / density, and each element of m_i is 1 with the probability `density`, else 0
    Rank: the largest among the adapters, unless one is given
    Paper: Language Models are Super Mario (Yu et al., 2023, arXiv 2311.03099)
    Cost: O(m n R), in memory a tile
    """
    return _merge_tiles(terms, _drop(density, random), lambda parts: elect(parts, weights) * np.float32(lambda_))


def della(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    density: Density = 0.5,
    epsilon: Annotated[float, Between(0, 1), "spread of the probabilities around density"] = 0.1,
    lambda_: Lambda = 1.0,
    random: Random,
) -> TiledMatrix:
    """Like dare_ties, but the larger an element is in its row, the more likely it is kept.

    Formula: as ties, where x_i is m_i * D_i / p_i; each element of m_i is 1 with its probability in p_i, which rises evenly
        from density - epsilon for the least magnitude of the row to density + epsilon for the largest
    Rank: the largest among the adapters, unless one is given
    Paper: DELLA-Merging: Reducing Interference through Magnitude-Based Sampling (Deep et al., 2024, arXiv 2406.11617)
    Cost: O(m n (R + log n)), in memory a tile
    """
    if not (density - epsilon > 0 and density + epsilon <= 1):
        reason = f"density {density:g} plus or minus epsilon {epsilon:g} is not a probability above 0"
        raise ParameterError("epsilon", reason, "Use a smaller epsilon")

    def keep(part: F32Array, index: int, start: int) -> F32Array:
        # Divided by its own probability, so that the expectation of each element stays.
        probabilities = keep_probabilities(part, density, epsilon)
        mask = random.generator(index, start).random(part.shape, dtype=np.float32) < probabilities
        rescaled: F32Array = part * mask / probabilities
        return rescaled

    return _merge_tiles(terms, keep, lambda parts: elect(parts, weights) * np.float32(lambda_))


def sce(terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.1) -> TiledMatrix:
    """Select the positions where the adapters differ most, weigh adapters by their energy there, erase the minority's signs.

    Takes no weights.

    Formula: sum(e_i x_i) / sum(e_i) over the i with sign(x_i) = sign(sum(x_i)), where x_i is D_i in the `density` places
        with the largest variance over the adapters, else 0, and e_i = mean(x_i^2)
    Rank: the largest among the adapters, unless one is given
    Paper: FuseChat: Knowledge Fusion of Chat Models (Wan et al., 2024, arXiv 2408.07990)
    Cost: O(m n R), in memory a tile
    """
    rows_of = dense_rows(terms)
    shape = _shape(terms[0])
    spread = TiledMatrix(shape, lambda rows: np.var(rows_of(rows), axis=0, dtype=np.float32))
    [least] = magnitude_thresholds(spread, [int(density * _size(terms[0]))])
    energies = np.zeros(len(terms))
    for _, tile_energies in spread.map_tiles(
        lambda rows, variance: [sum_of_squares(part * (variance >= least)) for part in rows_of(rows)]
    ):
        energies += tile_energies
    # Its tiles are not needed again; the merged matrix has tiles of its own.
    spread.forget()
    shares = list(energies / energies.sum()) if energies.any() else [1.0] * len(terms)

    def make(rows: slice) -> F32Array:
        parts = rows_of(rows)
        chosen = np.var(parts, axis=0, dtype=np.float32) >= least
        return _average_elected([part * chosen for part in parts], shares)

    return TiledMatrix(shape, make)


def _average_elected(parts: Sequence[F32Array], shares: Sequence[float]) -> F32Array:
    """Return the mean, weighted by `shares`, of the elements that have the sign of the plain sum."""
    wins = np.sign(np.sum(parts, axis=0))
    total, share = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for part, adapter_share in zip(parts, shares, strict=True):
        agrees = (np.sign(part) == wins) & (wins != 0)
        total += np.float32(adapter_share) * part * agrees
        share += np.float32(adapter_share) * agrees
    total /= np.where(share > 0, share, np.float32(1))
    return total


Keep = Callable[[F32Array, int, int], F32Array]  # a tile, the number of its adapter, its first row


def _merge_tiles(terms: Sequence[Factors], keep: Keep, merge: Callable[[Sequence[F32Array]], F32Array]) -> TiledMatrix:
    """Return the matrix whose tiles are pruned by `keep`, then merged."""
    rows_of = dense_rows(terms)

    def make(rows: slice) -> F32Array:
        return merge([keep(part, index, rows.start) for index, part in enumerate(rows_of(rows))])

    return TiledMatrix(_shape(terms[0]), make)


def _trim(terms: Sequence[Factors], density: float) -> Keep:
    """Return a rule that keeps the `density` largest magnitudes of each adapter."""
    least = [magnitude_thresholds(_tiled(term), [int(density * _size(term))])[0] for term in terms]
    return lambda part, index, _start: trim(part, least[index])


def _drop(density: float, random: Random) -> Keep:
    """Return a rule that drops random elements and scales up the rest."""

    def keep(part: F32Array, index: int, start: int) -> F32Array:
        return drop(part, draw_mask(random.generator(index, start), part.shape, density), density)

    return keep


def _tiled(term: Factors) -> TiledMatrix:
    """Return a term as a matrix in tiles."""
    rows_of = dense_rows([term])
    return TiledMatrix(_shape(term), lambda rows: rows_of(rows)[0])


def _shape(term: Factors) -> tuple[int, int]:
    return int(term.left.shape[0]), int(term.right.shape[1])


def _size(term: Factors) -> int:
    m, n = _shape(term)
    return m * n
