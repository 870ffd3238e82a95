"""The names of tensors in memory are those that the installed transformers gives them, for every model that it renames."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from adapterhub_converters import bases
from adapterhub_converters.bases.names_in_memory import renaming
from tests.conftest import need_module
from tests.support import transformers_names

TABLE: dict[str, Any] = json.loads(transformers_names.TABLE.read_text())
# A type that transformers makes of another type's class is a row of its own.
CLASSES = sorted(name for name in TABLE["models"] if name not in TABLE["types"])
DRAWN = random.Random(7).sample(CLASSES, 8)


@pytest.mark.peer
def test_every_rule_is_that_of_the_installed_transformers() -> None:
    need_module("transformers")
    import transformers
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    assert TABLE["transformers"] == transformers.__version__, "run `python -m tests.support.transformers_names`"
    keys = _build_checkpoint_conversion_mapping()
    assert {key: list(transformers_names._rules(keys[key])) for key in TABLE["rules"]} == TABLE["rules"]
    # What is not in the table is of every model, or of no class that the auto classes make.
    alike = {json.dumps(rules) for rules in TABLE["rules"].values()}
    left_out = {key for key in keys if (rules := list(transformers_names._rules(keys[key]))) and json.dumps(rules) not in alike}
    assert left_out == {"legacy", "MtpModel", "tipsv2_dpt"}


@pytest.mark.peer
@pytest.mark.parametrize("class_name", [*DRAWN, "Cosmos3EdgeForConditionalGeneration", "DoryForCausalLM", "Dinov2Model"])
def test_every_tensor_has_the_name_that_transformers_gives_it(class_name: str) -> None:
    need_module("transformers")
    from transformers.core_model_loading import apply_renamings

    model_type = next(kind for kind, names in transformers_names.classes_by_type().items() if class_name in names)
    model = transformers_names.empty_model(model_type, class_name)
    if model is None:
        pytest.skip("transformers makes no such model without another library")
    in_memory, prefix = list(model.state_dict()), f"{model.base_model_prefix}."
    reverse = [transform.reverse_transform() for transform in transformers_names.transforms_of(model)[::-1]]
    saved = {apply_renamings(name, reverse) for name in in_memory}
    # A base model's files lack the prefix, and those of a model with a head have it.
    names = sorted(saved | set(in_memory) | {prefix + name for name in saved} | {name.removeprefix(prefix) for name in saved})
    transforms = transformers_names.transforms_of(model)
    assert renaming(model_type, class_name).names(names) == {name: apply_renamings(name, transforms) for name in names}


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [
        ("cosmos3_edge", "Cosmos3EdgeForConditionalGeneration"),
        ("", "Cosmos3EdgeForConditionalGeneration"),
        ("cosmos3_edge", ""),
    ],
)
def test_a_family_is_found_by_its_class_or_by_its_type(model_type: str, class_name: str) -> None:
    base = bases.BaseSpec("base", "hf", class_name, model_type, {})
    assert base.renaming("layers.0.mlp.up_proj.weight") == "model.language_model.layers.0.mlp.fc1.weight"
    assert base.renaming.module("layers.0.self_attn.to_q") == "model.language_model.layers.0.self_attn.q_proj"


def test_a_class_of_a_renamed_type_without_rules_is_not_renamed() -> None:
    assert renaming("llama", "LlamaForCausalLM").rules == ()
    for name, row in TABLE["models"].items():
        if not row["rules"]:
            assert renaming("", name).rules == ()


def test_a_rule_for_tensors_that_a_file_lacks_does_not_apply() -> None:
    tower = "vision_tower.encoder.blocks.3.mlp."
    rename = renaming("kimi_k25").names
    old = rename([f"{tower}fc0.weight", f"{tower}fc1.weight"])
    new = rename([f"{tower}fc1.weight", f"{tower}fc2.weight"])
    assert [name.rpartition("mlp.")[2] for name in old.values()] == ["fc1.weight", "fc2.weight"]
    assert [name.rpartition("mlp.")[2] for name in new.values()] == ["fc1.weight", "fc2.weight"]
