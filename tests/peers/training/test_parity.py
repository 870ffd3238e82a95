"""Thirty families drawn from transformers' own list, those of 2026 first: right, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from tests.support import parity

SEED, COUNT = 2026, 30


@pytest.mark.parametrize("family", parity.draw(SEED, COUNT))
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_drawn_family_learns_what_it_learns_with_peft_or_is_refused_by_name(
    family: str, quantize: str, tmp_path: Path
) -> None:
    comparison = parity.compare(family, tmp_path, quantize=quantize)
    if comparison.no_reference:
        pytest.skip(f"peft or transformers give no reference: {comparison.no_reference}")
    assert comparison.is_right, comparison
