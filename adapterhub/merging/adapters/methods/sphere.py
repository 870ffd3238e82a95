"""Methods that treat deltas as vectors on a sphere; the results are weighted sums of the deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from adapterhub.analysis.low_rank import Factors, cosines, inner, norm, stack_terms

from .method_table import Between, OneOf

_PARALLEL = 1e-6  # sine of an angle below which a great circle is a straight line
_STEPS, _NEAR = 200, 1e-12  # of the search for the Riemannian mean


def slerp(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    t: Annotated[float, Between(0, 1), "position between the first adapter and the second"] = 0.5,
) -> Factors:
    """The point t of the way from the first of two adapters to the second, along the great circle.

    A straight line if the two are parallel, or one of them is zero. Takes no weights.

    Formula: sin((1 - t) W) / sin W * D_1 + sin(t W) / sin W * D_2, where W is the angle between the two
    Rank: the sum of the ranks, or less
    Paper: Animating rotation with quaternion curves (Shoemake, 1985)
    Cost: O((m + n) R^2)
    """
    first, second = terms
    a, b = _arc(_cosine(inner(first, second), norm(first), norm(second)), t)
    return stack_terms(terms, (a, b))


def nuslerp(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    by: Annotated[str, OneOf(("all", "rows", "columns")), "whether the delta turns as a whole or by rows or columns"] = "all",
) -> Factors:
    """Slerp between two adapters by their weights, of the whole delta or of each row or column separately.

    Formula: as slerp, with t = w_2 / (w_1 + w_2), for the delta as one vector or for each of its rows or columns
    Rank: the sum of the ranks, or less
    Paper: Animating rotation with quaternion curves (Shoemake, 1985); the variant is known from mergekit
    Cost: O((m + n) R^2)
    """
    first, second = terms
    t = weights[1] / sum(weights)
    if by == "all":
        a, b = _arc(_cosine(inner(first, second), norm(first), norm(second)), t)
        return stack_terms(terms, (a, b))
    if by == "columns":
        transposed = nuslerp([Factors(term.right.T, term.left.T) for term in terms], weights, by="rows")
        return Factors(transposed.right.T, transposed.left.T)
    lengths = [np.sqrt(np.maximum(_row_products(term, term), 0)) for term in terms]
    dots = _row_products(first, second)
    arcs = np.array([_arc(_cosine(*row), t) for row in zip(dots, *lengths, strict=True)])
    left = np.concatenate([arcs[:, :1] * first.left, arcs[:, 1:] * second.left], axis=1)
    return Factors(left, np.concatenate([first.right, second.right]))


def _row_products(first: Factors, second: Factors) -> NDArray[np.float64]:
    """Return the inner products of corresponding rows."""
    product: NDArray[np.float64] = np.einsum("ij,ij->i", first.left @ (first.right @ second.right.T), second.left)
    return product


def _cosine(dot: float, x: float, y: float) -> float:
    """Return the cosine, clipped to its range; 1 if a vector is zero."""
    return min(1.0, max(-1.0, dot / (x * y))) if x * y else 1.0


def _arc(cosine: float, t: float) -> tuple[float, float]:
    """Return the factors of the ends of an arc for the point `t` of the way along it."""
    angle = math.acos(cosine)
    if math.sin(angle) < _PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def karcher(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The mean of the directions on the sphere, with the mean of the lengths.

    The direction with the least weighted squared angles to all deltas, found by steps along the mean of the directions to them.
    Deltas of zero have no direction, and count only in the mean length.

    Formula: u with sum(w_i log_u(D_i / |D_i|)) = 0, times sum(w_i |D_i|); the weights sum to 1
    Rank: the sum of the ranks, or less
    Paper: Riemannian center of mass and mollifier smoothing (Karcher, 1977)
    Cost: O((m + n) R^2)
    """
    shares = np.array(weights) / sum(weights)
    lengths = np.array([norm(term) for term in terms])
    length = float(shares @ lengths)
    used = (shares > 0) & (lengths > 0)
    if not used.any():
        return stack_terms(terms, [0.0] * len(terms))
    gram = np.array(cosines(terms))[np.ix_(used, used)]
    mean = np.zeros(len(terms))
    mean[used] = _mean_direction(gram, shares[used] / shares[used].sum()) / lengths[used]
    return stack_terms(terms, list(length * mean))


def _mean_direction(gram: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the coefficients of the Karcher mean of unit vectors with these inner products."""
    point = shares.copy()
    if point @ gram @ point < _NEAR:  # they cancel, and any point of a circle may be the mean: start at the first vector
        point = np.eye(len(shares))[0]
    point /= math.sqrt(point @ gram @ point)
    for _ in range(_STEPS):
        toward = np.clip(gram @ point, -1, 1)
        angles = np.arccos(toward)
        sines = np.sqrt(1 - toward**2)
        stretch = shares * np.where(sines > _PARALLEL, angles / np.maximum(sines, _PARALLEL), 1.0)
        step = stretch - (stretch @ toward) * point
        size = math.sqrt(max(0.0, float(step @ gram @ step)))
        if size < _NEAR:
            break
        point = math.cos(size) * point + math.sin(size) / size * step
        point /= math.sqrt(point @ gram @ point)
    return point


def model_stock(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The mean, pulled back toward the base the more the adapters disagree.

    Takes no weights. A module that only one adapter changes keeps that adapter's delta.

    Formula: t * mean(D_i), t = N c / (1 + (N - 1) c), c the mean cosine between two deltas, at least 0
    Rank: the sum of the ranks, or less
    Paper: Model Stock: All we need is just a few fine-tuned models (Jang et al., 2024, arXiv 2403.19522)
    Cost: O((m + n) R^2)
    """
    count = len(terms)
    if count == 1:
        return stack_terms(terms, [1.0])
    pairs = [row[j] for i, row in enumerate(cosines(terms)) for j in range(i)]
    cosine = max(0.0, sum(pairs) / len(pairs))
    t = count * cosine / (1 + (count - 1) * cosine)
    return stack_terms(terms, [t / count] * count)
