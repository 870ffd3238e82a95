"""A quantized base has the shapes of the model before: an adapter fits it, and not one that only packs to the same size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from adapterhub import checks
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.containers import safetensors_file
from tests.conftest import need_module
from tests.support import folders, tiny

MODULE = "model.layers.0.mlp.up_proj"
OUT, IN = 64, 128
Arrays = dict[str, np.ndarray]
F8 = np.dtype(ml_dtypes.float8_e4m3fn)


def zeros(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.zeros(shape, dtype)


def bnb4(out: int, into: int, kind: str = "nf4", storage: Any = np.uint8) -> Arrays:
    state = np.frombuffer(json.dumps({"quant_type": kind, "blocksize": 64, "shape": [out, into]}).encode(), np.uint8)
    width = np.dtype(storage).itemsize
    return {
        "weight": zeros(out * into // 2 // width, 1, dtype=storage), "weight.absmax": zeros(out * into // 64, dtype=np.uint8),
        "weight.quant_map": zeros(16), "weight.nested_absmax": zeros(1), "weight.nested_quant_map": zeros(256),
        f"weight.quant_state.bitsandbytes__{kind}": state,
    }  # fmt: skip


def int8(out: int, into: int) -> Arrays:
    return {"weight": zeros(out, into, dtype=np.int8), "SCB": zeros(out), "weight_format": zeros(dtype=np.uint8)}


def gptq(out: int, into: int, bits: int = 4, *, order: bool = True, group: int = 32) -> Arrays:
    groups = into // group
    arrays = {
        "qweight": zeros(into * bits // 32, out, dtype=np.int32), "qzeros": zeros(groups, out * bits // 32, dtype=np.int32),
        "scales": zeros(groups, out),
    }  # fmt: skip
    return arrays | ({"g_idx": zeros(into, dtype=np.int32)} if order else {})


def awq(out: int, into: int) -> Arrays:
    return {
        "qweight": zeros(into, out // 8, dtype=np.int32), "qzeros": zeros(into // 32, out // 8, dtype=np.int32),
        "scales": zeros(into // 32, out),
    }  # fmt: skip


def pack(out: int, into: int, bits: int = 4) -> Arrays:
    return {
        "weight_packed": zeros(out, -(-into // (32 // bits)), dtype=np.int32), "weight_scale": zeros(out, 1),
        "weight_shape": np.array([out, into], np.int64),
    }  # fmt: skip


def fp8(out: int, into: int, *, block: bool) -> Arrays:
    scale = {"weight_scale_inv": zeros(1, 1, dtype=np.float32)} if block else {"weight_scale": zeros(out, 1)}
    return {"weight": zeros(out, into, dtype=F8), "input_scale": zeros(1), **scale}


def fp4(out: int, into: int, name: str, group: int = 16) -> Arrays:
    scale = F8 if group == 16 else np.uint8
    return {
        name: zeros(out, into // 2, dtype=np.uint8), "weight_scale": zeros(out, into // group, dtype=scale),
        "weight_scale_2": zeros(dtype=np.float32),
    }  # fmt: skip


def mlx(out: int, into: int, bits: int, group: int = 32) -> Arrays:
    scales = zeros(out, into // group)
    return {"weight": zeros(out, into * bits // 32, dtype=np.uint32), "scales": scales, "biases": scales}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
PACK = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
Make = Callable[[int, int], Arrays]
SCHEMES: dict[str, tuple[Mapping[str, Any], Make, Make]] = {
    # Scheme: what the config says, a layer of (out, in), and one that packs to tensors of the same size.
    "bnb nf4": (BNB, bnb4, lambda out, into: bnb4(into, out)),
    "bnb fp4": (BNB, lambda out, into: bnb4(out, into, "fp4"), lambda out, into: bnb4(out // 2, into * 2, "fp4")),
    "bnb bf16": (BNB, lambda o, i: bnb4(o, i, storage=np.float16), lambda o, i: bnb4(o * 2, i // 2, storage=np.float16)),
    "bnb int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8, lambda out, into: int8(into, out)),
    **{
        f"gptq {bits}": (
            GPTQ | {"bits": bits},
            lambda out, into, bits=bits: gptq(out, into, bits),  # type: ignore[misc]
            lambda out, into, bits=bits: gptq(out // 2, into * 2, bits),  # type: ignore[misc]
        )
        for bits in (2, 3, 4, 8)
    },
    "gptq without g_idx": (GPTQ, lambda o, i: gptq(o, i, order=False), lambda o, i: gptq(o * 2, i // 2, order=False)),
    "gptq by g_idx": ({"quant_method": "gptq", "dynamic": {"x": {}}}, gptq, lambda out, into: gptq(out, into, 8, group=64)),
    "awq": (AWQ, awq, lambda out, into: awq(into, out)),
    "pack-quantized": (PACK, pack, lambda out, into: pack(into, out)),
    "pack 8": (PACK, lambda out, into: pack(out, into, 8), lambda out, into: pack(out, into * 2)),
    "pack, padded": (PACK, lambda out, into: pack(out, into - 3), lambda out, into: pack(out, into - 2)),
    "fp8 block": ({"quant_method": "fp8"}, lambda o, i: fp8(o, i, block=True), lambda o, i: fp8(i, o, block=True)),
    "fp8 channel": (PACK, lambda o, i: fp8(o, i, block=False), lambda o, i: fp8(i, o, block=False)),
    "nvfp4": ({"quant_method": "modelopt"}, lambda o, i: fp4(o, i, "weight"), lambda o, i: fp4(o * 2, i // 2, "weight")),
    "nvfp4 packed": (PACK, lambda o, i: fp4(o, i, "weight_packed"), lambda o, i: fp4(i, o, "weight_packed")),
    "mxfp4 packed": (PACK, lambda o, i: fp4(o, i, "weight_packed", 32), lambda o, i: fp4(i, o, "weight_packed", 32)),
    **{
        f"mlx {bits}": (
            {"group_size": 32, "bits": bits},
            lambda out, into, bits=bits: mlx(out, into, bits),  # type: ignore[misc]
            lambda out, into, bits=bits: mlx(into, out, bits),  # type: ignore[misc]
        )
        for bits in (2, 3, 4, 6, 8)
    },
    "mlx, a module with its own": (
        {"group_size": 64, "bits": 4, MODULE: {"group_size": 32, "bits": 8}},
        lambda out, into: mlx(out, into, 8),
        lambda out, into: mlx(out // 2, into * 2, 8),
    ),
}  # fmt: skip


def base(path: Path, arrays: Arrays, config: Mapping[str, Any], module: str = MODULE, model_type: str = "llama") -> BaseSpec:
    path.mkdir()
    safetensors_file.write(path / "model.safetensors", {f"{module}.{leaf}": array for leaf, array in arrays.items()})
    key = "quantization" if "quant_method" not in config else "quantization_config"
    document = {"architectures": ["LlamaForCausalLM"], "model_type": model_type, "num_hidden_layers": 1, key: config}
    (path / "config.json").write_text(json.dumps(document))
    return read_base(path)


def problem_codes(folder: Path, spec: BaseSpec) -> set[str]:
    return {problem.code for problem in checks.check(folder, base=spec).problems} - {"unpinned"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_is_known_by_its_shape_before_packing(tmp_path: Path, scheme: str) -> None:
    config, make, decoy = SCHEMES[scheme]
    into = IN - 3 if "padded" in scheme else IN
    shapes = folders.pairs(1, module="model.layers.{}.mlp.up_proj", size=(OUT, into))
    folder = folders.adapter(tmp_path / "a", shapes, target_modules=["up_proj"])
    assert problem_codes(folder, base(tmp_path / "b", make(OUT, IN), config)) == set()
    packed, decoy_weights = make(OUT, IN), decoy(OUT, IN)
    main = next(leaf for leaf in ("weight", "qweight", "weight_packed") if leaf in packed)
    assert packed[main].nbytes == decoy_weights[main].nbytes or scheme == "gptq by g_idx"
    if scheme == "gptq by g_idx":  # 8 bits of as many inputs are a larger tensor, and the same module
        assert problem_codes(folder, base(tmp_path / "c", decoy_weights, config)) == set()
    else:
        assert problem_codes(folder, base(tmp_path / "c", decoy_weights, config)) == {"shape-mismatch"}


UNKNOWN: dict[str, tuple[Mapping[str, Any], Arrays]] = {
    "hqq": ({"quant_method": "hqq"}, {"W_q": zeros(OUT, IN // 2, dtype=np.uint8), "scale": zeros(OUT)}),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, {"qweight": zeros(4, 256, dtype=np.int32), "scales": zeros(4, OUT)}),
    "marlin's own": ({"quant_method": "marlin"}, {"B": zeros(8, 128, dtype=np.int32), "s": zeros(4, OUT)}),
    "awq gemv fast": (AWQ | {"version": "gemv_fast"}, {"qweight": zeros(16, IN, dtype=np.int16), "scales": zeros(4, OUT)}),
    "bitnet": ({"quant_method": "bitnet"}, {"weight": zeros(OUT // 4, IN, dtype=np.uint8), "weight_scale": zeros(1)}),
    "eetq": ({"quant_method": "eetq"}, {"weight": zeros(IN, OUT, dtype=np.int8), "weight_scales": zeros(OUT)}),
    "torchao": ({"quant_method": "torchao"}, {"_weight_qdata": zeros(IN, OUT, dtype=F8), "_weight_scale": zeros(OUT)}),
    "quanto": ({"quant_method": "quanto"}, {"weight._data": zeros(OUT, IN, dtype=np.int8), "weight._scale": zeros(OUT)}),
    "aqlm": ({"quant_method": "aqlm"}, {"codes": zeros(OUT, 8, 2, dtype=np.int16), "codebooks": zeros(2, 256, 1, 8)}),
    "bnb without a state": (BNB, {"weight": zeros(OUT * IN // 2, 1, dtype=np.uint8)}),
    "gptq of 4 bits that has not": (GPTQ, gptq(OUT, IN, 8, order=False)),
    "a word for a method": ({"quant_method": "new"}, {"weight": zeros(7, 3, dtype=np.int32)}),
    "pack without a shape": (PACK, {"weight_packed": zeros(OUT, 16, dtype=np.int32), "weight_scale": zeros(OUT, 1)}),
    "pack with a false shape": (PACK, pack(OUT, IN) | {"weight_shape": np.array([OUT, -1], np.int64)}),
    "2:4 sparse": (PACK, {"compressed": zeros(OUT, 64), "bitmask": zeros(OUT, 16, dtype=np.uint8)}),
    "mlx that says other bits": ({"group_size": 32, "bits": 4}, mlx(OUT, IN, 8)),
    "nothing said": ({"quant_method": "x"}, {"qweight": zeros(16, OUT, dtype=np.int32)}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", UNKNOWN)
def test_a_layout_that_is_not_known_is_no_error(tmp_path: Path, scheme: str) -> None:
    config, arrays = UNKNOWN[scheme]
    shapes = folders.pairs(1, module="model.layers.{}.mlp.up_proj", size=(OUT, IN))
    folder = folders.adapter(tmp_path / "a", shapes, target_modules=["up_proj"])
    spec = base(tmp_path / "b", arrays, config)
    assert problem_codes(folder, spec) == {"shape-unknown"}
    assert spec.fingerprint is None
    assert checks.check(folder, base=spec).ok


@pytest.mark.parametrize(
    ("out", "into", "expected_codes"), [(64, 96, set()), (192, 32, {"shape-mismatch"}), (32, 192, {"shape-mismatch"})]
)
def test_the_blocks_of_gpt_oss_are_its_experts(tmp_path: Path, out: int, into: int, expected_codes: set[str]) -> None:
    experts = "model.layers.0.mlp.experts"
    arrays = {
        "down_proj_blocks": zeros(4, out, into // 32, 16, dtype=np.uint8),
        "down_proj_scales": zeros(4, out, into // 32, dtype=np.uint8), "down_proj_bias": zeros(4, out),
    }  # fmt: skip
    folder = folders.adapter(
        tmp_path / "a",
        {f"{experts}.lora_A.weight": (8, 96), f"{experts}.lora_B.weight": (64, 8)},
        target_parameters=["mlp.experts.down_proj"],
        target_modules=[],
        peft_version="0.21.2",
    )
    spec = base(tmp_path / "b", arrays, {"quant_method": "mxfp4"}, experts, model_type="gpt_oss")
    assert spec.tensors[f"{experts}.down_proj"].shape == (4, into, out)  # as transformers' GptOssExperts has it
    assert problem_codes(folder, spec) == expected_codes


def test_a_weight_and_its_scales_may_be_in_two_files(tmp_path: Path) -> None:
    arrays = {f"{MODULE}.{leaf}": array for leaf, array in bnb4(OUT, IN).items()}
    place = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(arrays)}
    for file in set(place.values()):
        safetensors_file.write(tmp_path / file, {name: arrays[name] for name in arrays if place[name] == file})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": BNB}))
    assert {name: tensor.shape for name, tensor in read_base(tmp_path).tensors.items()} == {f"{MODULE}.weight": (OUT, IN)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with an adapter on every linear module and on its tables."""
    for name in ("torch", "transformers", "peft"):
        need_module(name)
    root = tmp_path_factory.mktemp("model")
    model = tiny.model(intermediate_size=128)
    model.save_pretrained(root / "hf")
    tiny.adapter(model, root / "a")
    return root


