"""What peft makes of its own adapters and of ours: the same bytes, the same logits, the same deltas."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.adapter import (
    Adapter,
    Factored,
    Loss,
    LowRankConv,
    LowRankEmbedding,
    StackedLowRank,
)
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft
from tests.conftest import need_module
from tests.support import tiny

pytestmark = pytest.mark.peer
Make = Callable[[], Any]

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture(autouse=True)
def _peft() -> None:
    need_module("peft")


def wrapped_model(name: str, **config: Any) -> Any:
    """A random model of any class; small numbers under the names that its family has for them."""
    import torch
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(path))) * 0.1)
    return model


def llama(**config: Any) -> Make:
    return lambda: tiny.model("LlamaForCausalLM", **config)


def gpt2() -> Any:
    return wrapped_model("GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)


def bert() -> Any:
    return wrapped_model("BertForSequenceClassification", **SMALL, max_position_embeddings=64, num_labels=3)


def roberta() -> Any:
    return wrapped_model("RobertaForSequenceClassification", **SMALL, max_position_embeddings=64, num_labels=3, pad_token_id=0)


def scored() -> Any:
    return wrapped_model("LlamaForSequenceClassification", **SMALL, num_key_value_heads=2, num_labels=3, pad_token_id=0)


def t5() -> Any:
    return wrapped_model(
        "T5ForConditionalGeneration",
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        decoder_start_token_id=0,
    )


def whisper() -> Any:
    return wrapped_model(
        "WhisperForConditionalGeneration", d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, num_mel_bins=8,
        max_source_positions=16, max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip


def convolutional() -> Any:
    import torch

    class Convolutional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3)
            self.wide = torch.nn.Conv1d(8, 6, 5)
            self.head = torch.nn.Linear(6, 4)

        def forward(self, pixels: Any) -> Any:
            return self.head(self.wide(torch.relu(self.conv(pixels)).flatten(2)).mean(2))

    torch.manual_seed(0)
    return Convolutional().eval()


def moe(name: str, **config: Any) -> Make:
    sizes = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
    return lambda: wrapped_model(name, **{**sizes, **config})


MIXTRAL = moe("MixtralForCausalLM", num_local_experts=4)
QWEN3_MOE = moe("Qwen3MoeForCausalLM", num_experts=4, moe_intermediate_size=24, decoder_sparse_step=1, mlp_only_layers=[])
GPT_OSS = moe("GptOssForCausalLM", num_local_experts=4, layer_types=["full_attention"] * 2, pad_token_id=0)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def outputs(model: Any) -> np.ndarray:
    import torch

    ids = torch.tensor([[5, 9, 3, 17, 8, 22]])
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    with torch.no_grad():
        if kind == "Convolutional":
            return np.asarray(model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))))
        if kind.startswith("Whisper"):
            noise = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
            return np.asarray(model(input_features=noise, decoder_input_ids=ids).logits)
        if kind.startswith("T5"):
            return np.asarray(model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits)
        return np.asarray(model(input_ids=ids).logits)


def train(model: Any, config: Any) -> Any:
    """`model` wrapped by peft, every trainable number moved away from where it began."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(1)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return wrapped


def saved(make: Make, config: Any, path: Path) -> Any:
    wrapped = train(make(), config)
    wrapped.save_pretrained(str(path))
    return wrapped


def loaded(make: Make, path: Path) -> Any:
    """The adapter as peft loads it; a key that it misses or a config it doesn't like is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(make(), str(path)).eval()


def rewritten(adapter: Adapter, path: Path) -> Path:
    path.mkdir()
    peft.write(dataclasses.replace(adapter, source=None), path)
    return path


def assert_bytes_come_back(source: Path, target: Path) -> Adapter:
    adapter = peft.read(source)
    target.mkdir()
    peft.write(adapter, target)
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    return adapter


def dense(delta: Any) -> np.ndarray:
    """The delta in the function's orientation, `(…, out, in)`."""
    delta = delta.as_low_rank() if isinstance(delta, Factored) else delta
    if isinstance(delta, LowRankEmbedding):
        return np.asarray(delta.scaling * (delta.lora_B @ delta.lora_A).T)
    if isinstance(delta, LowRankConv):
        flat = delta.lora_B.reshape(len(delta.lora_B), -1) @ delta.lora_A.reshape(delta.r, -1)
        return np.asarray(delta.scaling * flat.reshape(delta.shape))
    return np.asarray(delta.scaling * (delta.lora_B @ delta.lora_A))


