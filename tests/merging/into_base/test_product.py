"""Products of chains of factors: rounded once a step, whatever the path."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adapterhub.merging.into_base.product import chain, keeps_order, panels, product


@pytest.mark.parametrize("r", [1, 2, 7, 8, 16, 64, 200])
@pytest.mark.parametrize("fast", [True, False])
def test_the_product_is_the_chain_on_any_path(r: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    left_factor = rng.normal(size=(24, r)).astype(np.float32)
    right_factor = rng.normal(size=(r, 700)).astype(np.float32)
    if not fast:
        monkeypatch.setattr("adapterhub.merging.into_base.product.keeps_order", lambda columns, r: False)
    expected = sum(chain(left_factor[:, a:b], right_factor[a:b]) for a, b in panels(r))
    np.testing.assert_array_equal(product(left_factor, right_factor, np.empty((24, 700), np.float32)), expected)


@pytest.mark.parametrize("r", [3, 16])
@pytest.mark.parametrize("fast", [True, False])
def test_a_large_product_is_the_chain_in_every_column(r: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    left_factor, right_factor = (rng.normal(size=size).astype(np.float32) for size in ((374, r), (r, 1405)))
    if not fast:
        monkeypatch.setattr("adapterhub.merging.into_base.product.out_of_order", lambda columns, r: None)
    actual = product(left_factor, right_factor, np.empty((374, 1405), np.float32))
    rows = [*range(14), *range(366, 374)]
    np.testing.assert_array_equal(actual[rows], chain(left_factor[rows], right_factor))


def test_the_chain_rounds_once_a_step() -> None:
    from fractions import Fraction

    rng = np.random.default_rng(3)
    left_factor, right_factor = (rng.normal(size=size).astype(np.float32) for size in ((6, 9), (9, 5)))
    expected = np.zeros((6, 5), np.float32)
    for i in range(6):
        for j in range(5):
            total = np.float32(0)
            for k in range(9):
                total = nearest(
                    Fraction(float(left_factor[i, k])) * Fraction(float(right_factor[k, j])) + Fraction(float(total))
                )
            expected[i, j] = total
    np.testing.assert_array_equal(chain(left_factor, right_factor), expected)
    assert isinstance(keeps_order(64, 4), bool)


def nearest(exact: Any) -> np.float32:
    """The float32 closest to a fraction (no ties in random numbers)."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda value: abs(exact - type(exact)(float(value))))
