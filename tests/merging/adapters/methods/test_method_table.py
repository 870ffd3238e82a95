"""The table of methods explains each of its rows."""

from __future__ import annotations

import pytest

from adapterhub.merging import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_method_shows_its_formula_paper_rank_and_cost(method: str) -> None:
    text = METHODS[method].run.__doc__ or ""
    assert [part for part in ("Formula: ", "Rank: ", "Paper: ", "Cost: ") if part not in text] == []
    assert METHODS[method].summary.endswith(".")