@pytest.mark.peer
@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "fp4, twice", "nf4 in bfloat16", "int8"],
)
def test_a_base_that_bitsandbytes_packed(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    need_module("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packed_model = AutoModelForCausalLM.from_pretrained(
        model / "hf", quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    )
    packed_model.save_pretrained(tmp_path / "q")
    spec = read_base(tmp_path / "q")
    assert (spec.fingerprint, dict(spec.packed)) == (read_base(model / "hf").fingerprint, {})
    assert problem_codes(model / "a", spec) == set()


@pytest.mark.peer
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_base_that_mlx_packed(model: Path, tmp_path: Path, bits: int) -> None:
    need_module("mlx_lm")
    import mlx.nn
    from mlx_lm import utils

    packed_model, _ = utils.load_model(model / "hf")
    _, config = utils.quantize_model(
        packed_model,
        json.loads((model / "hf" / "config.json").read_text()),
        group_size=32,
        bits=bits,
        quant_predicate=lambda path, module: (
            {"bits": 8, "group_size": 64} if "down_proj" in path else hasattr(module, "to_quantized")
        ),
    )
    assert isinstance(packed_model.model.layers[0].mlp.up_proj, mlx.nn.QuantizedLinear)
    (tmp_path / "q").mkdir()
    utils.save_model(tmp_path / "q", packed_model)
    utils.save_config(config, tmp_path / "q" / "config.json")
    spec = read_base(tmp_path / "q")
    assert (spec.fingerprint, spec.quantization, dict(spec.packed)) == (read_base(model / "hf").fingerprint, "mlx", {})
    assert problem_codes(model / "a", spec) == set()


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1", "Q4_K", "Q6_K", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "TQ1_0"])
def test_a_base_that_gguf_packed(tmp_path: Path, kind: str) -> None:
    gguf = need_gguf()
    kinds = gguf.GGMLQuantizationType
    out, into = 256, 512
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(1)
    block, size = gguf.GGML_QUANT_SIZES[kinds[kind]]
    for name, rows, columns in (("blk.0.ffn_up", out, into), ("token_embd", into, out)):
        raw = np.zeros((rows, columns // block * size), np.uint8)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kinds[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    module = "model.layers.{}.mlp.up_proj"
    spec = read_base(tmp_path / "m.gguf")
    fits = folders.adapter(tmp_path / "a", folders.pairs(1, module=module, size=(out, into)), target_modules=["up_proj"])
    turned = folders.adapter(tmp_path / "t", folders.pairs(1, module=module, size=(into, out)), target_modules=["up_proj"])
    assert (problem_codes(fits, spec), problem_codes(turned, spec)) == (set(), {"shape-mismatch"})


def need_gguf() -> Any:
    need_module("gguf")
    import gguf

    return gguf
