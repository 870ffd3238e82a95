"""Estimates of how many samples would tell."""

from __future__ import annotations

import pytest

from adapterhub.evidence.sample_estimates import needed_text, two_digits


@pytest.mark.parametrize(
    ("count", "rounded"), [(1, 1), (77, 77), (99, 99), (100, 100), (101, 110), (2_621, 2_700), (9_991, 10_000)]
)
def test_an_estimate_is_rounded_up_to_two_digits(count: int, rounded: int) -> None:
    assert two_digits(count) == rounded


def test_the_first_step_that_suffices_is_shown_and_beyond_a_limit_none_is_looked_for() -> None:
    assert needed_text(10, lambda count: count >= 13) == "about 13"
    assert needed_text(40, lambda count: count >= 290) == "about 300"
    assert needed_text(40, lambda _count: False) == "over 100,000"
