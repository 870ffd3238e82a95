"""Encoders, classifiers, models of text to text and of images: nothing on the right base, the right finding on a wrong one."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.checks.adapter_features import _ENCODERS
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from tests.conftest import need_module

pytestmark = pytest.mark.peer

TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0,
}  # fmt: skip
IMAGE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
LLAMA = {**TEXT, "num_key_value_heads": 2}
VISION = {key: value for key, value in IMAGE.items() if key != "num_hidden_layers"} | {"num_hidden_layers": 1}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": TEXT, "Roberta": TEXT | {"pad_token_id": 1}, "DebertaV2": TEXT, "Deberta": TEXT,
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 40},
    "T5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 64},
    "Bart": SEQ2SEQ | {"max_position_embeddings": 40},
    "Whisper": SEQ2SEQ | {
        "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "ViT": IMAGE, "Llama": LLAMA, "Qwen3": LLAMA | {"head_dim": 8},
    "Llava": {
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
        "text_config": {"model_type": "llama", **LLAMA},
    },
    "Gemma3": {"vision_config": VISION, "text_config": {**LLAMA, "head_dim": 8}, "mm_tokens_per_image": 4},
    "Qwen2VL": {
        "text_config": {**LLAMA, "rope_parameters": QWEN_ROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8},
    },
}  # fmt: skip
WIDTHS = ("hidden_size", "d_model", "dim")

# Family, the class its files were saved from, the class the adapter was trained on, peft's config, the notes there are.
CASES: list[tuple[str, str, str, dict[str, Any], set[str]]] = [
    ("Bert", "ForMaskedLM", "ForSequenceClassification", {"task_type": "SEQ_CLS"}, {"new-head"}),
    ("Bert", "ForMaskedLM", "ForTokenClassification", {"task_type": "TOKEN_CLS"}, {"new-head"}),
    ("Bert", "ForMaskedLM", "ForQuestionAnswering", {"task_type": "QUESTION_ANS"}, {"new-head"}),
    ("Bert", "ForSequenceClassification", "ForSequenceClassification", {"task_type": "SEQ_CLS"}, set()),
    ("Bert", "ForMaskedLM", "ForMaskedLM", {"target_modules": "all-linear"}, set()),
    (
        "Bert", "Model", "ForSequenceClassification", {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"]},
        {"new-head", "headless-base"},
    ),
    ("Bert", "Model", "Model", {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "dense"]}, set()),
    ("Bert", "ForMaskedLM", "Model", {"task_type": "FEATURE_EXTRACTION"}, {"headless-adapter"}),
    ("Roberta", "ForMaskedLM", "ForSequenceClassification", {"task_type": "SEQ_CLS"}, {"new-head"}),
    (
        "DistilBert", "ForMaskedLM", "ForSequenceClassification",
        {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"], "modules_to_save": ["pre_classifier", "classifier"]},
        {"new-head"},
    ),
    ("DebertaV2", "ForMaskedLM", "ForSequenceClassification", {"task_type": "SEQ_CLS"}, {"new-head"}),
    ("Deberta", "ForMaskedLM", "ForSequenceClassification", {"task_type": "SEQ_CLS"}, {"new-head"}),
    ("T5", "ForConditionalGeneration", "ForConditionalGeneration", {"task_type": "SEQ_2_SEQ_LM"}, set()),
    ("T5", "ForConditionalGeneration", "ForConditionalGeneration", {"target_modules": "all-linear"}, set()),
    ("T5", "ForConditionalGeneration", "EncoderModel", {"task_type": "FEATURE_EXTRACTION", "target_modules": ["q"]}, set()),
    ("T5", "ForConditionalGeneration", "EncoderModel", {"target_modules": ["q", "v"]}, set()),
    ("Bart", "ForConditionalGeneration", "ForConditionalGeneration", {"target_modules": "all-linear"}, set()),
    ("Bart", "Model", "ForConditionalGeneration", {"task_type": "SEQ_2_SEQ_LM"}, {"headless-base"}),
    ("Whisper", "ForConditionalGeneration", "ForConditionalGeneration", {"target_modules": "all-linear"}, set()),
    ("Whisper", "ForConditionalGeneration", "ForConditionalGeneration", {"target_modules": ["conv1", "fc1"]}, set()),
    (
        "ViT", "Model", "ForImageClassification", {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]},
        {"new-head", "headless-base", "renamed-modules"},
    ),
    ("ViT", "ForImageClassification", "ForImageClassification", {"target_modules": "all-linear"}, {"renamed-modules"}),
    ("Llama", "ForCausalLM", "ForSequenceClassification", {"task_type": "SEQ_CLS"}, {"new-head"}),
    ("Llama", "ForCausalLM", "ForTokenClassification", {"task_type": "TOKEN_CLS"}, {"new-head"}),
    ("Qwen3", "ForCausalLM", "Model", {"task_type": "FEATURE_EXTRACTION"}, {"headless-adapter"}),
    ("Qwen3", "Model", "ForCausalLM", {"task_type": "CAUSAL_LM"}, {"headless-base"}),
    ("Llava", "ForConditionalGeneration", "ForConditionalGeneration", {"target_modules": "all-linear"}, {"renamed-modules"}),
    ("Gemma3", "ForConditionalGeneration", "ForConditionalGeneration", {"target_modules": ["q_proj"]}, {"renamed-modules"}),
    ("Qwen2VL", "ForConditionalGeneration", "ForConditionalGeneration", {"target_modules": ["q_proj"]}, {"renamed-modules"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    return tmp_path_factory.mktemp("models")


def saved(room: Path, family: str, kind: str, **changes: Any) -> Path:
    """A tiny model's folder; made once."""
    import torch
    import transformers

    folder = room / "-".join((family, kind, *changes))
    if not folder.exists():
        cls = getattr(transformers, family + kind)
        torch.manual_seed(0)
        cls(cls.config_class(**CONFIGS[family] | changes)).save_pretrained(folder)
    return folder


