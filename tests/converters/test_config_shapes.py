"""What a config says of a model's shapes is what transformers builds from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapterhub import checks
from adapterhub.checks import target_modules
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import read_base
from adapterhub_converters.bases.config_shapes import FAMILIES, shapes_from_config
from tests.checks.test_loaded_base import CONFIGS
from tests.conftest import need_module
from tests.support import folders, tiny

DECODERS = [name for architecture in architecture_lookup.ARCHITECTURES for name in architecture.classes]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"head_dim": 32}), ("LlamaForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("LlamaModel", {}), ("LlamaForSequenceClassification", {}), ("Qwen3Model", {}),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": None}), ("DeepseekV3ForCausalLM", {"first_k_dense_replace": 0}),
    ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 2}), ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}),
    ("FalconForCausalLM", {"new_decoder_architecture": False, "multi_query": True}),
    ("FalconForCausalLM", {"new_decoder_architecture": False, "multi_query": False}),
    ("GPT2LMHeadModel", {"n_inner": 80}), ("GPT2Model", {}), ("BloomModel", {}),
]  # fmt: skip
OTHERS = [
    "BertModel", "BertForMaskedLM", "BertForSequenceClassification", "RobertaForMaskedLM", "XLMRobertaModel",
    "DistilBertModel", "DistilBertForSequenceClassification", "DebertaV2Model", "DebertaV2ForSequenceClassification",
    "T5ForConditionalGeneration", "T5EncoderModel", "MT5ForConditionalGeneration", "BartModel", "BartForConditionalGeneration",
    "WhisperForConditionalGeneration", "WhisperModel", "ViTModel", "ViTForImageClassification",
]  # fmt: skip
CASES = [(name, {}) for name in DECODERS] + MORE + [(name, {}) for name in OTHERS]


def numbers(name: str) -> dict[str, Any]:
    if name in OTHERS:
        family = {"XLMRoberta": "Roberta", "MT5": "T5"}
        stem = next(
            prefix for prefix in (*CONFIGS, *family) if name.startswith((f"{prefix}For", f"{prefix}Model", f"{prefix}Enc"))
        )
        return CONFIGS[family.get(stem, stem)]
    causal = name.replace("ForSequenceClassification", "ForCausalLM")
    return tiny.CONFIG | tiny.CONFIGS.get(causal, {})


@pytest.mark.peer
@pytest.mark.parametrize(("name", "changes"), CASES, ids=[f"{name} {changes or ''}".strip() for name, changes in CASES])
def test_a_config_alone_gives_the_shapes_transformers_builds(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    for module in ("torch", "transformers"):
        need_module(module)
    import torch
    import transformers

    cls = getattr(transformers, name)
    settings = {**numbers(name), **changes}
    with torch.device("meta"):
        model = cls(cls.config_class(**{key: value for key, value in settings.items() if value is not None or key in changes}))
    model.config.architectures = [name]
    model.config.save_pretrained(tmp_path)
    spec = read_base(tmp_path)
    parameter_shapes = {parameter: tuple(tensor.shape) for parameter, tensor in model.named_parameters(remove_duplicate=False)}
    assert spec.derived
    assert {parameter: tensor.shape for parameter, tensor in spec.derived.items()}.items() <= parameter_shapes.items()
    # All there is in a layer: whatever is missing there is an error to a check.
    layered = {
        parameter
        for parameter, shape in parameter_shapes.items()
        if len(shape) > 1 and target_modules.layer_of(parameter) is not None
    }
    unsaid = {parameter for parameter in layered if "relative_attention_bias" in parameter or parameter.endswith("_bias")}
    convolutions = {
        parameter for parameter in layered if len(parameter_shapes[parameter]) > 2 and parameter.endswith(".weight")
    }
    assert layered - unsaid - convolutions <= set(spec.derived)
    assert spec.fingerprint is None


def test_every_architecture_of_llama_cpp_is_known() -> None:
    kinds = {kind for architecture in architecture_lookup.ARCHITECTURES for kind in architecture.classes.values()}
    assert kinds <= set(FAMILIES)


@pytest.mark.parametrize(
    "config",
    [
        {}, {"model_type": "mamba"}, {"model_type": "llama"}, {"model_type": "llama", "num_hidden_layers": "2"},
        {"model_type": "llama", "num_hidden_layers": -1}, tiny.CONFIG | {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": ["llama"]},
        {"model_type": "qwen2_moe", "num_hidden_layers": 1, "mlp_only_layers": 3, "vocab_size": 8, "hidden_size": 8},
        {"model_type": "deepseek_v3", "num_hidden_layers": 1, "first_k_dense_replace": None, "vocab_size": 8, "hidden_size": 8},
    ],
)  # fmt: skip
def test_an_incomplete_config_gives_none(config: dict[str, Any]) -> None:
    assert shapes_from_config(config, "LlamaForCausalLM") == {}


@pytest.mark.parametrize(
    ("shapes", "config", "expected_codes"),
    [
        (folders.pairs(2), {}, set()),
        (folders.pairs(2, size=(8, 16)), {}, {"shape-mismatch"}),
        (folders.pairs(3), {}, {"base-shallower"}),
        (folders.pairs(1), {}, {"base-deeper"}),
        (folders.pairs(2) | folders.pairs(2, module="model.layers.{}.mlp.wi"), {}, {"no-such-module"}),
        (folders.pairs(2), {"target_modules": ["q_proj", "v_proj"]}, {"uncovered-module"}),
        ({**folders.pairs(2), "model.norm.weight": (8,)}, {"modules_to_save": ["norm"]}, set()),
        ({**folders.pairs(2), "score.weight": (3, 8)}, {"modules_to_save": ["score"], "task_type": "SEQ_CLS"}, {"new-head"}),
        ({**folders.pairs(2), "lm_head.weight": (13, 8)}, {"modules_to_save": ["lm_head"]}, {"vocab-differs"}),
    ],
)
def test_a_base_of_which_only_the_config_is_here(
    tmp_path: Path, shapes: folders.Shapes, config: dict[str, Any], expected_codes: set[str]
) -> None:
    numbers = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 12,
        "tie_word_embeddings": False, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(numbers))
    report = checks.check(folders.adapter(tmp_path / "a", shapes, **config), base=read_base(tmp_path))
    assert {problem.code for problem in report.problems} - {"unpinned"} == {"base-without-weights"} | expected_codes
