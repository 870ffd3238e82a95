"""Bases whose files name or fuse their tensors otherwise than their model has the weights that transformers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support import tiny_families  # noqa: E402
from tests.support.byte_tokenizer import write_tokenizer  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402
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


def families_in_float32() -> list[str]:
    """The families with a tiny model that keep parameters in float32 whatever the type of the others is."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    in_float32 = [family for family, name in CLASSES.items() if getattr(transformers, name)._keep_in_fp32_modules_strict]
    return [family for family in in_float32 if (tiny_families.parameter_count(family) or 1e9) < 2e6]


def test_parameters_have_the_types_that_transformers_loads_them_with(tmp_path: Path) -> None:
    # Not a test for each: transformers would import all of its models in each process that collects tests.
    for family in (*families_in_float32(), "llama"):
        check_types(family, tmp_path / family)


def check_types(family: str, tmp_path: Path) -> None:
    """Assert that our base has the types of transformers' model of the same files."""
    tiny_families.model(family).bfloat16().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    settings = dataclasses.replace(whole(tmp_path).base, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_base(tmp_path, settings, None, location="c.toml").model
    expected = {name: parameter.dtype for name, parameter in model.named_parameters()}
    types = {name: parameter.dtype for name, parameter in ours.named_parameters() if name in expected}
    assert types, family
    assert types == {name: expected[name] for name in types}, family
