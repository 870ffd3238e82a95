"""PEFT's tuners that are not LoRA: named, checked against the base, and merged to what peft itself merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.analysis import diff, norms
from adapterhub.manifest import derive
from adapterhub.merging.into_base.model_merge import merge_into_base
from adapterhub_converters import bases
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import FORMATS, WRITTEN, convert
from tests.conftest import need_module

ALL = ["q_proj", "k_proj", "down_proj"]
# A name to the class of peft's config, its keys, and the numbers of the record that are not its defaults.
MADE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}, {}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}, {"oft_block_size": 4}),
    "oft, as a series": ("OFTConfig", {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 7}, {}),
    "oft, one block in a ball": (
        "OFTConfig", {"r": 0, "oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.5}, {"coft": True},
    ),
    "boft": ("BOFTConfig", {"boft_block_size": 4}, {"boft_block_size": 4}),
    "hra": ("HRAConfig", {"r": 4}, {"r": 4}),
    "hra, orthogonal": ("HRAConfig", {"r": 3, "apply_GS": True}, {"apply_GS": True}),
    "road": ("RoadConfig", {"variant": "road_1", "group_size": 4}, {"variant": "road_1", "group_size": 4}),
    "road, twice": ("RoadConfig", {"variant": "road_2", "group_size": 4}, {}),
    "road, four times": ("RoadConfig", {"variant": "road_4", "group_size": 8}, {}),
    "miss": ("MissConfig", {"r": 4}, {"r": 4}),
    "miss, with a remainder": ("MissConfig", {"r": 5}, {}),
    "miss, in blocks": ("MissConfig", {"r": 4, "init_weights": "bat"}, {}),
    "miss, small": ("MissConfig", {"r": 4, "mini_r": 2, "init_weights": "mini"}, {}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 100}, {"n_frequency": 100, "scaling": 150.0}),
    "shira": ("ShiraConfig", {"r": 2}, {"r": 2}),
    "c3a": ("C3AConfig", {"block_size": 8}, {"block_size": 8}),
    "randlora": ("RandLoraConfig", {"r": 4}, {"randlora_alpha": 640}),
    "randlora, uneven": ("RandLoraConfig", {"r": 3}, {}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 4, "save_only_topk_weights": False}, {"topk": 2}),
    "vblora, the best": ("VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 4, "save_only_topk_weights": True}, {}),
    "delora": ("DeloraConfig", {"r": 4}, {"r": 4}),
    "gralora": ("GraloraConfig", {"r": 4}, {"gralora_k": 2, "alpha": 64}),
    "gralora, a hybrid": ("GraloraConfig", {"r": 8, "hybrid_r": 3, "gralora_k": 4, "alpha": 5}, {"hybrid_r": 3}),
    "pvera": ("PveraConfig", {"r": 4}, {"r": 4}),
    "unilora": ("UniLoraConfig", {"r": 2, "theta_d_length": 20, "save_indices": True}, {"theta_d_length": 20}),
    "tinylora": ("TinyLoraConfig", {"u": 6, "weight_tying": 1.0}, {"u": 6}),
    "hira": ("HiraConfig", {"r": 4}, {"r": 4}),
    "hira, of a table": ("HiraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, {}),
    "waveft": ("WaveFTConfig", {"n_frequency": 50}, {"wavelet_family": "db1", "scaling": 25.0}),
    "waveft, smooth": ("WaveFTConfig", {"n_frequency": 50, "wavelet_family": "db4"}, {}),
    "waveft, in place": ("WaveFTConfig", {"n_frequency": 50, "use_idwt": False}, {"use_idwt": False}),
    "supertuning": ("SupertuningConfig", {"sparsity": 0.9}, {"sparsity": 0.9}),
    "supertuning, a hybrid": ("SupertuningConfig", {"sparsity": 0.9, "r": 2, "lora_alpha": 5}, {}),
    "deft": ("DeftConfig", {"r": 4}, {"decomposition_method": "relu"}),
    "deft, orthogonal": ("DeftConfig", {"r": 4, "decomposition_method": "qr", "alpha": 6}, {}),
    "deft, taken out": ("DeftConfig", {"r": 4, "para": True}, {"para": True}),
    "frod": ("FrodConfig", {"sparse_rate": 0.1, "progressbar": False}, {}),
    "osf": ("OSFConfig", {"effective_rank": 5}, {"effective_rank": 5}),
    "peanut": ("PeanutConfig", {"r": 4, "scaling": 0.5}, {"act_fn": "relu"}),
    "peanut, deep": ("PeanutConfig", {"r": 4, "depth": 2, "act_fn": "gelu"}, {}),
    "glora": ("GloraConfig", {"r": 2}, {"config_A_B": "lora"}),
    "glora, vectors": ("GloraConfig", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, {}),
    "glora, numbers": ("GloraConfig", {"config_A_B": "constant", "config_C": "none"}, {}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}, {}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [1, 3], "target_modules": ["embed_tokens"]}, {}),
}  # fmt: skip
PROMPTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}, {"num_virtual_tokens": 3}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}, {"num_virtual_tokens": 3}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, {"encoder_hidden_size": 8}),
}


# The places of FourierFT, WaveFT, SHiRA and Supertuning are somewhere in a larger weight too, and a shared block repeats.
OF_ANY_SIZE = (
    "fourierft", "shira", "oft, one block in a ball", "miss, small", "waveft", "waveft, smooth", "waveft, in place",
    "supertuning",
)  # fmt: skip


def model(kind: str = "llama", width: int = 16) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
    return Qwen2ForCausalLM(Qwen2Config(**sizes)) if kind == "qwen2" else LlamaForCausalLM(LlamaConfig(**sizes))


def edited_adapter(name: str, at: Path, kind: str = "llama") -> Path:
    """An adapter as peft saves it, with random numbers, and what peft's merge makes of the base."""
    import peft
    import torch

    settings, keys, _ = {**MADE, **PROMPTS}[name]
    targets = {} if name in PROMPTS or "target_modules" in keys else {"target_modules": ALL}
    config = getattr(peft, settings)(task_type="CAUSAL_LM", **targets, **keys)
    model(kind).save_pretrained(at / "base")
    tuned = peft.get_peft_model(model(kind), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(at / "a")
    if name not in PROMPTS:
        # Loaded again: VB-LoRA saves less than it trained.
        peft.PeftModel.from_pretrained(model(kind), str(at / "a")).merge_and_unload().save_pretrained(at / "merged")
    return at / "a"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.tensor(name) for name in file.tensors}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", MADE)
