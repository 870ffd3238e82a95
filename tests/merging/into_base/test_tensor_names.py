"""peft as the oracle on bases whose files have other names than their modules in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.merging import merge_into_base
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.formats import peft
from tests.support import tiny

pytestmark = pytest.mark.peer

TEXT = r"(?!.*(vision|visual|audio)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
STACKS = {"target_modules": [], **EXPERTS}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"target_modules": TEXT}) for name in sorted(tiny.MULTIMODAL) if "Moe" not in name and "Qwen3_5" not in name),
    ("LlavaForConditionalGeneration", {"target_modules": ["q_proj", "lm_head"]}),
    ("MixtralForCausalLM", {"target_modules": ["q_proj", "gate"], **EXPERTS}),
    ("MiniMaxM2ForCausalLM", {"target_modules": ["q_proj", "gate"]}),
    ("NemotronHForCausalLM", {"target_modules": ["q_proj", "in_proj", "up_proj", "embeddings"]}),
    ("GraniteMoeForCausalLM", STACKS),
    ("Qwen3_5MoeForConditionalGeneration", {"target_modules": "all-linear"}),
    ("Qwen3OmniMoeThinkerForConditionalGeneration", {"target_modules": TEXT}),
    *((name, STACKS) for name in ("Glm4MoeForCausalLM", "OlmoeForCausalLM", "Ernie4_5_MoeForCausalLM", "MiniMaxM2ForCausalLM")),
]


def weights_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The parameters in memory by name, float32."""
    import torch
    import transformers

    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
    return {path: parameter.detach().numpy() for path, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{name}-{number}" for number, (name, _) in enumerate(CASES)])
def test_a_merge_is_peft_s_whatever_the_files_call_the_modules(
    torch: Any, tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    tiny.model(name).save_pretrained(tmp_path / "base")
    wrapped = tiny.adapter(tiny.model(name), tmp_path / "adapter", **config)
    theirs = {
        path: parameter.detach().numpy()
        for path, parameter in wrapped.merge_and_unload().named_parameters(remove_duplicate=False)
    }
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
    before, ours = weights_of(tmp_path / "base", name), weights_of(tmp_path / "out", name)
    changed = [path for path in theirs if not np.array_equal(before[path], theirs[path])]
    assert changed
    for path, array in theirs.items():
        assert np.abs(ours[path] - array).max() < 1e-5, path


@pytest.mark.parametrize("config", [{"target_modules": TEXT}, {"target_modules": ["q_proj"], **EXPERTS}])
def test_an_adapter_of_a_model_inside_the_base_s_is_merged(torch: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    """Qwen3-Omni's thinker is trained alone, and its files are those of the whole model, talker and all."""
    name = "Qwen3OmniMoeThinkerForConditionalGeneration"
    tiny.model(name).save_pretrained(tmp_path / "base")
    with SafetensorsFile(tmp_path / "base" / "model.safetensors") as file:
        tensors = {f"thinker.{stored}": file.tensor(stored) for stored in file.tensors}
    tensors["talker.model.layers.0.self_attn.q_proj.weight"] = np.zeros((4, 4), np.float32)
    safetensors_file.write(tmp_path / "base" / "model.safetensors", tensors, {"format": "pt"})
    thinker = json.loads((tmp_path / "base" / "config.json").read_text())
    whole = {
        "model_type": "qwen3_omni_moe",
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "thinker_config": thinker,
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(whole))
    wrapped = tiny.adapter(tiny.model(name), tmp_path / "adapter", **config)
    theirs = {
        path: parameter.detach().numpy()
        for path, parameter in wrapped.merge_and_unload().named_parameters(remove_duplicate=False)
    }
    before = {path: parameter.detach().numpy() for path, parameter in tiny.model(name).named_parameters(remove_duplicate=False)}
    base = read_base(tmp_path / "base")
    report = checks.check(tmp_path / "adapter", base=base)
    assert [problem for problem in report.problems if problem.severity == "error"] == []
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
    with SafetensorsFile(tmp_path / "out" / "model.safetensors") as file:
        merged = {name: file.tensor(name) for name in file.tensors}
    stored = {new: old for old, new in base.renaming.names(merged).items()}
    for path in [path for path in theirs if not np.array_equal(before[path], theirs[path]) and ".experts." not in path]:
        assert np.abs(merged[stored[f"thinker.{path}"]] - theirs[path]).max() < 1e-5, path
    changed = {name for name in tensors if not np.array_equal(tensors[name], merged[name])}
    assert any(".mlp.experts." in name for name in changed)
    assert "thinker.model.layers.0.self_attn.q_proj.weight" in changed


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"])
@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
def test_a_tied_table_becomes_two_and_computes_what_peft_does(torch: Any, tmp_path: Path, name: str, table: str) -> None:
    """The oracle is peft's forward: its merge changes both tables, as they are one."""
    import transformers

    model = tiny.model(name)
    model.save_pretrained(tmp_path / "base")
    text = r"(?!.*vision).*\.q_proj"
    wrapped = tiny.adapter(model, tmp_path / "adapter", target_modules=rf"({text}|(.*\.)?{table})", strength=0.3)
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
    merged = getattr(transformers, name).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.tensor([[3, 17, 99, 5, 64, 23]])
    with torch.no_grad():
        theirs, ours = wrapped(input_ids=tokens).logits, merged(input_ids=tokens).logits
        with wrapped.disable_adapter():
            before = wrapped(input_ids=tokens).logits
    assert (theirs - before).abs().max() > 0.1
    assert (theirs - ours).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
@pytest.mark.parametrize(("task", "kind"), [("SEQ_CLS", "SequenceClassification"), ("TOKEN_CLS", "TokenClassification")])
def test_a_head_for_another_task_is_added_to_a_causal_base(
    torch: Any, tmp_path: Path, family: str, task: str, kind: str
) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    causal = tiny.model(f"{family}ForCausalLM")
    causal.save_pretrained(tmp_path / "base")
    model = getattr(transformers, f"{family}For{kind}").from_pretrained(tmp_path / "base", num_labels=3, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(task_type=task, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.eval().save_pretrained(tmp_path / "adapter")
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.architectures, config.num_labels) == ([f"{family}For{kind}"], 3)
    merged = getattr(transformers, f"{family}For{kind}").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.tensor([[3, 17, 99, 5]])
    with torch.no_grad():
        assert (merged(tokens).logits - wrapped(tokens).logits).abs().max() < 1e-5
