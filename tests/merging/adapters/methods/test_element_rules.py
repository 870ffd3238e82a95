"""The element-wise rules of merging, each on numbers small enough to work out by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from adapterhub.merging.adapters.methods import element_rules


def row(*numbers: float, dtype: type = np.float32) -> np.ndarray:
    return np.array([numbers], dtype)


def test_trimming_keeps_from_the_least_to_below_the_most() -> None:
    array = row(-3, -2, -1, 1, 2, 3)
    assert (element_rules.trim(array, 2) == row(-3, -2, 0, 0, 2, 3)).all()
    assert (element_rules.trim(array, 1, 3) == row(0, -2, -1, 1, 2, 0)).all()
    assert (element_rules.trim(array, 2, 3) == row(0, -2, 0, 0, 2, 0)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_has_each_part_times_its_weight_in_the_type_of_the_parts(dtype: type) -> None:
    parts = [row(1, 2, dtype=dtype), row(10, 20, dtype=dtype), row(100, 200, dtype=dtype)]
    total = element_rules.weighted_sum(parts, [2, 3, -0.5])
    assert total.dtype == dtype
    assert (total == row(-18, -36)).all()
    assert (parts[0] == row(1, 2)).all()  # the parts stay


def test_an_election_averages_the_weighted_elements_of_the_winning_sign() -> None:
    parts = [row(4, -1, 2, 0, 1), row(2, 5, -2, 0, 1), row(-3, -1, 0, 0, 1)]
    # Weighted: (4, -1, 2, 0, 1), (4, 10, -4, 0, 2), (-1.5, -.5, 0, 0, .5); sums 6.5, 8.5, -2, 0, 3.5.
    elected = element_rules.elect(parts, [1, 2, 0.5])
    assert np.allclose(elected, row(8 / 3, 10 / 2, -4 / 2, 0, 3.5 / 3.5), rtol=1e-6, atol=0)


def test_a_negative_weight_votes_with_the_other_sign_and_counts_by_its_magnitude() -> None:
    elected = element_rules.elect([row(1, 2), row(3, -4)], [1, -2])
    # Weighted: (1, 2) and (-6, 8); sums -5 and 10.
    assert np.allclose(elected, row(-6 / 2, 10 / 3), rtol=1e-6, atol=0)


def test_a_zero_takes_no_part_in_an_average_and_shares_below_1_divide_too() -> None:
    assert (element_rules.elect([row(0, 0), row(0.5, -0.5)], [1, 1]) == row(0.5, -0.5)).all()
    assert np.allclose(element_rules.elect([row(0.5, -0.5)], [0.25]), row(0.5, -0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "rule",
    [
        element_rules.weighted_sum,
        element_rules.elect,
        lambda parts, weights: element_rules.elect_as_peft(parts, weights, "total"),
    ],
)
def test_each_part_has_a_weight(rule: Callable[..., object]) -> None:
    for weights in ([1], [1, 2, 3]):
        with pytest.raises(ValueError, match="zip"):
            rule([row(1), row(2)], weights)


def test_a_tie_of_signs_is_nobodys() -> None:
    assert (element_rules.elect([row(1), row(-1)], [1, 1]) == 0).all()


def test_peft_elects_by_unweighted_parts_with_zero_as_plus_and_divides_by_their_number() -> None:
    parts = [row(4, -5, 1, 0), row(-1, 1, -1, 0), row(-1, 1, 0, 0)]
    assert (element_rules.elect_as_peft(parts, [1, 2, 4], "total") == row(4, -5, 1, 0)).all()
    assert (element_rules.elect_as_peft(parts, [1, 2, 4], "frequency") == row((-2 - 4) / 2, (2 + 4) / 2, 1, 0)).all()


def test_dropping_divides_what_is_kept_by_the_density() -> None:
    assert (element_rules.drop(row(1, 2, 3), np.array([[True, False, True]]), 0.25) == row(4, 0, 12)).all()


def test_a_mask_keeps_each_element_with_the_probability_of_the_density() -> None:
    def share(density: float) -> float:
        return float(element_rules.draw_mask(np.random.default_rng(0), (100, 100), density).mean())

    assert (share(0.0), share(1.0)) == (0.0, 1.0)
    assert abs(share(0.3) - 0.3) < 0.02


def test_the_larger_an_element_is_in_its_row_the_likelier_it_is_kept() -> None:
    probabilities = element_rules.keep_probabilities(np.array([[-3, 1, 2], [0, -5, 4]], np.float32), 0.5, 0.2)
    assert np.allclose(probabilities, [[0.7, 0.3, 0.5], [0.3, 0.7, 0.5]], rtol=1e-6, atol=0)
    assert probabilities.dtype == np.float32


def test_a_row_of_one_element_has_the_density_itself() -> None:
    assert np.allclose(element_rules.keep_probabilities(row(3).T @ row(1), 0.5, 0.2), 0.5)
    assert np.allclose(element_rules.keep_probabilities(np.array([[1, -2]], np.float32), 0.5, 0.2), [[0.3, 0.7]])
