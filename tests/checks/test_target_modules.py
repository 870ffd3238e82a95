"""Paths of modules in layers, and the modules that an option of peft means."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub.checks import target_modules

Q1 = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("target", "stack", "layer", "block"),
    [
        (Q1, "model.layers.", 1, "model.layers.1"),
        ("transformer.h.10.mlp.experts.3.up_proj", "transformer.h.", 10, "transformer.h.10"),
        ("lm_head", "", None, "lm_head"),
        ("model.layers.1", "", None, "model.layers.1"),  # the layer itself is in none
        (f"model.{'9' * 20}.q_proj", "", None, f"model.{'9' * 20}.q_proj"),
    ],
)
def test_the_layer_of_a_module_is_the_first_number_on_its_path(target: str, stack: str, layer: int | None, block: str) -> None:
    assert (target_modules.stack_of(target), target_modules.layer_of(target)) == (stack, layer)
    assert target_modules.block_of(target) == block


def test_each_list_of_layers_has_its_own_depth() -> None:
    names = ["encoder.layers.0.fc", "encoder.layers.4.fc", "decoder.layers.1.fc", "lm_head"]
    assert target_modules.depths_of(names) == {"encoder.layers.": 5, "decoder.layers.": 2}


@pytest.mark.parametrize(
    ("option", "module", "layers", "matches"),
    [
        (["q_proj"], Q1, None, True),
        (["self_attn.q_proj"], Q1, None, True),
        (["proj"], Q1, None, False),  # whole components only
        (["q_proj"], Q1, {0, 2}, False),
        ([Q1], Q1, {0}, True),  # a whole path means itself, whatever the layers
        ("all-linear", Q1, None, True),
        ("all-linear", "lm_head", None, False),
        (r".*\.q_proj", Q1, None, True),
        (r"q_proj", Q1, None, False),  # a pattern is for the whole path
    ],
)
def test_an_option_means_what_it_means_to_peft(option: Any, module: str, layers: Any, matches: bool) -> None:
    names = set(option) if isinstance(option, list) else set()
    assert target_modules.matches(option, names, module, layers) is matches


@pytest.mark.parametrize(("value", "layers"), [(None, None), ([], None), (3, {3}), ([0, 2], {0, 2}), (["x", 1], {1})])
def test_layers_to_transform_are_numbers_or_all(value: object, layers: set[int] | None) -> None:
    assert target_modules.chosen_layers({"layers_to_transform": value}) == layers


@pytest.mark.parametrize("extra", [0, 20])
def test_a_saved_module_is_any_part_of_a_path_for_few_names_and_for_many(extra: int) -> None:
    names = {"lm_head", "score.dense", *(f"other{n}" for n in range(extra))}
    for module, is_within in (
        ("model.lm_head.dense", True),
        ("a.score.dense.b", True),
        ("my_lm_head", False),
        ("score", False),
    ):
        assert target_modules.is_within(names, module) is is_within
