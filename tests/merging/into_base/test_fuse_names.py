"""peft as the oracle on bases whose files have other names than their modules in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import fuse
from adapterhub_converters.formats import peft
from tests.support import tiny

pytestmark = pytest.mark.peer

TEXT = r"(?!.*(vision|visual|audio)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
STACKS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"target_modules": TEXT}) for name in sorted(tiny.MULTIMODAL) if "Moe" not in name and "Qwen3_5" not in name),
    ("LlavaForConditionalGeneration", {"target_modules": ["q_proj", "lm_head"]}),
    ("MixtralForCausalLM", {"target_modules": ["q_proj", "gate"], "target_parameters": STACKS["target_parameters"]}),
    ("MiniMaxM2ForCausalLM", {"target_modules": ["q_proj", "gate"]}),
    ("NemotronHForCausalLM", {"target_modules": ["q_proj", "in_proj", "up_proj", "embeddings"]}),
    ("GraniteMoeForCausalLM", STACKS),
    ("Qwen3_5MoeForConditionalGeneration", {"target_modules": "all-linear"}),
    *((name, STACKS) for name in ("Glm4MoeForCausalLM", "OlmoeForCausalLM", "Ernie4_5_MoeForCausalLM", "MiniMaxM2ForCausalLM")),
]


def weights_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The parameters in memory by name, float32."""
    import torch
    import transformers

    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32)
    return {path: one.detach().numpy() for path, one in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(("name", "config"), CASES, ids=[f"{name}-{number}" for number, (name, _) in enumerate(CASES)])
def test_a_merge_is_peft_s_whatever_the_files_call_the_modules(
    torch: Any, tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    tiny.model(name).save_pretrained(tmp_path / "base")
    wrapped = tiny.adapter(tiny.model(name), tmp_path / "adapter", **config)
    theirs = {path: one.detach().numpy() for path, one in wrapped.merge_and_unload().named_parameters(remove_duplicate=False)}
    fuse([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
    before, ours = weights_of(tmp_path / "base", name), weights_of(tmp_path / "out", name)
    changed = [path for path in theirs if not np.array_equal(before[path], theirs[path])]
    assert changed
    for path, array in theirs.items():
        assert np.abs(ours[path] - array).max() < 1e-5, path


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"])
@pytest.mark.parametrize("table", ["embed_tokens", "lm_head"])
def test_a_tied_table_becomes_two_and_computes_what_peft_does(torch: Any, tmp_path: Path, name: str, table: str) -> None:
    """The oracle is peft's forward: its merge changes both tables, as they are one."""
    import transformers

    model = tiny.model(name)
    model.save_pretrained(tmp_path / "base")
    text = r"(?!.*vision).*\.q_proj"
    wrapped = tiny.adapter(model, tmp_path / "adapter", target_modules=rf"({text}|(.*\.)?{table})", strength=0.3)
    fuse([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
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
    fuse([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.architectures, config.num_labels) == ([f"{family}For{kind}"], 3)
    merged = getattr(transformers, f"{family}For{kind}").from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.tensor([[3, 17, 99, 5]])
    with torch.no_grad():
        assert (merged(tokens).logits - wrapped(tokens).logits).abs().max() < 1e-5
