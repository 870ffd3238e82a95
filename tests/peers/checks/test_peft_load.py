"""peft itself on many drawn adapters: minutes."""

from __future__ import annotations

from pathlib import Path

from tests.support import peft_draws


def test_transformers_does_with_500_drawn_adapters_what_is_said_of_it(tmp_path: Path) -> None:
    assert peft_draws.disagreements(0, 500, tmp_path, loader="transformers") == []


def test_peft_does_with_500_drawn_adapters_what_is_said_of_them(tmp_path: Path) -> None:
    assert peft_draws.disagreements(0, 500, tmp_path) == []
