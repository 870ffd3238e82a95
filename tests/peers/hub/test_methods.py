"""The page about huggingface_hub's methods says what they do, and none of them is wrong, or empty without a word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.conftest import serving
from tests.support import hf_methods
from tests.support.pages import ROOT

pytestmark = pytest.mark.peer


def test_every_method_of_the_client_works_or_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with serving(tmp_path / "hub") as hub:
        outcomes = hf_methods.outcomes(hub, tmp_path)
    assert {name: words for name, (kind, words) in outcomes.items() if kind == hf_methods.BAD} == {}
    assert (ROOT / "docs" / "hub-methods.md").read_text() == hf_methods.page(outcomes)
