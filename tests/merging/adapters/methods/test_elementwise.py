"""Methods of elements, against their formulas on dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import METHODS
from adapterhub.merging.adapters.methods import Random
from adapterhub.merging.adapters.methods.element_rules import draw_mask, keep_probabilities
from adapterhub_converters.errors import ParameterError
from tests.merging.factored import Dense, close, dense, elect, low_rank, merged, trim, two_deltas


def masks(density: float, shape: tuple[int, int] = (12, 9)) -> list[Dense]:
    """What the seed 0 keeps of two adapters in the module q."""
    return [draw_mask(Random(0, "q").generator(index, 0), shape, density) for index in range(2)]


def dare(deltas: Sequence[Any], density: float) -> list[Dense]:
    return [dense(delta) * mask / density for delta, mask in zip(deltas, masks(density), strict=True)]


def della_parts(deltas: Sequence[Any], density: float, epsilon: float) -> list[Dense]:
    parts = []
    for index, delta in enumerate(deltas):
        matrix = dense(delta)
        ranks = np.argsort(np.argsort(np.abs(matrix), axis=1), axis=1)
        likely = density - epsilon + 2 * epsilon * ranks / (matrix.shape[1] - 1)
        mask = Random(0, "q").generator(index, 0).random(matrix.shape, dtype=np.float32) < likely
        parts.append(matrix * mask / likely)
    return parts


def breadcrumbs_part(delta: Any, density: float, gamma: float) -> Dense:
    matrix = dense(delta)
    order = np.argsort(-np.abs(matrix), axis=None)
    keep = np.zeros(matrix.size, bool)
    keep[order[int(gamma * matrix.size) : int(gamma * matrix.size) + int(density * matrix.size)]] = True
    return np.where(keep.reshape(matrix.shape), matrix, 0)


def sce_of(deltas: Sequence[Any], density: float) -> Dense:
    matrices = np.stack([dense(delta) for delta in deltas])
    variance = matrices.var(axis=0)
    chosen = variance >= np.sort(variance, axis=None)[::-1][int(density * variance.size) - 1]
    parts = matrices * chosen
    energies = (parts**2).mean(axis=(1, 2))
    shares = (energies / energies.sum())[:, None, None]
    agrees = (np.sign(parts) == np.sign(parts.sum(axis=0))) & (parts != 0)
    weight = (shares * agrees).sum(axis=0)
    return (shares * parts * agrees).sum(axis=0) / np.where(weight > 0, weight, 1)


ELEMENTWISE: dict[str, tuple[dict[str, Any], Callable[[list[Any], list[float]], Dense]]] = {
    "ties": ({"density": 0.3, "lambda": 2.0}, lambda d, w: 2 * elect([trim(dense(x), 0.3) for x in d], w)),
    "magnitude_prune": (
        {"density": 0.3}, lambda d, w: sum(weight * trim(dense(x), 0.3) for x, weight in zip(d, w, strict=True))
    ),
    "dare_linear": ({"density": 0.6}, lambda d, w: sum(weight * x for x, weight in zip(dare(d, 0.6), w, strict=True))),
    "dare_ties": ({"density": 0.6, "lambda": 0.5}, lambda d, w: 0.5 * elect(dare(d, 0.6), w)),
    "della": (
        {"density": 0.6, "epsilon": 0.2, "lambda": 0.5}, lambda d, w: 0.5 * elect(della_parts(d, 0.6, 0.2), w)
    ),
    "breadcrumbs": (
        {"density": 0.5, "gamma": 0.1, "lambda": 2.0},
        lambda d, w: sum(2 * weight * breadcrumbs_part(x, 0.5, 0.1) for x, weight in zip(d, w, strict=True)),
    ),
    "sce": ({"density": 0.4}, lambda d, _: sce_of(d, 0.4)),
}  # fmt: skip


@pytest.mark.parametrize("method", ELEMENTWISE)
def test_what_is_done_element_by_element_is_done_to_the_dense_delta(method: str) -> None:
    parameters, formula = ELEMENTWISE[method]
    deltas = two_deltas()
    weights = [1.0, 1.0] if METHODS[method].weights == "none" else [0.7, -0.4]
    close(merged(deltas, weights, method, **parameters), formula(deltas, weights))


@pytest.mark.parametrize(
    ("method", "fits", "does_not"),
    [
        ("breadcrumbs", {"density": 0.9, "gamma": 0.1}, {"density": 0.9, "gamma": 0.11}),
        ("della", {"density": 0.5, "epsilon": 0.4}, {"density": 0.5, "epsilon": 0.5}),
        ("della", {"density": 0.75, "epsilon": 0.25}, {"density": 0.75, "epsilon": 0.26}),
    ],
)
def test_parameters_that_are_no_probabilities_together_are_refused(
    method: str, fits: dict[str, Any], does_not: dict[str, Any]
) -> None:
    merged(two_deltas(), [1, 1], method, **fits)
    with pytest.raises(ParameterError, match="sum to more than 1|is not a probability above 0. Use a smaller epsilon"):
        merged(two_deltas(), [1, 1], method, **does_not)


def test_more_of_a_row_is_kept_of_what_is_larger_in_it() -> None:
    row = np.array([[0.1, -3.0, 0.0, 2.0, -1.0]], np.float32)
    np.testing.assert_allclose(keep_probabilities(row, 0.5, 0.2), [[0.4, 0.7, 0.3, 0.6, 0.5]], rtol=1e-6)


def test_sce_of_what_is_done_element_by_element_to_zeros_is_zero() -> None:
    zero = low_rank(3, alpha=0.0)
    assert not merged([zero, zero], [1, 1], "sce", density=0.4).any()
