"""Families against peft and transformers, first loss and gradients: a few here, thirty in tests/peers/training."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.conftest import need_module
from tests.support import parity


@pytest.mark.peer
@pytest.mark.parametrize(("family", "quantize"), [("llama", "nf4"), ("deepseek_v32", "none"), ("lara_mini", "nf4")])
def test_a_family_learns_what_it_learns_with_peft(family: str, quantize: str, tmp_path: Path) -> None:
    need_module("peft")
    comparison = parity.compare(family, tmp_path, quantize=quantize)
    assert comparison.no_reference is None
    assert comparison.refusal is None
    assert comparison.is_right, comparison


def test_the_draw_is_of_families_that_transformers_lists_and_the_same_each_time() -> None:
    drawn = parity.draw(7, 4)
    assert drawn == parity.draw(7, 4)
    assert len(set(drawn)) == 4
    assert set(drawn) & set(parity.NEW)


def test_a_difference_is_not_right() -> None:
    assert parity.Comparison("llama", 1e-7, 1e-6).is_right
    assert not parity.Comparison("llama", 1e-3, 1e-6).is_right
    assert not parity.Comparison("llama", float("nan"), 0.0).is_right
