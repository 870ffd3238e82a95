"""Matrices as pairs of factors: every number is that of the dense matrix, without making it."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub.analysis import low_rank
from adapterhub.analysis.low_rank import Factors


def factors(r: int, m: int = 30, n: int = 20, seed: int = 0) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(m, r)), rng.normal(size=(r, n)))


def dense(matrix: Factors) -> np.ndarray:
    return matrix.left @ matrix.right


@pytest.mark.parametrize("r", [1, 5, 40])  # 40: more than the smaller side
def test_a_spectrum_is_that_of_the_dense_matrix(r: int) -> None:
    matrix = factors(r)
    expected = np.linalg.svd(dense(matrix), compute_uv=False)[: min(r, 20)]
    spectrum = low_rank.spectrum(matrix)
    np.testing.assert_allclose(spectrum.s[: len(expected)], expected, rtol=1e-9)
    np.testing.assert_allclose(spectrum.u * spectrum.s @ spectrum.vt, dense(matrix), atol=1e-9 * expected[0])
    assert spectrum.rank == min(r, 20)
    error = np.linalg.norm(dense(matrix) - dense(spectrum.truncate(1)))
    assert error == pytest.approx(np.sqrt(np.sum(expected[1:] ** 2)), abs=1e-9 * expected[0])


def test_a_sum_of_terms_is_exact_in_stacked_factors() -> None:
    terms, weights = [factors(2), factors(3, seed=1)], [0.5, -2.0]
    stacked = low_rank.stack_terms(terms, weights)
    assert stacked.r == 5
    np.testing.assert_allclose(dense(stacked), 0.5 * dense(terms[0]) - 2 * dense(terms[1]), atol=1e-12)


def test_norms_and_angles_are_those_of_the_dense_matrices() -> None:
    first, second = factors(2), factors(3, seed=1)
    assert low_rank.norm(first) == pytest.approx(np.linalg.norm(dense(first)))
    assert low_rank.inner(first, second) == pytest.approx(np.sum(dense(first) * dense(second)))
    zero = Factors(np.zeros((30, 1)), np.zeros((1, 20)))
    assert low_rank.cosines([first, zero])[0] == pytest.approx((1.0, 0.0))
    assert np.isnan(low_rank.norm(Factors(np.full((30, 1), np.nan), np.ones((1, 20)))))


def test_a_distance_of_nearly_equal_matrices_is_not_lost_in_rounding() -> None:
    matrix = factors(3)
    assert low_rank.distance(matrix, matrix) == 0
    rounded = Factors(matrix.left.astype(np.float32).astype(np.float64), matrix.right)
    expected = np.linalg.norm((matrix.left - rounded.left) @ matrix.right)
    assert low_rank.distance(matrix, rounded) == pytest.approx(expected, rel=1e-6)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    turned = Factors(matrix.left @ turn, turn.T @ matrix.right)  # the same matrix by other factors
    assert low_rank.distance(matrix, turned) < 1e-12 * low_rank.norm(matrix)


def test_a_zero_matrix_has_rank_1_and_no_energy() -> None:
    zero = Factors(np.zeros((30, 2)), np.zeros((2, 20)))
    spectrum = low_rank.spectrum(zero)
    assert (spectrum.rank, low_rank.norm(zero)) == (1, 0)
    assert not spectrum.s.any()
