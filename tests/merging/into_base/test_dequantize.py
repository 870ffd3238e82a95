"""Quantized folders in floats: transformers, bitsandbytes and peft where they run without a GPU, else the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.merging.into_base.test_write_folder import TOKENS, loaded, logits
from tests.support import tiny

Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}
RNG = np.random.default_rng(0)
FLOATS = Options(dequantize=True)


def written(folder: Path, tensors: dict[str, np.ndarray], quantized: dict[str, Any], dtype: str = "float32") -> Path:
    folder.mkdir()
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    document = {**CONFIG, "dtype": dtype, "quantization_config": quantized}
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def zero_adapter(out: int, into: int) -> Adapter:
    """A delta on another module, so that what is dequantized comes through as it is."""
    return Adapter(
        {"model.layers.0.self_attn.o_proj": LowRank(np.ones((1, into), np.float32), np.ones((out, 1), np.float32), 1)}
    )


def dequantized(base: Path, out: Path) -> np.ndarray:
    """The weight of Q in the merged folder, its config saying nothing of quantization any more."""
    merge_into_base([(zero_adapter(8, 8), 1.0)], base, out, options=FLOATS)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    with SafetensorsFile(out / "model.safetensors") as file:
        assert sorted(file.tensors) == ["model.layers.0.self_attn.o_proj.weight", f"{Q}.weight"]
        return file.tensor(f"{Q}.weight")


OTHER = {"model.layers.0.self_attn.o_proj.weight": np.ones((8, 8), np.float32)}


@pytest.mark.peer
@pytest.mark.parametrize("quantization", ["nf4", "nf4 double", "fp4", "int8"])
def test_bitsandbytes_through_transformers(torch: Any, tmp_path: Path, quantization: str) -> None:
    need_module("bitsandbytes")
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    tiny.model(intermediate_size=128).save_pretrained(tmp_path / "plain")
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization[:3], bnb_4bit_use_double_quant="double" in quantization,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )  # fmt: skip
    loaded_model = loaded(tmp_path / "plain", quantization_config=config)
    loaded_model.save_pretrained(tmp_path / "base")
    exact = (
        {} if quantization == "int8" else floats(loaded_model)
    )  # before its first use, at which its kernels lay the weights out anew
    tiny.adapter(tiny.model(intermediate_size=128), tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    wrapped = PeftModel.from_pretrained(loaded_model, tmp_path / "adapter")
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out", options=FLOATS)
    merged = loaded(tmp_path / "out")
    for name, weight in exact.items():
        module = wrapped.base_model.model.get_submodule(name)
        delta = module.get_delta_weight("default") if hasattr(module, "get_delta_weight") else 0
        ours = merged.get_submodule(name).weight.data
        assert (
            torch.equal(ours, weight) if isinstance(delta, int) else torch.allclose(ours, weight + delta, rtol=0, atol=1e-6)
        ), name
    expected, actual = logits(wrapped, TOKENS), logits(merged, TOKENS)
    # The kernels round the inputs as well.
    assert np.abs(actual - expected).max() < (0.1 if quantization == "int8" else 0.02) * np.abs(expected).max()


def floats(model: Any) -> dict[str, Any]:
    """Module to its weight, as bitsandbytes dequantizes it."""
    from bitsandbytes.functional import dequantize_4bit

    states = {name: module.weight for name, module in model.named_modules() if hasattr(module, "compute_dtype")}
    assert len(states) == 14
    return {name: dequantize_4bit(weight.data, weight.quant_state).float() for name, weight in states.items()}


def test_gptq_by_hand(tmp_path: Path) -> None:
    """Two groups of eight inputs, four bits; the zero point that is stored is one less."""
    codes = RNG.integers(0, 16, size=(16, 8)).astype(np.uint32)  # (in, out)
    zeros, scales = np.full((2, 8), 7, np.uint32), np.arange(1, 17).reshape(2, 8).astype(np.float16) / 16
    order = np.array([1, 0] * 8, np.int32)
    packed = sum(codes[place::8] << np.uint32(4 * place) for place in range(8)).astype(np.uint32)
    packed_zeros = sum(zeros[:, place::8] << np.uint32(4 * place) for place in range(8)).astype(np.uint32)
    tensors = {
        f"{Q}.qweight": packed.view(np.int32),
        f"{Q}.qzeros": packed_zeros.view(np.int32),
        f"{Q}.scales": scales,
        f"{Q}.g_idx": order,
        **OTHER,
    }
    for version, less in (("gptq", 1), ("gptq_v2", 0)):
        config = {"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": version}
        base = written(tmp_path / version, tensors, config)
        expected = np.empty((8, 16), np.float32)
        for out in range(8):
            for into in range(16):
                group = order[into]
                expected[out, into] = float(scales[group, out]) * (int(codes[into, out]) - (7 + less))
        np.testing.assert_array_equal(dequantized(base, tmp_path / f"{version}-out"), expected)


def test_awq_by_hand(tmp_path: Path) -> None:
    """One word holds outputs 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits up."""
    word = 0x76543210  # so output 0 is 0, 2 is 1, 4 is 2, 6 is 3, 1 is 4, 3 is 5, 5 is 6, 7 is 7
    tensors: dict[str, np.ndarray] = {
        f"{Q}.qweight": np.full((8, 1), word, np.int32),
        f"{Q}.qzeros": np.full((2, 1), 0x11111111, np.int32),
        f"{Q}.scales": np.stack([np.full(8, 0.5), np.full(8, 2)]).astype(np.float16),
        **OTHER,
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 4, "version": "gemm", "zero_point": True}
    values_read = dequantized(written(tmp_path / "base", tensors, config), tmp_path / "out")
    values = np.array([0, 4, 1, 5, 2, 6, 3, 7]) - 1
    np.testing.assert_array_equal(values_read, np.outer(values, np.repeat([0.5, 2], 4)).astype(np.float32))


@pytest.mark.parametrize(
    ("scales", "config"),
    [
        (np.array([[0.5, 2], [4, 8]], np.float32), {"quant_method": "fp8", "weight_block_size": [4, 8]}),
        (np.arange(1, 9, dtype=np.float32).reshape(8, 1), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
        (np.array([3], np.float32), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    ],
)
def test_fp8_by_block_channel_and_tensor(tmp_path: Path, scales: np.ndarray, config: dict[str, Any]) -> None:
    weight = RNG.normal(size=(8, 16)).astype(dtypes.NUMPY["F8_E4M3"])
    leaf = "weight_scale_inv" if "weight_block_size" in config else "weight_scale"
    base = written(tmp_path / "base", {f"{Q}.weight": weight, f"{Q}.{leaf}": scales, **OTHER}, config)
    if scales.shape == (2, 2):
        scales = np.repeat(np.repeat(scales, 4, axis=0), 8, axis=1)
    np.testing.assert_array_equal(dequantized(base, tmp_path / "out"), weight.astype(np.float32) * scales)


def compressed(bits: int, form: str, **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, "type": "int", "symmetric": True, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def test_compressed_tensors_by_hand(tmp_path: Path) -> None:
    codes = RNG.integers(-8, 8, size=(8, 16))
    words = sum(((codes[:, place::8] + 8).astype(np.uint32)) << np.uint32(4 * place) for place in range(8)).astype(np.uint32)
    scales = np.arange(1, 17, dtype=np.float32).reshape(8, 2)
    shape = np.array([8, 16], np.int64)
    tensors = {f"{Q}.weight_packed": words.view(np.int32), f"{Q}.weight_scale": scales, f"{Q}.weight_shape": shape, **OTHER}
    values_read = dequantized(written(tmp_path / "base", tensors, compressed(4, "pack-quantized")), tmp_path / "out")
    np.testing.assert_array_equal(values_read, (codes * np.repeat(scales, 8, axis=1)).astype(np.float32))

    whole = RNG.integers(-128, 128, size=(8, 16)).astype(np.int8)
    tensors = {f"{Q}.weight": whole, f"{Q}.weight_scale": scales[:, :1].copy(), **OTHER}
    values_read = dequantized(written(tmp_path / "base8", tensors, compressed(8, "int-quantized")), tmp_path / "out8")
    np.testing.assert_array_equal(values_read, whole.astype(np.float32) * scales[:, :1])


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({"qweight": np.ones((1, 8), np.int32), "scales": np.ones((1, 8), np.float16)}, {"quant_method": "gptq", "bits": 4},
         "GPTQ without its scales or zero points"),
        ({"qweight": np.ones((1, 8), np.int32), "scales": np.ones((1, 8), np.float16), "qzeros": np.ones((2, 1), np.int32)},
         {"quant_method": "gptq", "bits": 4}, r"GPTQ with scales \(1, 8\) and zero points \(2, 1\), an unknown layout"),
        ({"qweight": np.ones((1, 8), np.int32), "scales": np.ones((1, 8), np.float16), "qzeros": np.ones((1, 1), np.int64)},
         {"quant_method": "gptq", "bits": 4}, "its qzeros is I64, not integers of 32 bits"),
        ({"qweight": np.ones((8, 1), np.int32), "scales": np.ones((3, 8), np.float16), "qzeros": np.ones((3, 1), np.int32)},
         {"quant_method": "awq", "bits": 4}, r"AWQ with words \(8, 1\), scales \(3, 8\) and zero points \(3, 1\), an unknown"),
        ({"weight_packed": np.ones((8, 1), np.int32), "weight_scale": np.ones((8, 3), np.float32),
          "weight_shape": np.array([8, 8])}, compressed(4, "pack-quantized"),
         r"packed integers with scales \(8, 3\), an unknown layout"),
        ({"qweight": np.ones((3, 8), np.int32), "scales": np.ones((1, 8), np.float16), "qzeros": np.ones((1, 1), np.int32),
          "g_idx": np.zeros(32, np.int32)}, {"quant_method": "gptq", "bits": 3}, "GPTQ in 3 bits"),
        ({"weight": np.ones((8, 8), np.uint8)}, {"quant_method": "hqq"}, "an unknown layout"),
        ({"weight_packed": np.ones((8, 1), np.int32), "weight_scale": np.ones((8, 1), np.float32),
          "weight_shape": np.array([8, 8]), "weight_zero_point": np.ones((1, 1), np.int32)},
         compressed(4, "pack-quantized", symmetric=False), "comes with a weight_zero_point"),
        ({"weight": np.ones((8, 8), dtypes.NUMPY["F8_E4M3"])}, {"quant_method": "fp8"}, "without a scale"),
    ],
)  # fmt: skip
def test_an_unknown_layout_is_refused_by_name(tmp_path: Path, tensors: Any, config: dict[str, Any], says: str) -> None:
    base = written(tmp_path / "base", {**{f"{Q}.{leaf}": array for leaf, array in tensors.items()}, **OTHER}, config)
    with pytest.raises(AdapterhubError, match=says) as caught:
        merge_into_base([(zero_adapter(8, 8), 1.0)], base, tmp_path / "out", options=FLOATS)
    assert Q in str(caught.value)
    assert caught.value.exit_code == 6


def test_bitsandbytes_of_a_model_with_transposed_weights_is_refused(tmp_path: Path) -> None:
    base = written(tmp_path / "base", dict(OTHER), {"quant_method": "bitsandbytes", "load_in_8bit": True})
    document = {**json.loads((base / "config.json").read_text()), "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (base / "config.json").write_text(json.dumps(document))
    says = "base: bitsandbytes stores the weights of gpt2 transposed, unlike any model in floats. Name the full-precision model"
    with pytest.raises(AdapterhubError, match=says):
        merge_into_base([(zero_adapter(8, 8), 1.0)], base, tmp_path / "out", options=FLOATS)
