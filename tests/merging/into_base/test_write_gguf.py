"""Into GGUF, with llama.cpp itself as the oracle: its conversion of the merged model, its loader, logits and quantizers.

With f the real `convert_hf_to_gguf.py`, W the weights of a random model and s·BA the deltas of an adapter on all of them,
merging into f(W) gives f(W + s·BA), tensor by tensor.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base, prepare_merge
from adapterhub.merging.into_base.tensor_types import QUANTIZERS, Blocks
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_output import QuantizedTensor
from adapterhub_converters.containers.gguf_types import MetadataValue, string_value, strings_value, u32_value
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import gguf as gguf_lora
from tests.conftest import need_module
from tests.converters.test_architecture_lookup import CLASSES, TOKENS, deltas, merged
from tests.support import llama_cpp, tiny
from tests.support.llama_cpp_scripts import Converter

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
RNG = np.random.default_rng(0)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile(path) as file:
        return {name: file.tensor(name) for name in file.tensors}


def converted_model(root: Path, name: str, converted: Converter, *flags: str) -> tuple[Path, Path]:
    tiny.model(name).save_pretrained(root / "hf")
    if name.startswith("Gemma3"):  # its conversion cuts the table of embeddings to as many rows as there are tokens
        vocabulary = {str(number): number for number in range(tiny.CONFIG["vocab_size"])}
        (root / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return root / "hf", converted(root / "hf", root / "base.gguf", *flags)


@pytest.mark.peer
@pytest.mark.parametrize("name", CLASSES)
def test_merging_into_the_converted_base_is_converting_the_merged_one(tmp_path: Path, converted: Converter, name: str) -> None:
    folder, gguf = converted_model(tmp_path, name, converted)
    base = read_base(folder)
    adapter = Adapter(dict(deltas(base, architecture_lookup.by_class(name, "test"))))
    report = merge_into_base([(adapter, 1.0)], gguf, tmp_path / "out.gguf")
    expected = tensors_of(converted(merged(folder, adapter, tmp_path / "merged"), tmp_path / "merged.gguf"))
    before, after = tensors_of(gguf), tensors_of(tmp_path / "out.gguf")
    assert list(after) == list(before)
    for tensor, array in after.items():
        np.testing.assert_allclose(array, expected[tensor], rtol=0, atol=2e-6, err_msg=tensor)
        assert (tensor in report.touched) or array.tobytes() == before[tensor].tobytes(), tensor
    assert all(change.retained and change.retained > 0.999 for change in report.touched.values())


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("DeepseekV2ForCausalLM", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]),
        ("Qwen2MoeForCausalLM", ["mlp.shared_expert_gate"]),
    ],
)
def test_what_a_gguf_adapter_cannot_express_goes_into_the_weights(
    tmp_path: Path, converted: Converter, name: str, modules: list[str]
) -> None:
    folder, gguf = converted_model(tmp_path, name, converted)
    shapes = {
        target.removesuffix(".weight"): tensor.shape
        for target, tensor in read_base(folder).tensors.items()
        if target.removesuffix(".weight").endswith(tuple(modules))
    }
    assert len(shapes) == 2 * len(modules)
    adapter = Adapter({target: low_rank(*shape) for target, shape in shapes.items()})
    merge_into_base([(adapter, 1.0)], gguf, tmp_path / "out.gguf")
    expected = tensors_of(converted(merged(folder, adapter, tmp_path / "merged"), tmp_path / "merged.gguf"))
    for tensor, array in tensors_of(tmp_path / "out.gguf").items():
        np.testing.assert_allclose(array, expected[tensor], rtol=0, atol=2e-6, err_msg=tensor)


def low_rank(m: int = 64, n: int = 64, r: int = 4, scale: float = 0.1, **fields: Any) -> LowRank:
    lora_A, lora_B = RNG.normal(size=(r, n)), scale * RNG.normal(size=(m, r))
    return LowRank(lora_A.astype(np.float32), lora_B.astype(np.float32), **{"alpha": 4.0, **fields})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random Llama and its GGUF in float32."""
    for module in ("torch", "transformers"):
        need_module(module)
    model = tiny.model()
    return model, tiny.write_gguf(model, tmp_path_factory.mktemp("llama") / "base.gguf")


def stored_as(gguf: Path, path: Path, form: str, *, only: str = "", **metadata: MetadataValue) -> Path:
    """The same model with its matrices in another type."""
    with GGUFFile(gguf) as file:
        stored_metadata = {key: MetadataValue(file.header.kinds[key], value) for key, value in file.header.metadata.items()}
        tensors: dict[str, Any] = {}
        for name, info in file.tensors.items():
            array = file.tensor(name)
            if array.ndim < 2 or only not in name:
                tensors[name] = array
            elif form in ("F16", "BF16", "F32"):
                tensors[name] = array.astype(dtypes.NUMPY[form])
            else:
                blocks = np.empty((len(array), Blocks(form).row_size(info.shape[-1])), np.uint8)
                Blocks(form).encode(array, blocks)
                tensors[name] = QuantizedTensor(form, info.shape, blocks)
    gguf_output.write(path, stored_metadata | {key.replace("__", "."): value for key, value in metadata.items()}, tensors)
    return path


