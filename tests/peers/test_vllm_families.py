"""vLLM itself, asked about an adapter of every family that is built small here, does what its verdict says.

One process of vLLM builds each model and loads the adapters as its engine would, without starting one for each: what is of
interest is which modules it takes, drops and refuses, and nothing is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub_converters.architectures.architecture_lookup import ARCHITECTURES
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from adapterhub_converters.runtime_models import vllm_model
from tests.conftest import need_module
from tests.peers.test_runtime_models import printed
from tests.support import tiny

pytestmark = pytest.mark.peer
_FIELDS = "vLLM reads a field of the config that the class of transformers does not have"
_PROCESSOR = "vLLM asks for the files of an image processor"
_BACKEND = "vLLM 0.32 runs it by transformers, and cannot build it so"
_MAMBA = "peft takes no adapter of all its linear modules"
NOT_ASKED = {
    "AfmoeForCausalLM": _FIELDS, "Glm4vMoeForConditionalGeneration": _FIELDS, "HYV3ForCausalLM": _FIELDS,
    "VoxtralForConditionalGeneration": _FIELDS, "HunYuanVLForConditionalGeneration": _PROCESSOR,
    "LightOnOcrForConditionalGeneration": _PROCESSOR, "Qwen2_5OmniThinkerForConditionalGeneration": _PROCESSOR,
    "Qwen3OmniMoeThinkerForConditionalGeneration": _PROCESSOR, "BambaForCausalLM": _BACKEND, "MellumForCausalLM": _BACKEND,
    "FalconMambaForCausalLM": _MAMBA, "MambaForCausalLM": _MAMBA, "NemotronHForCausalLM": _MAMBA,
}  # fmt: skip
CLASSES = {*tiny.CONFIGS, *tiny.MULTIMODAL, *tiny.BY_NAME, *(name for row in ARCHITECTURES for name in row.classes)}
FAMILIES = sorted(CLASSES - NOT_ASKED.keys())
# What published configs have and those of transformers 5 have not, or have otherwise.
_LFM2 = {
    "conv_dim": 64, "conv_dim_out": 64, "block_dim": 64, "block_ff_dim": 96, "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "Lfm2ForCausalLM": _LFM2,
    "Lfm2VlForConditionalGeneration": {"text_config": _LFM2 | {"block_ff_dim": 256}},
    "GptOssForCausalLM": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 256,
        },
    },
}  # fmt: skip
Tensors = dict[str, np.ndarray]
_PREFIX, _O_PROJ = "base_model.model.", "model.layers.0.self_attn.o_proj"


def _renamed(name: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name(key): tensor for key, tensor in tensors.items()}


def _without(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(f"layers.0.{end}.weight")}


def _copied(source: str, target: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key.replace(source, target): tensors[key] for key in tensors if source in key}


# Changes of the files of an adapter of all linear modules of a Llama.
EDITS: dict[str, Callable[[Tensors], Tensors]] = {
    "no prefix": _renamed(lambda key: key.removeprefix(_PREFIX)),
    "no prefix and no model": _renamed(lambda key: key.removeprefix(f"{_PREFIX}model.")),
    "half of the prefix": _renamed(lambda key: key.removeprefix("base_model.")),
    "prefix twice": _renamed(lambda key: _PREFIX + key),
    "prefix of another program": _renamed(lambda key: key.replace(_PREFIX, "transformer.", 1)),
    "prefix of a vision model": _renamed(lambda key: key.replace(f"{_PREFIX}model.", f"{_PREFIX}language_model.", 1)),
    "prefix on some": _renamed(lambda key: key.removeprefix(_PREFIX) if "v_proj" in key else key),
    "name of the adapter": _renamed(lambda key: key.replace(".weight", ".default.weight")),
    "no A of a part": _without("self_attn.q_proj.lora_A"),
    "no B of a part": _without("self_attn.q_proj.lora_B"),
    "no A of a layer": _without("self_attn.o_proj.lora_A"),
    "no B of a layer": _without("self_attn.o_proj.lora_B"),
    "no pair of a layer": lambda tensors: _without("self_attn.o_proj.lora_A")(_without("self_attn.o_proj.lora_B")(tensors)),
    "unknown tensor": lambda tensors: tensors | {f"{_PREFIX}{_O_PROJ}.extra": np.zeros((4, 8), np.float32)},
    "unknown module": _copied("layers.0.self_attn.o_proj", "layers.0.self_attn.z_proj"),
    "module elsewhere": _copied("layers.0.self_attn.o_proj", "layers.0.mlp.o_proj"),
    "layer that is not there": _copied("layers.0.self_attn.o_proj", "layers.9.self_attn.o_proj"),
}
SCALES = {"": 8, ", scale 1": 4}  # lora_alpha, by rank 4
# Others of families whose adapters of all linear modules have a module that vLLM has otherwise: options of the model, modules.
PARTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Mixtral's attention": ("MixtralForCausalLM", {}, ["q_proj", "o_proj"]),
    "Mixtral's gate": ("MixtralForCausalLM", {}, ["q_proj", "gate"]),
    "Laguna's attention": ("LagunaForCausalLM", {}, ["q_proj", "o_proj"]),
    "a dense layer of Laguna": ("LagunaForCausalLM", {}, ["q_proj", "mlp.down_proj"]),
    "GPT-BigCode without c_attn": ("GPTBigCodeForCausalLM", {}, ["c_proj", "c_fc"]),
    "GPT-BigCode with keys for each head": ("GPTBigCodeForCausalLM", {"multi_query": False}, ["c_attn", "c_proj", "c_fc"]),
}


def _write_base(model: Any, name: str, folder: Path) -> None:
    model.save_pretrained(folder)
    path = folder / "config.json"
    config, published = json.loads(path.read_text()), PUBLISHED.get(name, {})
    for key, value in published.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


def _text_modules(model: Any) -> list[str]:
    """Return the attention of the text model, of a model that has other parts."""
    of_text = re.compile(r".*\.(?:language_model|text_model)\..*layers\.\d+\.self_attn\.\w+")
    return [name for name, module in model.named_modules() if type(module).__name__ == "Linear" and of_text.fullmatch(name)]


def _edited(source: Path, folder: Path, edit: Callable[[Tensors], Tensors], alpha: int) -> Path:
    folder.mkdir(parents=True)
    with safetensors_file.SafetensorsFile(source / peft.WEIGHTS) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    safetensors_file.write(folder / peft.WEIGHTS, edit(tensors), {"format": "pt"})
    config = json.loads((source / peft.CONFIG).read_text()) | {"lora_alpha": alpha}
    (folder / peft.CONFIG).write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], tuple[Path, Path, dict[str, Any]]]:
    """Base, adapter, and what vLLM did, by family and kind of adapter."""
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    folder = tmp_path_factory.mktemp("families")
    adapters: dict[tuple[str, str], tuple[Path, Path]] = {}
    for name in FAMILIES:
        model = tiny.model(name)
        _write_base(model, name, folder / name / "base")
        if targets := _text_modules(model):
            tiny.adapter(model, folder / name / "text", target_modules=targets).unload()
            adapters[name, "text"] = folder / name / "base", folder / name / "text"
        tiny.adapter(model, folder / name / "all")
        adapters[name, "all"] = folder / name / "base", folder / name / "all"
    llama = folder / "LlamaForCausalLM"
    for (end, alpha), (kind, edit) in ((scale, item) for scale in SCALES.items() for item in EDITS.items()):
        adapters["LlamaForCausalLM", kind + end] = llama / "base", _edited(llama / "all", llama / (kind + end), edit, alpha)
    for kind, (name, options, modules) in PARTS.items():
        model = tiny.model(name, **options)
        _write_base(model, name, folder / kind / "base")
        tiny.adapter(model, folder / kind / "a", target_modules=modules)
        adapters[name, kind] = folder / kind / "base", folder / kind / "a"
    # In this order, since vLLM looks once for what it can fuse in a class of modules: a model with other options comes last.
    words = [str(path) for paths in adapters.values() for path in paths]
    results = {result["name"]: result for result in printed("vllm_builds.py", folder, *words)}
    return {key: (base, adapter, results[str(adapter)]) for key, (base, adapter) in adapters.items()}


def _happened(outcome: Mapping[str, Any]) -> str:
    return "refused" if outcome["error"] else "ignored" if outcome["ignored"] else "applied"


def test_the_families_are_many(outcomes: Mapping[tuple[str, str], Any]) -> None:
    assert len(FAMILIES) > 80
    assert {name for (name, _), (_, _, outcome) in outcomes.items() if not outcome["is_built"]} == set()


@pytest.mark.parametrize("name", FAMILIES)
def test_vllm_does_with_an_adapter_of_a_family_what_its_verdict_says(
    name: str, outcomes: Mapping[tuple[str, str], Any]
) -> None:
    for kind in ("all", "text"):
        if (name, kind) not in outcomes:
            continue
        base, adapter, outcome = outcomes[name, kind]
        verdict = checks.check(adapter, base=read_base(base)).verdicts["vllm"]
        if verdict.verdict == "unknown":  # transformers may run it there, as it does
            assert vllm_model(name) is None
        elif kind == "all" and _names_towers_alone(name, outcome):
            assert verdict.verdict == "ignored"  # the verdict does not tell left out from refused for their names
        else:
            assert verdict.verdict == _happened(outcome), (kind, outcome, verdict)


@pytest.mark.parametrize("kind", PARTS)
def test_vllm_does_with_a_part_of_a_model_what_its_verdict_says(
    kind: str, outcomes: Mapping[tuple[str, str], tuple[Path, Path, dict[str, Any]]]
) -> None:
    base, adapter, outcome = outcomes[PARTS[kind][0], kind]
    verdict = checks.check(adapter, base=read_base(base)).verdicts["vllm"]
    assert verdict.verdict == _happened(outcome), (outcome, verdict)


def _names_towers_alone(name: str, outcome: Mapping[str, Any]) -> bool:
    """Return whether vLLM refuses an adapter for modules outside of the text model alone."""
    received = re.search(r"but received (\[.*?\])", outcome["error"] or "")
    model = vllm_model(name)
    return bool(received and model and model.towers) and "layers.0.self_attn.q_proj" not in str(received)


@pytest.mark.parametrize("kind", [kind + end for kind in EDITS for end in SCALES])
def test_vllm_does_with_names_that_are_not_peft_s_what_its_verdict_says(
    kind: str, outcomes: Mapping[tuple[str, str], Any]
) -> None:
    base, adapter, outcome = outcomes["LlamaForCausalLM", kind]
    verdict = checks.check(adapter, base=read_base(base)).verdicts["vllm"]
    assert verdict.verdict == _happened(outcome), (outcome, verdict)
