"""A tiny base of every causal family that transformers builds: what peft trains on all of its linear modules fits it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub_converters.bases import read_base
from tests.conftest import need_module
from tests.support import tiny

pytestmark = pytest.mark.peer

NUMBERS: dict[str, Any] = {
    **tiny.CONFIG, **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "num_experts_per_tok": 2, "moe_k": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "q_lora_rank": 24,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
MAX_PARAMETERS = 3_000_000  # parameters; families with other keys are as large as their defaults
CODES = {
    "no-such-module", "other-prefix", "shape-mismatch", "uncovered-module", "base-deeper", "base-shallower", "not-targeted",
    "vocab-differs",
}  # fmt: skip
DIVIDED = {"deepseek_v4", "hrm_text", "lara_mini"}
"""Families whose modules transformers makes of parts of tensors, or renames throughout."""


def small_model(cls: Any) -> Any:
    """A small model of a class; None if these numbers make none."""
    import torch

    numbers = {key: value for key, value in {**NUMBERS, **tiny.CONFIGS.get(cls.__name__, {})}.items() if value is not None}
    try:
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in cls(cls.config_class(**numbers)).parameters()) > MAX_PARAMETERS:
                return None
        return cls(cls.config_class(**numbers))
    except Exception:  # each class checks its numbers in its own way
        return None


def trained(model: Any, folder: Path) -> bool:
    """Save an adapter on all linear modules; False for a model that peft cannot adapt."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    try:
        get_peft_model(model, config).save_pretrained(folder, save_embedding_layers=False)
    except ValueError:
        return False
    return True


def test_no_family_of_every_eighth_has_a_false_error(tmp_path: Path) -> None:
    """tests/peers has all families: importing their modules takes most of the time."""
    errors = errors_of(slice(0, None, 8), tmp_path)
    assert len(errors) >= 10
    assert {family for family, codes in errors.items() if codes} <= DIVIDED


def errors_of(families: slice, tmp_path: Path) -> dict[str, set[str]]:
    """The errors about modules in an adapter on all linear modules, by the family, where a model of it can be made."""
    need_module("peft")
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    codes_by_family: dict[str, set[str]] = {}
    for family, name in [*CLASSES.items()][families]:
        model = small_model(getattr(transformers, name if isinstance(name, str) else name[0], None))
        if model is None:
            continue
        try:
            model.save_pretrained(tmp_path / "base")
            if trained(model, tmp_path / "adapter"):
                report = checks.check(tmp_path / "adapter", base=read_base(tmp_path / "base"))
                codes_by_family[family] = {problem.code for problem in report.problems} & CODES
        finally:
            for part in ("base", "adapter"):
                shutil.rmtree(tmp_path / part, ignore_errors=True)
    print(f"{len(codes_by_family)} families")
    return codes_by_family


@pytest.mark.parametrize(
    ("name", "tied", "config"),
    [
        ("GPT2LMHeadModel", True, {"target_modules": ["c_attn", "lm_head"]}),
        ("GPTNeoXForCausalLM", False, {"target_modules": ["query_key_value", "lm_head"]}),
        ("LlamaForCausalLM", True, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}),
        ("GraniteMoeForCausalLM", False, {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
        ("NemotronHForCausalLM", False, {"target_modules": ["in_proj", "q_proj", "up_proj"]}),
        ("VoxtralForConditionalGeneration", False, {"target_modules": ["q_proj"]}),
        ("Qwen2AudioForConditionalGeneration", False, {"target_modules": ["q_proj"]}),
    ],
)
def test_tables_experts_and_audio_models_have_no_false_error(
    tmp_path: Path, name: str, tied: bool, config: dict[str, Any]
) -> None:
    need_module("peft")
    tiny.model(name, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tiny.adapter(tiny.model(name, tie_word_embeddings=tied), tmp_path / "adapter", **config)
    report = checks.check(tmp_path / "adapter", base=read_base(tmp_path / "base"))
    assert not {problem.code for problem in report.problems} & CODES