def adapter_on(gguf: Path, scale: float = 0.1) -> Adapter:
    base = read_base(gguf)
    shapes = {name.removesuffix(".weight"): tensor.shape for name, tensor in base.tensors.items() if len(tensor.shape) == 2}
    return Adapter({name: low_rank(*shape, scale=scale) for name, shape in shapes.items() if "embed" not in name})


@pytest.mark.peer
@pytest.mark.parametrize("form", ["F32", "F16", "BF16", "Q8_0"])
def test_llama_cpp_computes_base_plus_adapter_with_the_result(tmp_path: Path, llama: Any, form: str) -> None:
    need_module("llama_cpp_py_sync")
    gguf = stored_as(llama[1], tmp_path / "base.gguf", form)
    adapter = adapter_on(gguf)
    gguf_lora.write(adapter, tmp_path / "a.gguf", base=read_base(gguf))
    merge_into_base([(adapter, 1.0)], gguf, tmp_path / "out.gguf")
    expected = llama_cpp.logits(llama[1], TOKENS, tmp_path / "a.gguf")
    our_logits = llama_cpp.logits(tmp_path / "out.gguf", TOKENS)
    effect = np.linalg.norm(expected - llama_cpp.logits(llama[1], TOKENS))
    assert effect > 1
    # What the type itself costs: the base in it against the base in float32, both under the adapter.
    cost = np.linalg.norm(expected - llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf"))
    assert np.linalg.norm(our_logits - expected) < 1e-3 * effect + 4 * cost


@pytest.mark.peer
@pytest.mark.parametrize("form", ["F16", "BF16"])
def test_a_sum_is_rounded_once(tmp_path: Path, llama: Any, form: str) -> None:
    gguf = stored_as(llama[1], tmp_path / "base.gguf", form)
    deltas = [Adapter({"lm_head": low_rank(128)}), Adapter({"lm_head": low_rank(128)})]
    merge_into_base([(delta_adapter, 0.5) for delta_adapter in deltas], gguf, tmp_path / "out.gguf")
    wide = tensors_of(gguf)["output.weight"].astype(np.float32)
    for delta_adapter in deltas:
        delta = delta_adapter.deltas["lm_head"]
        wide += np.float32(0.5 * delta.scaling) * (delta.lora_B @ delta.lora_A)
    summed = tensors_of(tmp_path / "out.gguf")["output.weight"]
    assert summed.dtype == dtypes.NUMPY[form]
    np.testing.assert_allclose(summed.astype(np.float32), wide, rtol=2.0 ** (-11 if form == "F16" else -8), atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("name", QUANTIZERS)
def test_blocks_are_those_of_ggml_s_own_quantizers(name: str) -> None:
    need_module("gguf")
    need_module("llama_cpp_py_sync")
    import llama_cpp_py_sync

    ggml = ctypes.CDLL(str(Path(llama_cpp_py_sync.__file__).parent / "libggml-base.so.0"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows = RNG.normal(size=(64, 256)).astype(np.float32) * np.exp(RNG.normal(size=(64, 1))).astype(np.float32)
    rows[0], rows[1, ::2], rows[2] = 0, 0, 1e-7
    their_blocks, our_blocks = (np.zeros((64, Blocks(name).row_size(256)), np.uint8) for _ in range(2))
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, their_blocks))
    size = ggml.ggml_quantize_chunk(gguf_types.TYPES[name][0], *pointers, *(ctypes.c_int64(n) for n in (0, 64, 256)), None)
    Blocks(name).encode(rows, our_blocks)
    assert size == their_blocks.nbytes
    assert our_blocks.tobytes() == their_blocks.tobytes()
    values = np.empty_like(rows)
    Blocks(name).decode(our_blocks, values)
    assert np.abs(values - rows).max() < np.abs(rows).max() / 7


@pytest.mark.peer
def test_metadata_order_alignment_and_untouched_bytes_stay(tmp_path: Path, llama: Any) -> None:
    extra = {
        "a__floats": MetadataValue("[FLOAT32]", np.ones(3, np.float32)),
        "a__texts": strings_value(["x", "", "ü"]),
        "a__flag": MetadataValue("BOOL", True),
        "a__big": MetadataValue("UINT64", 2**63),
        "general__file_type": u32_value(7),
    }
    gguf = stored_as(llama[1], tmp_path / "base.gguf", "Q8_0", only="ffn", **extra)
    report = merge_into_base([(Adapter({Q: low_rank()}), 1.0)], gguf, tmp_path / "out.gguf")
    with GGUFFile(gguf) as before, GGUFFile(tmp_path / "out.gguf") as after:
        assert list(after.header.metadata) == list(before.header.metadata)
        assert after.header.kinds == before.header.kinds
        assert [str(value) for value in after.header.metadata.values()] == [str(v) for v in before.header.metadata.values()]
        assert list(after.tensors) == list(before.tensors)
        changed = [name for name in after.tensors if after.raw(name).tobytes() != before.raw(name).tobytes()]
    assert changed == ["blk.0.attn_q.weight"] == list(report.touched)
    assert gguf.stat().st_size == (tmp_path / "out.gguf").stat().st_size


@pytest.mark.peer
def test_other_alignments_stay(tmp_path: Path, llama: Any) -> None:
    with GGUFFile(llama[1]) as file:
        new_metadata = {key: MetadataValue(file.header.kinds[key], value) for key, value in file.header.metadata.items()}
        new_metadata["general.alignment"] = u32_value(128)
        order = [(name, info.type_name, info.shape) for name, info in file.tensors.items()]
        head = gguf_output.header_bytes(new_metadata, order, 128)
        data = [file.raw(name).tobytes() for name in file.tensors]
    (tmp_path / "base.gguf").write_bytes(head + b"".join(raw + bytes(-len(raw) % 128) for raw in data))
    merge_into_base([(Adapter({Q: low_rank()}), 1.0)], tmp_path / "base.gguf", tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as after:
        assert after.header.alignment == 128
        assert [name for name, raw in zip(after.tensors, data, strict=True) if after.raw(name).tobytes() != raw] == [
            "blk.0.attn_q.weight"
        ]


@pytest.mark.peer
def test_split_models_in_and_out(tmp_path: Path, llama: Any) -> None:
    need_module("llama_cpp_py_sync")
    adapter = adapter_on(llama[1])
    merge_into_base([(adapter, 1.0)], llama[1], tmp_path / "one.gguf")
    merge_into_base([(adapter, 1.0)], llama[1], tmp_path / "parts", options=Options(shard_size=60_000))
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    assert parts[0].name == f"parts-00001-of-{len(parts):05}.gguf"
    assert llama_cpp.logits(parts[0], TOKENS).tobytes() == llama_cpp.logits(tmp_path / "one.gguf", TOKENS).tobytes()
    tiny_change = Adapter({Q: low_rank(scale=1e-3)})
    merge_into_base([(tiny_change, 1.0)], parts[0], tmp_path / "again.gguf")
    merge_into_base([(tiny_change, 1.0)], tmp_path / "one.gguf", tmp_path / "wanted.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "wanted.gguf").read_bytes()


@pytest.mark.peer
def test_a_table_that_is_the_output_layer_becomes_two(tmp_path: Path) -> None:
    import torch

    need_module("llama_cpp_py_sync")
    model = tiny.model(tie_word_embeddings=True)
    gguf = tiny.write_gguf(model, tmp_path / "base.gguf")
    wrapped = tiny.adapter(model, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    from adapterhub_converters.formats import peft

    report = merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], gguf, tmp_path / "out.gguf")
    assert any("are now two" in note for note in report.notes)
    with torch.no_grad():
        expected = wrapped(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(llama_cpp.logits(tmp_path / "out.gguf", TOKENS) - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.peer
def test_dora_bias_rows_and_replaced_modules_as_peft_has_them(tmp_path: Path) -> None:
    import torch

    need_module("llama_cpp_py_sync")
    from adapterhub_converters.formats import peft

    model = tiny.model("Qwen2ForCausalLM")
    gguf = tiny.write_gguf(model, tmp_path / "base.gguf")
    wrapped = tiny.adapter(
        model, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "up_proj"], use_dora=True,
        modules_to_save=["lm_head", "norm"], trainable_token_indices={"embed_tokens": [3, 99]},
    )  # fmt: skip
    report = merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], gguf, tmp_path / "out.gguf")
    assert "output_norm.weight" in report.touched
    with torch.no_grad():
        expected = wrapped(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(llama_cpp.logits(tmp_path / "out.gguf", TOKENS) - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("shape", [(), (0,), (0, 8), (8, 0), (2, 0, 8), (2**40, 0)])
def test_tensors_of_odd_shapes_are_no_bug(tmp_path: Path, shape: tuple[int, ...]) -> None:
    metadata = {
        "general.architecture": string_value("llama"),
        "llama.attention.head_count": u32_value(2),
        "llama.block_count": u32_value(1),
    }
    tensors = {"blk.0.attn_q.weight": np.ones((64, 64), np.float32), "blk.0.attn_k.weight": np.ones(shape, np.float32)}
    gguf_output.write(tmp_path / "base.gguf", metadata, tensors)
    merge_into_base(
        [(Adapter({Q: low_rank()}), 1.0)], tmp_path / "base.gguf", tmp_path / "out.gguf", options=Options(requantize="q8_0")
    )
    with pytest.raises(AdapterhubError) as caught:
        prepare_merge([(Adapter({K: low_rank()}), 1.0)], tmp_path / "base.gguf")
    assert caught.value.exit_code == 6
