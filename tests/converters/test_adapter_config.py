"""What `adapter_config.json` means: the scale and rank of each module, and the values that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from adapterhub_converters.adapter import Meta
from adapterhub_converters.errors import FormatError, NotUnderstoodError
from adapterhub_converters.formats.peft import adapter_config

Q, K, DEEP = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.11.self_attn.q_proj"


def lora(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **fields}


def scales(**fields: Any) -> adapter_config.Scales:
    return adapter_config.Scales(lora(**fields), "c")


# ---- scales


def test_a_module_without_a_pattern_has_the_rank_and_alpha_of_the_config() -> None:
    resolved = scales()
    assert (resolved.rank(Q), resolved.alpha(Q), resolved.rslora) == (4, 6.0, False)
    assert scales(use_rslora=True).rslora is True
    assert scales(use_rslora=None).rslora is False


def test_what_a_config_leaves_out_is_what_peft_takes() -> None:
    assert [
        adapter_config.Scales({"peft_type": "LORA"}, "c").rank(Q),
        adapter_config.Scales({"peft_type": "LORA"}, "c").alpha(Q),
    ] == [8, 8.0]
    assert adapter_config.Scales({"peft_type": "VERA"}, "c").rank(Q) == 256


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_lycoris_calls_its_alpha_otherwise(kind: str) -> None:
    assert adapter_config.Scales({"peft_type": kind, "alpha": 3, "lora_alpha": 5}, "c").alpha(Q) == 3.0
    assert adapter_config.Scales({"peft_type": "LORA", "alpha": 3, "lora_alpha": 5}, "c").alpha(Q) == 5.0


def test_a_pattern_counts_for_the_modules_that_it_matches_alone() -> None:
    resolved = scales(
        rank_pattern={"q_proj": 2, "layers.1.self_attn.k_proj": 8}, alpha_pattern={"layers.11.self_attn.q_proj": 9.5}
    )
    assert [resolved.rank(path) for path in (Q, K, DEEP, "model.layers.1.mlp.up_proj")] == [2, 8, 2, 4]
    assert [resolved.alpha(path) for path in (Q, K, DEEP)] == [6.0, 6.0, 9.5]
    assert resolved.notes == []


def test_a_pattern_matches_whole_parts_of_a_name_from_its_end() -> None:
    resolved = scales(rank_pattern={"proj": 2, "layers.1.self_attn": 3})
    assert [resolved.rank(path) for path in (Q, K)] == [4, 4]


def test_a_pattern_of_0_is_no_missing_one() -> None:
    assert scales(alpha_pattern={"q_proj": 0}).alpha(Q) == 0.0


def test_the_first_of_two_patterns_wins_and_is_reported_once_if_they_differ() -> None:
    resolved = scales(alpha_pattern={"q_proj": 1, "self_attn.q_proj": 2}, rank_pattern={"q_proj": 2, "self_attn.q_proj": 2})
    assert [resolved.alpha(Q), resolved.alpha(Q), resolved.rank(Q)] == [1.0, 1.0, 2]
    (note,) = resolved.notes
    assert note.startswith(
        f'{Q}: alpha_pattern "q_proj" and "self_attn.q_proj" both match and differ; the first in the file wins'
    )
    assert list(resolved.unused_patterns()) == []


def test_ranks_that_differ_are_reported_as_ranks() -> None:
    resolved = scales(rank_pattern={"q_proj": 1, "self_attn.q_proj": 2})
    resolved.rank(Q)
    assert f'{Q}: rank_pattern "q_proj"' in resolved.notes[0]


def test_a_pattern_without_a_module_is_reported() -> None:
    resolved = scales(rank_pattern={"q_proj": 2, "o_proj": 3}, alpha_pattern={"v_proj": 5})
    resolved.rank(Q)
    resolved.alpha(Q)
    assert list(resolved.unused_patterns()) == [
        'rank_pattern "o_proj" matches no module of the adapter',
        'alpha_pattern "v_proj" matches no module of the adapter',
    ]


def test_tensors_of_another_rank_than_that_of_the_config_are_reported() -> None:
    resolved = scales()
    resolved.check_rank(Q, 4)
    assert resolved.notes == []
    resolved.check_rank(Q, 2)
    assert resolved.notes == [f"{Q}: rank 2 by its tensors, 4 by the config: peft would refuse to load it"]


def test_the_patterns_of_adalora_are_not_peft_s_to_apply() -> None:
    kind = {"peft_type": "ADALORA", "r": 4, "lora_alpha": 6}
    resolved = adapter_config.Scales({**kind, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}}, "c")
    assert (resolved.rank(Q), resolved.alpha(Q)) == (4, 6.0)
    adapter_config.check({**kind, "rank_pattern": {"q_proj": [True, False]}}, "c")


# ---- checks


@pytest.mark.parametrize(
    "change",
    [
        {"r": 2**40, "lora_alpha": -(2**40), "lora_dropout": None, "alpha": 0.5},
        {"rank_pattern": {"q": 2}, "alpha_pattern": None},
        {"use_rslora": None, "use_qalora": True, "fan_in_fan_out": False, "ensure_weight_tying": True},
        {"revision": "main", "task_type": None, "base_model_name_or_path": "a/b", "init_lora_weights": "gaussian"},
        {"alora_invocation_tokens": [0, 2**31 - 1], "layer_replication": [[0, 4], [2, 5]]},
        {"arrow_config": None, "kasa_config": {}, "use_bdlora": False},
    ],
)
def test_what_is_modeled_passes(change: dict[str, Any]) -> None:
    adapter_config.check(lora(**change), "c")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": None}, "which peft does not have"),
        ({"peft_type": "lora"}, 'Write "LORA"'),
        ({"r": "4"}, '"r" is "4", not a number in range'),
        ({"r": True}, '"r" is true'),
        ({"r": 2**40 + 1}, '"r" is'),
        ({"lora_alpha": None}, '"lora_alpha" is null'),
        ({"lora_alpha": -(2**40) - 1}, '"lora_alpha" is'),
        ({"lora_dropout": "x"}, '"lora_dropout" is "x"'),
        ({"alpha": []}, r'"alpha" is \[\]'),
        ({"qalora_group_size": "16"}, '"qalora_group_size"'),
        ({"rank_pattern": [1]}, '"rank_pattern" is not a map of patterns to numbers'),
        ({"alpha_pattern": {"q": "2"}}, '"alpha_pattern" is not a map'),
        ({"alpha_pattern": {"q": 2, "k": None}}, '"alpha_pattern" is not a map'),
        ({"use_rslora": "yes"}, '"use_rslora" is "yes", which has the wrong type'),
        ({"revision": 2}, '"revision" is 2'),
        ({"alora_invocation_tokens": "x"}, '"alora_invocation_tokens" is not a list of token ids'),
        ({"alora_invocation_tokens": [True]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens"),
        ({"alora_invocation_tokens": [2**31]}, "alora_invocation_tokens"),
        ({"layer_replication": {"a": 1}}, '"layer_replication" is not a list of ranges of layers'),
        ({"layer_replication": [[1, 2, 3]]}, "layer_replication"),
        ({"layer_replication": [[1]]}, "layer_replication"),
        ({"layer_replication": ["ab"]}, "layer_replication"),
        ({"layer_replication": [[1, "2"]]}, "layer_replication"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(FormatError, match=says):
        adapter_config.check(lora(**change), "c")


def test_other_mathematics_is_refused_with_all_its_keys() -> None:
    with pytest.raises(NotUnderstoodError) as caught:
        adapter_config.check(lora(use_bdlora=True, arrow_config={"top_k": 2}, velora_config=None), "c")
    assert caught.value.items == (
        'arrow_config = {"top_k": 2}: changes what the adapter computes and is not supported',
        "use_bdlora = true: changes what the adapter computes and is not supported",
    )
    with pytest.raises(NotUnderstoodError, match="'POLY' is not supported: it mixes several LoRA adapters by task"):
        adapter_config.check({"peft_type": "POLY"}, "c")
    with pytest.raises(NotUnderstoodError, match="'NEW' is not supported$"):
        adapter_config.check({"peft_type": "NEW"}, "c")


def test_a_key_that_is_unknown_and_says_something_is_named() -> None:
    known_keys = {"r": 1, "lora_bias": True, "use_bdlora": True}
    silent = {"a": None, "b": False, "c": 0, "d": "", "e": [], "f": {}}
    assert adapter_config.unknown_keys(lora(**known_keys, **silent, scaling=2, target_r=8)) == ["scaling", "target_r"]
    assert adapter_config.unknown_keys({"peft_type": "ADALORA", "target_r": 8}) == []


# ---- what is recorded


def test_the_meta_of_a_config_has_what_it_records() -> None:
    full = lora(
        base_model_name_or_path="a/b", revision="main", task_type="CAUSAL_LM", lora_dropout=0.25, init_lora_weights="pissa",
        alora_invocation_tokens=[1, 2], layer_replication=[[0, 4], [2, 5]], ensure_weight_tying=True, use_dora=True,
    )  # fmt: skip
    assert adapter_config.meta(full) == Meta(
        base_model="a/b", revision="main", task_type="CAUSAL_LM", dropout=0.25, init="pissa", invocation=(1, 2),
        layers=((0, 4), (2, 5)), ties=True, dora=True,
    )  # fmt: skip
    empty = lora(base_model_name_or_path="", revision="", task_type="", lora_dropout=None, init_lora_weights=None)
    assert adapter_config.meta(empty) == adapter_config.meta(lora()) == Meta()


@pytest.mark.parametrize(
    ("init", "moved"),
    [
        (True, False),
        (False, False),
        (None, False),
        ("gaussian", False),
        ("eva", False),
        ("pissa", True),
        ("olora", True),
        (2, True),
    ],
)
def test_an_initialization_that_moves_the_base_is_told_from_one_that_does_not(init: object, moved: bool) -> None:
    assert adapter_config.residual_init(init) is moved
