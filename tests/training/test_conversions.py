"""Bases whose files name or fuse their tensors otherwise than their model has the weights that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support import tiny_families  # noqa: E402
from tests.support.byte_tokenizer import write_tokenizer  # noqa: E402
from tests.training.test_kinds import loaded, whole  # noqa: E402


@pytest.mark.parametrize(
    "family",
    [
        "lara_mini",  # one tensor for four projections, whose sizes transformers asks the model for
        "deepseek_v4",  # a name that a renaming for other files would change
    ],
)
def test_a_saved_base_has_the_states_that_transformers_computes(family: str, tmp_path: Path) -> None:
    tiny_families.model(family).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    base = loaded(whole(tmp_path))
    expected_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids, positions = torch.arange(3, 27)[None], torch.arange(24)[None]
    base.model.eval()
    with torch.no_grad():
        expected = expected_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(base.states(ids, positions), expected, rtol=1e-4, atol=1e-4)
