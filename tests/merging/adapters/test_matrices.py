"""Matrices of one stack are cut to one rank."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub.merging.adapters.truncation import ModuleSpectra
from tests.merging.adapters.test_truncation import diagonal, spectra_of


def test_the_rank_of_a_stack_is_the_least_that_keeps_a_share_of_the_energy_of_all() -> None:
    spectra = spectra_of(diagonal(4, 3, 4, 3), diagonal(4, 3, 3))
    assert (spectra.rank, spectra.energy) == (2, pytest.approx(34))
    assert [spectra.rank_for(share) for share in (0.0, 25 / 34, 25.001 / 34, 1.0)] == [1, 1, 2, 2]
    np.testing.assert_allclose(spectra.cumulative_energy(), [0, 25, 34])
    part = ModuleSpectra(spectra.parts, 40)  # 6 of it in singular values that were not computed
    assert [part.rank_for(share) for share in (34 / 40, 0.9)] == [2, None]


def test_a_stack_is_truncated_to_one_rank_with_zeros_where_a_matrix_has_less() -> None:
    spectra = spectra_of(diagonal(4, 3, 4, 3), diagonal(4, 3, 3))
    for rank, expected_factors in [(1, [(4,), (3,)]), (2, [(4, 3), (3,)]), (3, [(4, 3), (3,)])]:
        factors = spectra.truncate(rank)
        assert {(factor.left.shape, factor.right.shape) for factor in factors} == {((4, rank), (rank, 3))}
        for factor, values in zip(factors, expected_factors, strict=True):
            exact = diagonal(4, 3, *values)
            np.testing.assert_allclose(factor.left @ factor.right, exact.left @ exact.right, atol=1e-12)


def test_a_rank_of_a_stack_takes_a_row_and_a_column_of_float32_of_each_matrix() -> None:
    assert spectra_of(diagonal(6, 5, 1), diagonal(6, 5, 1)).bytes_for_one == 2 * 4 * (6 + 5)
