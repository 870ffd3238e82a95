"""Merges into GGUF that cannot be written are refused before anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base, prepare_merge
from adapterhub_converters.adapter import Adapter, LowRankEmbedding, Rows, StackedLowRank
from adapterhub_converters.containers import gguf_output
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_output import QuantizedTensor
from adapterhub_converters.containers.gguf_types import MetadataValue, f32_value, string_value, u32_value
from adapterhub_converters.errors import AdapterhubError
from tests.conftest import need_module
from tests.merging.into_base.test_write_gguf import RNG, K, Q, low_rank, stored_as
from tests.support import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random Llama and its GGUF in float32."""
    for module in ("torch", "transformers"):
        need_module(module)
    model = tiny.model()
    return model, tiny.write_gguf(model, tmp_path_factory.mktemp("llama") / "base.gguf")


TABLE = np.ones((128, 64), np.float32)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("adapter", "form", "says"),
    [
        (Adapter({"model.layers.9.self_attn.q_proj": low_rank()}), "F32", "the base has no blk.9.attn_q.weight"),
        (Adapter({"model.layers.0.conv": low_rank()}), "F32", "not a module that llama.cpp's 'llama' has as a tensor"),
        (Adapter({Q: low_rank(64, 32)}), "F32", "of shape (64, 32), the base's blk.0.attn_q.weight is (64, 64)"),
        (Adapter({Q: low_rank(bias=np.ones(64, np.float32))}), "F32", "no blk.0.attn_q.bias"),
        (Adapter({Q: low_rank(magnitude=np.ones(3, np.float32))}), "F32", "a DoRA magnitude of 3 numbers for 64"),
        (Adapter({Q: low_rank(scale=np.nan)}), "F32", "contains NaN or Inf"),
        (Adapter({}, replaced={"lm_head.weight": TABLE[:5]}), "F32", "The vocabulary was resized"),
        (Adapter({}, replaced={"lm_head.what": TABLE}), "F32", "the base has no output.what"),
        (Adapter({}, rows={"model.embed_tokens": Rows((128,), TABLE[:1])}), "F32", "do not fit token_embd.weight"),
        (Adapter({"lm_head": low_rank(128)}, replaced={"lm_head.weight": TABLE}), "F32", "another changes it too"),
        (Adapter({Q: low_rank(scale=1e6)}), "F16", "the largest float16 number. Write bfloat16 instead"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, llama: Any, adapter: Adapter, form: str, says: str) -> None:
    gguf = stored_as(llama[1], tmp_path / "base.gguf", form)
    with pytest.raises(AdapterhubError) as caught:
        prepare_merge([(adapter, 1.0)], gguf)
    assert says in str(caught.value)
    assert caught.value.exit_code == 6


@pytest.mark.peer
def test_a_type_that_cannot_be_written_needs_another_one(tmp_path: Path, llama: Any) -> None:
    with GGUFFile(llama[1]) as file:
        metadata = {key: MetadataValue(file.header.kinds[key], value) for key, value in file.header.metadata.items()}
        tensors: dict[str, Any] = {name: file.tensor(name) for name in file.tensors}
    tensors["blk.0.attn_q.weight"] = QuantizedTensor("IQ4_NL", (64, 64), np.ones((64, 2 * 18), np.uint8))
    gguf_output.write(tmp_path / "base.gguf", metadata, tensors)
    adapter = [(Adapter({Q: low_rank(scale=1e3)}), 1.0)]
    with pytest.raises(AdapterhubError, match="is IQ4_NL in the base, a type that cannot be written") as caught:
        prepare_merge(adapter, tmp_path / "base.gguf")
    assert caught.value.code == "type-not-writable"
    prepare_merge([(Adapter({K: low_rank(32)}), 1.0)], tmp_path / "base.gguf")  # untouched, it stays as it is
    merge_into_base(adapter, tmp_path / "base.gguf", tmp_path / "out.gguf", options=Options(requantize="q8_0"))
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert file.tensors["blk.0.attn_q.weight"].type_name == "Q8_0"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(requantize="nf4"), "nf4: is a type of Hugging Face folders"),
        (Options(requantize="q8_0", dtype="f16"), "matrices become q8_0 already"),
    ],
)
def test_options_that_a_gguf_has_no_use_for_are_refused(tmp_path: Path, options: Options, says: str) -> None:
    gguf_output.write(tmp_path / "base.gguf", {"general.architecture": string_value("llama")}, {"blk.0.attn_q.weight": TABLE})
    with pytest.raises(AdapterhubError, match=says) as caught:
        prepare_merge([(Adapter({Q: low_rank()}), 1.0)], tmp_path / "base.gguf", options)
    assert caught.value.exit_code == 6
    assert (caught.value.code, caught.value.hint) in [("refused", "Choose q4_0"), ("two-types", "Name one type")]


def test_gemma_has_no_output_layer_to_untie(tmp_path: Path) -> None:
    table = RNG.normal(size=(16, 8)).astype(np.float32)
    metadata = {
        "general.architecture": string_value("gemma"),
        "gemma.attention.head_count": u32_value(2),
        "gemma.rope.freq_base": f32_value(1e4),
    }
    gguf_output.write(tmp_path / "base.gguf", metadata, {"token_embd.weight": table})
    delta = LowRankEmbedding(np.ones((2, 16), np.float32), np.ones((8, 2), np.float32), alpha=1)
    with pytest.raises(
        AdapterhubError, match="no output layer but the embedding table: merged, a change of one would act in both"
    ):
        prepare_merge([(Adapter({"model.embed_tokens": delta}), 1.0)], tmp_path / "base.gguf")


def test_experts_on_a_base_without_any_are_refused(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": string_value("qwen3moe"),
        "qwen3moe.expert_count": u32_value(2),
        "qwen3moe.attention.head_count": u32_value(2),
    }
    tensors = {"token_embd.weight": np.ones((16, 8), np.float32), "blk.0.ffn_gate_exps.weight": np.ones((2, 8, 8), np.float32)}
    gguf_output.write(tmp_path / "base.gguf", metadata, tensors)
    for name, experts in (("down_proj", 2), ("gate_up_proj", 3)):
        lora_A, lora_B = np.ones((experts, 2, 8), np.float32), np.ones((experts, 16 if "up" in name else 8, 2), np.float32)
        delta = StackedLowRank(lora_A, lora_B, alpha=1, transposed_base=False)
        with pytest.raises(AdapterhubError, match=r"model.layers.0.mlp.experts.*(the base has no|not as many)") as caught:
            prepare_merge([(Adapter({f"model.layers.0.mlp.experts.{name}": delta}), 1.0)], tmp_path / "base.gguf")
        assert caught.value.exit_code == 6
