"""Which modules are adapted, and of what size: peft's own answers, and a refusal of what matches nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from adapterhub.training.layers.targets import Sizes, resolve
from adapterhub.training.train_config import LoRAConfig
from adapterhub_converters.errors import RefusedError
from tests.conftest import need_module

LINEARS = [
    f"model.layers.{layer}.{kind}"
    for layer in range(3)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
]
TABLE = "model.embed_tokens"
CASES: list[dict[str, Any]] = [
    {"targets": ("q_proj",)},
    {"targets": ("self_attn.q_proj", "1.up_proj", "embed_tokens")},
    {"targets": r".*\.[12]\.self_attn\.(q|v)_proj"},
    {"targets": ("q_proj", "up_proj"), "layers": (0, 2)},
    {"targets": ("q_proj", "up_proj"), "layers": (1,)},
    {"targets": ("q_proj", "v_proj"), "exclude": ("1.self_attn.q_proj",)},
    {"targets": ("q_proj", "v_proj"), "rank_pattern": {"q_proj": 4, r"layers\.1.*": 2},
        "alpha_pattern": {"1.self_attn.v_proj": 3}},
]  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("words", CASES)
def test_the_words_mean_what_they_mean_to_peft(words: dict[str, Any]) -> None:
    need_module("peft")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    config = LoRAConfig(**words)
    theirs = LoraConfig(
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        layers_to_transform=list(config.layers) if config.layers else None,
        exclude_modules=list(config.exclude) or None,
    )
    chosen = resolve(config, LINEARS, [TABLE], "c.toml")
    expected = [path for path in [TABLE, *LINEARS] if check_target_module_exists(theirs, path)]
    assert chosen == [path for path in expected if not re.search("_Excluded", str(check_target_module_exists(theirs, path)))]
    sizes = Sizes(config)
    for path in chosen:
        assert sizes.rank(path) == config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), 16)
        assert sizes.alpha(path) == config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), 32)


def test_all_linear_leaves_the_table_alone_and_a_plain_word_is_a_name() -> None:
    assert resolve(LoRAConfig(), LINEARS, [TABLE], "") == LINEARS
    assert resolve(LoRAConfig(targets="q_proj"), LINEARS, [TABLE], "") == [path for path in LINEARS if path.endswith("q_proj")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            {"targets": ("proj",)},
            r"[lora] targets: 'proj' matches no linear layer of this model. The model has embed_tokens, q_proj",
        ),
        ({"targets": ("lm_head",)}, "[lora] targets: the output layer cannot be a target"),
        ({"targets": "("}, "[lora] targets: '(' is neither a module name nor a valid regular expression"),
        ({"targets": ".*gate"}, "[lora] targets: '.*gate' matches no linear layer"),
        ({"layers": (7,)}, "[lora] layers: no target is in layer 7. Targets are in [0, 1, 2]"),
        ({"exclude": ("k_proj",)}, "[lora] exclude: 'k_proj' matches no linear layer"),
        ({"targets": ("q_proj",), "exclude": ("q_proj",)}, "[lora]: no target module is left"),
        ({"rank_pattern": {"k_proj": 4}}, "[lora] rank_pattern: pattern 'k_proj' matches no target"),
    ],
)
def test_what_matches_nothing_is_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        resolve(LoRAConfig(**words), LINEARS, [TABLE], "c.toml")
    assert says in str(caught.value)