def trained(room: Path, number: int) -> Path:
    """The adapter of a case, trained by nobody and saved by peft."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    family, kind, on, config, _ = CASES[number]
    folder = room / f"adapter-{number}"
    if not folder.exists():
        labels = {"num_labels": 3} if "Classification" in on and "Classification" not in kind else {}
        model = getattr(transformers, family + on).from_pretrained(saved(room, family, kind), **labels)
        wrapped = get_peft_model(model, LoraConfig(r=2, **config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        wrapped.save_pretrained(folder)
    return folder


def codes_of(folder: Path, base: Path) -> set[str]:
    notes = {"unpinned", "base-name-differs", "local-base-name"}  # of every adapter here
    return {problem.code for problem in checks.check(folder, base=read_base(base)).problems} - notes


NUMBERS = pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{family}{on} on {kind} {config}" for family, kind, on, config, _ in CASES]
)


@NUMBERS
def test_no_false_alarm_on_the_right_base(room: Path, number: int) -> None:
    family, kind, _, _, notes = CASES[number]
    assert codes_of(trained(room, number), saved(room, family, kind)) == notes


@NUMBERS
def test_a_base_of_another_width_is_found(room: Path, number: int) -> None:
    family, kind, _, _, notes = CASES[number]
    width = next((key for key in WIDTHS if key in CONFIGS[family]), "text_config")
    wider = {**CONFIGS[family]["text_config"], "hidden_size": 64} if width == "text_config" else 64
    assert codes_of(trained(room, number), saved(room, family, kind, **{width: wider})) - notes == {"shape-mismatch"}


@pytest.mark.parametrize(
    ("number", "family", "kind"), [(0, "Roberta", "ForMaskedLM"), (12, "Bart", "Model"), (22, "Bert", "Model")]
)
def test_a_base_of_another_family_is_found(room: Path, number: int, family: str, kind: str) -> None:
    codes = codes_of(trained(room, number), saved(room, family, kind))
    assert codes & {"no-such-module", "other-prefix", "base-shallower"}


def test_a_head_that_a_causal_model_never_makes_is_missing(room: Path, tmp_path: Path) -> None:
    number = next(n for n, case in enumerate(CASES) if case[0] == "Llama")
    folder = shutil.copytree(trained(room, number), tmp_path / "a")
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    assert codes_of(folder, saved(room, "Llama", "ForCausalLM")) == {"no-such-module"}


# From a module's name in transformers 5 to its name in transformers 4, as adapters of then have it.
OLD: dict[str, list[tuple[str, str]]] = {
    "Llava": [(r"^model\.language_model\.", "language_model.model.")],
    "Gemma3": [(r"^model\.language_model\.", "language_model.model.")],
    "Qwen2VL": [(r"^model\.language_model\.", "model.")],
    "ViT": [(r"^vit\.layers\.(\d+)\.attention\.q_proj", r"vit.encoder.layer.\1.attention.attention.query")],
}


@functools.cache
def _case_of(family: str) -> int:
    return max(n for n, case in enumerate(CASES) if case[0] == family and case[1] != "Model")


def _variant(room: Path, family: str, names: str, out: Path) -> Path:
    """An adapter on the queries of the language model alone, under the names of transformers 5 or 4."""
    number = _case_of(family)
    with safetensors_file.SafetensorsFile(trained(room, number) / peft.WEIGHTS) as file:
        arrays: dict[str, np.ndarray] = {name: file.tensor(name) for name in file.tensors}
    out.mkdir()
    renamed = {}
    for name, array in arrays.items():
        module = name.removeprefix("base_model.model.")
        if "q_proj" in module and "vision" not in module and "visual" not in module:
            for pattern, replacement in OLD[family] if names == "old" else ():
                module = re.sub(pattern, replacement, module)
            renamed[f"base_model.model.{module}"] = array
    safetensors_file.write(out / peft.WEIGHTS, renamed, {"format": "pt"})
    target = "query" if (family, names) == ("ViT", "old") else "q_proj"
    language = (
        rf".*{'layer' if family == 'ViT' else 'language_model'}.*\.{target}" if family != "Qwen2VL" else rf"model\..*{target}"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": language}
    (out / peft.CONFIG).write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("runtime", ["peft", "transformers"])
@pytest.mark.parametrize("family", OLD)
def test_renamed_modules_load_as_the_verdict_predicts(
    room: Path, tmp_path: Path, family: str, runtime: str, names: str
) -> None:
    import transformers
    from peft import PeftModel

    kind = CASES[_case_of(family)][1]
    folder, base = _variant(room, family, names, tmp_path / "a"), saved(room, family, kind)
    report = checks.check(folder, base=read_base(base))
    assert report.ok, report.problems
    verdict = report.verdicts[runtime].verdict
    model = getattr(transformers, family + kind).from_pretrained(base)
    refused = pytest.raises(ValueError, match="not found in the base model")
    with refused if verdict == "refused" else contextlib.nullcontext():
        if runtime == "peft":
            model = PeftModel.from_pretrained(model, folder)
        else:
            model.load_adapter(str(folder))
    if verdict == "refused":
        return
    applied = [bool(tensor.any()) for name, tensor in model.state_dict().items() if "lora_B" in name]
    assert applied
    assert verdict == ("applied" if all(applied) else "ignored" if not any(applied) else "wrong")


@pytest.mark.parametrize("family", OLD)
def test_our_renames_are_those_of_transformers(room: Path, family: str) -> None:
    import transformers

    kind = CASES[_case_of(family)][1]
    base = saved(room, family, kind)
    model = getattr(transformers, family + kind).from_pretrained(base)
    spec = read_base(base)
    in_file = set(spec.renaming.names(spec.tensors).values())
    assert in_file == {name for name, _ in model.named_parameters(remove_duplicate=True)}


def test_mlx_has_no_model_of_the_kinds_reported_as_refused() -> None:
    need_module("mlx_lm")
    import importlib.util

    assert not [kind for kind in _ENCODERS if importlib.util.find_spec(f"mlx_lm.models.{kind.replace('-', '_')}")]