def test_a_merge_is_that_of_peft(name: str, kind: str, tmp_path: Path) -> None:
    need_module("peft")
    adapter = convert.read(edited_adapter(name, tmp_path, kind))
    merge_into_base([(adapter, 1.0)], tmp_path / "base", tmp_path / "ours")
    ours, peft, base = (tensors(tmp_path / folder) for folder in ("ours", "merged", "base"))
    assert ours.keys() == peft.keys()
    changed = [key for key in peft if not np.array_equal(peft[key], base[key])]
    assert changed
    for key in peft:
        scale = np.abs(peft[key]).max()
        np.testing.assert_allclose(ours[key], peft[key], rtol=0, atol=2e-6 * scale, err_msg=key)


@pytest.mark.parametrize("name", [*MADE, *PROMPTS])
def test_it_is_named_and_checked_against_its_base(name: str, tmp_path: Path) -> None:
    need_module("peft")
    folder = edited_adapter(name, tmp_path)
    manifest = derive.describe(folder)
    assert (manifest.method, manifest.r, manifest.alpha) == (name.partition(",")[0], None, None)
    assert {**MADE, **PROMPTS}[name][2].items() <= (manifest.numbers or {}).items()
    assert manifest.parameters > 0
    report = checks.check(folder, base=bases.read_hf(tmp_path / "base"))
    assert [(problem.code, problem.what) for problem in report.problems if problem.severity != "note"] == []
    assert report.verdicts["peft"].verdict == "applied"
    assert report.verdicts["vllm"].verdict == "refused"
    model(width=32).save_pretrained(tmp_path / "wider")
    report = checks.check(folder, base=bases.read_hf(tmp_path / "wider"))
    assert report.ok == (name in OF_ANY_SIZE)


@pytest.mark.parametrize("name", ["ia3", "oft", "miss", "vblora", "ln_tuning", "prompt_tuning"])
@pytest.mark.parametrize("to", [name for name in WRITTEN if name != "peft"])
def test_no_other_format_takes_it_for_lora(name: str, to: str, tmp_path: Path) -> None:
    need_module("peft")
    folder = edited_adapter(name, tmp_path)
    with pytest.raises(RefusedError):
        convert.convert(folder, tmp_path / f"out{FORMATS[to].suffix}", to=to, base=bases.read_hf(tmp_path / "base"))
    convert.convert(folder, tmp_path / "copy", to="peft")
    assert (tmp_path / "copy" / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_prompts_and_weighted_rotations_are_refused_by_name(tmp_path: Path) -> None:
    need_module("peft")
    with pytest.raises(RefusedError, match="prompt_tuning adds tokens to the input"):
        merge_into_base(
            [(convert.read(edited_adapter("prompt_tuning", tmp_path / "1")), 1.0)], tmp_path / "1" / "base", tmp_path / "out"
        )
    with pytest.raises(RefusedError, match="oft is not a sum"):
        merge_into_base([(convert.read(edited_adapter("oft", tmp_path / "2")), 0.5)], tmp_path / "2" / "base", tmp_path / "out")


def test_biases_alone_are_added_where_the_base_has_them(tmp_path: Path) -> None:
    """BEFT; peft cannot merge it into a base without biases either."""
    need_module("peft")
    import peft
    import torch

    model("qwen2").save_pretrained(tmp_path / "base")
    model("llama").save_pretrained(tmp_path / "without")
    tuned = peft.get_peft_model(model("qwen2"), peft.BeftConfig(target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tuned.save_pretrained(tmp_path / "a")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapter = convert.read(tmp_path / "a")
    merge_into_base([(adapter, 1.0)], tmp_path / "base", tmp_path / "ours")
    ours, peft_s = tensors(tmp_path / "ours"), tensors(tmp_path / "merged")
    assert all(np.array_equal(ours[name], peft_s[name]) for name in peft_s)
    report = checks.check(tmp_path / "a", base=bases.read_hf(tmp_path / "base"))
    assert [(problem.code, problem.what) for problem in report.problems if problem.severity == "error"] == []
    with pytest.raises(RefusedError, match=r"q_proj\.bias: is changed by the adapter, but this module of the base has no bias"):
        merge_into_base([(adapter, 1.0)], tmp_path / "without", tmp_path / "out")


def test_norms_and_differences_of_no_low_rank_delta_are_refused_by_name(tmp_path: Path) -> None:
    need_module("peft")
    adapter = convert.read(edited_adapter("hra", tmp_path))
    with pytest.raises(RefusedError, match="its change is by hra"):
        norms.build_heat_map(adapter)
    with pytest.raises(RefusedError, match="its change is by hra"):
        diff.compare(adapter, adapter)