def assert_deltas(adapter: Adapter, wrapped: Any) -> None:
    for target, delta in adapter.deltas.items():
        if isinstance(delta, StackedLowRank):
            module, _, parameter = target.rpartition(".")
            layer = wrapped.base_model.model.get_submodule(module)
            while layer.parameter_name != parameter:
                layer = layer.base_layer
            theirs = layer.get_delta_weight("default").detach().numpy()
            transposed = getattr(layer.get_base_layer(), "is_transposed", False)
            theirs = theirs.swapaxes(1, 2) if transposed else theirs
        else:
            theirs = wrapped.base_model.model.get_submodule(target).get_delta_weight("default").detach().numpy()
            theirs = theirs.T if getattr(delta, "transposed_base", False) else theirs
        np.testing.assert_allclose(dense(delta), theirs.reshape(dense(delta).shape), rtol=1e-5, atol=1e-6, err_msg=target)


CASES: dict[str, tuple[Make, dict[str, Any]]] = {
    "plain": (llama(), {"target_modules": "all-linear"}),
    "patterns": (
        llama(),
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
    ),
    "dora": (llama(), {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "lora-bias": (llama(attention_bias=True), {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias-lora-only": (llama(attention_bias=True), {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias-all": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "saved-head": (llama(), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved-norms": (llama(), {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "token-rows": (llama(), {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9, 3]}),
    "token-rows-tied": (llama(tie_word_embeddings=True), {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
    "embeddings": (llama(), {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embedding-dora": (llama(), {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "tied-adapters": (
        llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "bert": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "roberta": (roberta, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "score": (scored, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "t5": (t5, {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5-tables": (t5, {"target_modules": ["q"], "modules_to_save": ["lm_head"], "task_type": "SEQ_2_SEQ_LM"}),
    "whisper": (whisper, {"target_modules": ["q_proj", "fc1"]}),
    "convolutions": (convolutional, {"target_modules": ["conv", "wide"]}),
    "convolutions-dora": (convolutional, {"target_modules": ["conv", "head"], "use_dora": True}),
    "experts-mixtral": (MIXTRAL, {"target_modules": [], "target_parameters": EXPERTS}),
    "experts-qwen3": (QWEN3_MOE, {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "use_rslora": True}),
    "experts-gpt-oss": (GPT_OSS, {"target_modules": [], "target_parameters": EXPERTS, "rank_pattern": {EXPERTS[1]: 2}}),
    "one-expert-parameter": (QWEN3_MOE, {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "layers": (llama(), {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 1]]}),
    "alora": (llama(), {"target_modules": ["q_proj"], "alora_invocation_tokens": [3, 17], "task_type": "CAUSAL_LM"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_what_we_write(case: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    make, options = CASES[case]
    wrapped = saved(make, LoraConfig(r=4, lora_alpha=8, **options), tmp_path / "a")
    adapter = assert_bytes_come_back(tmp_path / "a", tmp_path / "b")
    want = outputs(wrapped)
    np.testing.assert_allclose(outputs(loaded(make, tmp_path / "a")), want, atol=1e-6)
    again = loaded(make, rewritten(adapter, tmp_path / "c"))
    np.testing.assert_allclose(outputs(again), want, atol=1e-5)
    assert not np.allclose(want, outputs(make()), atol=1e-4) or case == "layers"
    assert_deltas(adapter, wrapped)


def factored() -> dict[str, tuple[Make, Any]]:
    from peft import AdaLoraConfig, LoHaConfig, LoKrConfig

    linear = {"target_modules": ["q_proj", "down_proj"]}
    return {
        "adalora": (llama(), AdaLoraConfig(init_r=6, target_r=4, lora_alpha=8, total_step=10, task_type="CAUSAL_LM", **linear)),
        "adalora-conv1d": (gpt2, AdaLoraConfig(init_r=4, total_step=10, target_modules=["c_attn"], fan_in_fan_out=True)),
        "loha": (llama(), LoHaConfig(r=4, alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}, **linear)),
        "lokr": (llama(), LoKrConfig(r=4, alpha=8, **linear)),
        "lokr-both": (llama(), LoKrConfig(r=2, alpha=3, decompose_both=True, **linear)),
        "lokr-whole": (llama(), LoKrConfig(r=64, alpha=3, **linear)),
    }


@pytest.mark.parametrize("case", ["adalora", "adalora-conv1d", "loha", "lokr", "lokr-both", "lokr-whole"])
def test_other_kinds_come_back_and_become_the_pairs_they_equal(case: str, tmp_path: Path) -> None:
    make, config = factored()[case]
    wrapped = saved(make, config, tmp_path / "a")
    adapter = assert_bytes_come_back(tmp_path / "a", tmp_path / "b")
    assert_deltas(adapter, wrapped)
    as_lora = loaded(make, rewritten(adapter, tmp_path / "c"))
    assert as_lora.peft_config["default"].peft_type == "LORA"
    np.testing.assert_allclose(outputs(as_lora), outputs(wrapped), atol=1e-4)


def vera(path: Path, make: Make, **config: Any) -> Any:
    from peft import VeraConfig

    modules = ["c_attn", "c_fc"] if make is gpt2 else ["q_proj", "k_proj", "down_proj"]
    return saved(make, VeraConfig(r=4, target_modules=modules, fan_in_fan_out=make is gpt2, **config), path)


@pytest.mark.parametrize("make", [llama(), gpt2, llama(attention_bias=True)], ids=["llama", "gpt2", "bias"])
def test_vera_comes_back_and_becomes_the_pairs_it_equals(make: Make, tmp_path: Path) -> None:
    wrapped = vera(tmp_path / "a", make, bias="none" if make is not gpt2 else "vera_only")
    assert len(peft.read(tmp_path / "a").shared) == 2
    assert_bytes_come_back(tmp_path / "a", tmp_path / "b")
    adapter = peft.read(tmp_path / "a", base=read_base(base_folder(make, tmp_path / "base")))
    assert_deltas(adapter, wrapped)
    as_lora = loaded(make, rewritten(adapter, tmp_path / "c"))
    assert as_lora.peft_config["default"].peft_type == "LORA"
    np.testing.assert_allclose(outputs(as_lora), outputs(wrapped), atol=1e-5)
    assert not np.allclose(outputs(wrapped), outputs(make()), atol=1e-4)


def test_vera_goes_to_every_format_and_raw_gives_it_back(tmp_path: Path) -> None:
    wrapped = vera(tmp_path / "a", llama())
    base = read_base(base_folder(llama(), tmp_path / "base"))
    for to in ("gguf", "mlx"):
        report = convert.convert(tmp_path / "a", tmp_path / to, to=to, base=base)
        assert {line.loss for line in report.losses} == {Loss.ROUNDED}
        assert_deltas(convert.read(tmp_path / to, base=base), wrapped)
    convert.convert(tmp_path / "a", tmp_path / "lone.safetensors", to="raw")
    convert.convert(tmp_path / "lone.safetensors", tmp_path / "b", to="peft")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name
    with pytest.raises(RefusedError, match="depends on the base.*Name its base model"):
        convert.convert(tmp_path / "a", tmp_path / "none", to="gguf")


def test_vera_whose_projections_peft_would_regenerate_is_refused(tmp_path: Path) -> None:
    vera(tmp_path / "a", llama(), save_projection=False)
    with pytest.raises(RefusedError, match="vera_A and vera_B were not saved.*Save it again with save_projection=True"):
        convert.convert(tmp_path / "a", tmp_path / "b", to="peft")


def test_a_pattern_order_lost_by_peft_is_reported_when_converting(tmp_path: Path) -> None:
    """Trained with the second pattern first, saved by peft in the order of the alphabet: other scales after loading."""
    from peft import LoraConfig

    patterns = {"self_attn.q_proj": 32, r"layers\.0\..*": 2}
    wrapped = saved(llama(), LoraConfig(r=4, target_modules=["q_proj"], alpha_pattern=patterns), tmp_path / "a")
    pattern_order = list(json.loads((tmp_path / "a" / peft.CONFIG).read_text())["alpha_pattern"])
    assert pattern_order == sorted(patterns) != list(patterns)
    assert not np.allclose(outputs(loaded(llama(), tmp_path / "a")), outputs(wrapped), atol=1e-4)
    base = read_base(base_folder(llama(), tmp_path / "base"))
    for to in ("peft", "raw", "gguf", "mlx"):
        notes = convert.convert(tmp_path / "a", tmp_path / to, to=to, base=base).notes
        pattern_notes = [note for note in notes if "layers.0.self_attn.q_proj: alpha_pattern" in note]
        assert any("peft does not preserve their order" in note for note in pattern_notes), to


def per_expert() -> Any:
    """A mixture of experts as transformers 4 built it: a linear module for each expert."""
    import torch

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(
                torch.nn.ModuleDict({"gate_proj": torch.nn.Linear(8, 6), "down_proj": torch.nn.Linear(6, 8)}) for _ in range(3)
            )

        def forward(self, x: Any) -> Any:
            return sum(expert["down_proj"](torch.relu(expert["gate_proj"](x))) for expert in self.experts)

    torch.manual_seed(0)
    return Experts().eval()


def test_experts_that_are_modules_of_their_own(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], exclude_modules=["experts.1.down_proj"])
    wrapped = saved(per_expert, config, tmp_path / "a")
    adapter = assert_bytes_come_back(tmp_path / "a", tmp_path / "b")
    assert set(adapter.deltas) == {f"experts.{n}.{part}" for n in range(3) for part in ("gate_proj", "down_proj")} - {
        "experts.1.down_proj"
    }
    again = loaded(per_expert, rewritten(adapter, tmp_path / "c"))
    x = torch.randn(4, 8)
    torch.testing.assert_close(again(x), wrapped(x))


def base_folder(make: Make, path: Path) -> Path:
    make().save_pretrained(str(path), safe_serialization=True)
    return path
