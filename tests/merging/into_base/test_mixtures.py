"""Mixtures and importance matrices: the bytes of llama.cpp's own `llama_model_quantize` of its conversion.

tests/peers/test_mixtures.py has every mixture of every model.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub.operations import base_models
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import FILE_TYPES, MetadataValue, strings_value, u32_value
from adapterhub_converters.errors import RefusedError
from tests.conftest import Run, need_module
from tests.merging.into_base.gguf_folders import contents, written
from tests.support import tiny

RNG = np.random.default_rng(3)
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**WIDE, "num_hidden_layers": 16}),
    "tied": (
        "Qwen2ForCausalLM",
        {**WIDE, "num_hidden_layers": 9, "tie_word_embeddings": True, "intermediate_size": 256},
    ),
    "experts": ("MixtralForCausalLM", {**WIDE, "num_local_experts": 8, "intermediate_size": 256}),
    "fewer experts": ("Qwen3MoeForCausalLM", {**WIDE, "moe_intermediate_size": 256, "num_hidden_layers": 3}),
    "narrow rows": ("LlamaForCausalLM", {"hidden_size": 96, "head_dim": 24, "intermediate_size": 352}),
    "one matrix of q, k and v": ("Phi3ForCausalLM", {**WIDE, "num_hidden_layers": 5}),
    "falcon": ("FalconForCausalLM", {"hidden_size": 256, "num_hidden_layers": 17}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of a model in bfloat16, and its conversion to a GGUF in that type, by name."""
    for module in ("torch", "transformers", "llama_cpp_py_sync"):
        need_module(module)
    import torch

    folders_by_name: dict[str, tuple[Path, Path]] = {}

    def model(name: str) -> tuple[Path, Path]:
        if name not in folders_by_name:
            cls, config = MODELS[name]
            folder = tmp_path_factory.mktemp("model") / "hf"
            tiny.model(cls, **config).to(torch.bfloat16).save_pretrained(folder)
            folders_by_name[name] = folder, written(folder, folder.with_suffix(".gguf"))
        return folders_by_name[name]

    return model


def by_llama_cpp(source: Path, target: Path, mixture: str, importance: Mapping[str, np.ndarray] | None = None) -> Path:
    """llama-quantize's result, without its keys for the importance matrix."""
    bindings: Any = importlib.import_module("llama_cpp_py_sync._cffi_bindings")
    ffi, lib = bindings.get_ffi(), bindings.get_lib()
    settings = lib.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = 1, FILE_TYPES[mixture]
    names_and_arrays = [
        (ffi.new("char[]", name.encode()), ffi.from_buffer("float[]", array)) for name, array in (importance or {}).items()
    ]
    if importance:
        sizes = [array.size for array in importance.values()]
        entries = [[name, data, size] for (name, data), size in zip(names_and_arrays, sizes, strict=True)]
        matrix_data = ffi.new("struct llama_model_imatrix_data[]", [*entries, [ffi.NULL, ffi.NULL, 0]])
        settings.imatrix = matrix_data
    options = ffi.new("llama_model_quantize_params *", settings)
    assert lib.llama_model_quantize(str(source).encode(), str(target).encode(), options) == 0
    return target


def assert_same(ours: Path, theirs: Path) -> None:
    (keys, tensors), (wanted_keys, wanted_tensors) = contents(ours), contents(theirs)
    assert {key: value for key, value in keys.items() if not key.startswith("quantize.")} == wanted_keys
    assert {name: tensor[:2] for name, tensor in tensors.items()} == {
        name: tensor[:2] for name, tensor in wanted_tensors.items()
    }
    assert [name for name in tensors if tensors[name][2] != wanted_tensors[name][2]] == []


@pytest.mark.peer
@pytest.mark.parametrize(("name", "mixture"), [("tied", "q4_k_m"), ("fewer experts", "q4_k_s"), ("narrow rows", "q5_k_m")])
def test_a_mixture_is_llama_quantize_s(tmp_path: Path, folders: Any, name: str, mixture: Any) -> None:
    folder, gguf = folders(name)
    base_models.convert_model(folder, tmp_path / "ours.gguf", to="gguf", dtype=mixture)
    assert_same(tmp_path / "ours.gguf", by_llama_cpp(gguf, tmp_path / "theirs.gguf", mixture))


def importance_of(gguf: Path) -> dict[str, np.ndarray]:
    """Sums of squares for every matrix but the embeddings."""
    with GGUFFile(gguf) as file:
        matrices = {name: info.shape for name, info in file.tensors.items() if len(info.shape) > 1}
    return {
        name: (RNG.normal(size=(shape[0] if len(shape) > 2 else 1, shape[-1])) ** 2 * 40).astype(np.float32)
        for name, shape in matrices.items()
        if name != "token_embd.weight"
    }


def write_importance(path: Path, sums: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray]) -> Path:
    metadata = {
        "general.type": gguf_types.string_value("imatrix"),
        "imatrix.datasets": strings_value(["calibration.txt"]),
        "imatrix.chunk_count": u32_value(40),
        "imatrix.chunk_size": u32_value(512),
    }
    tensors = {f"{name}.in_sum2": array for name, array in sums.items()}
    tensors |= {f"{name}.counts": array for name, array in counts.items()}
    gguf_output.write(path, metadata, tensors)
    return path


def older(path: Path, sums: Mapping[str, np.ndarray], calls: int) -> Path:
    raw = struct.pack("<i", len(sums))
    for name, array in sums.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, array.size) + array.tobytes()
    text = b"calibration.txt"
    path.write_bytes(raw + struct.pack("<ii", 40, len(text)) + text)
    return path


@pytest.mark.peer
@pytest.mark.parametrize(("name", "new"), [("fewer experts", True), ("narrow rows", False)])
def test_a_mixture_by_an_importance_matrix_is_llama_quantize_s(tmp_path: Path, folders: Any, name: str, new: bool) -> None:
    folder, gguf = folders(name)
    sums = importance_of(gguf)
    counts = {key: np.full((len(array), 1), 40, np.float32) for key, array in sums.items()}
    if new:
        next(iter(counts.values()))[0] = 0  # an expert that was never used counts evenly
        path = write_importance(tmp_path / "imatrix.gguf", sums, counts)
    else:
        path = older(tmp_path / "imatrix.dat", sums, 40)
    values = {
        key: np.where(counts[key] > 0, array / np.maximum(counts[key], 1), np.float32(1)).astype(np.float32).reshape(-1)
        for key, array in sums.items()
    }
    base_models.convert_model(folder, tmp_path / "ours.gguf", to="gguf", dtype="q4_k_m", imatrix=path)
    assert_same(tmp_path / "ours.gguf", by_llama_cpp(gguf, tmp_path / "theirs.gguf", "q4_k_m", values))
    keys = contents(tmp_path / "ours.gguf")[0]
    assert {key.removeprefix("quantize.imatrix."): value[1] for key, value in keys.items() if key.startswith("quantize.")} == {
        "file": path.name, "dataset": "calibration.txt", "entries_count": len(sums), "chunks_count": 40,
    }  # fmt: skip


def test_a_merge_into_a_folder_is_written_as_a_mixture_at_once(tmp_path: Path, folders: Any) -> None:
    folder, gguf = folders("narrow rows")
    pair = LowRank(RNG.normal(size=(4, 96)).astype(np.float32), RNG.normal(size=(352, 4)).astype(np.float32), 0.4)
    adapter = [(Adapter({"model.layers.0.mlp.up_proj": pair}), 1.0)]
    merge_into_base(adapter, folder, tmp_path / "wide.gguf", options=Options(dtype="f32"))
    merge_into_base(adapter, folder, tmp_path / "ours.gguf", options=Options(requantize="q4_k_m", force=True))
    ours = contents(tmp_path / "ours.gguf")[1]
    expected = contents(by_llama_cpp(tmp_path / "wide.gguf", tmp_path / "theirs.gguf", "q4_k_m"))[1]
    assert ours == expected
    with pytest.raises(RefusedError, match="q4_k_m: is a mixture, which is made of a Hugging.* Choose one type, such as q4_k"):
        merge_into_base(adapter, gguf, tmp_path / "other.gguf", options=Options(requantize="q4_k_m"))


def test_types_of_whole_models_are_not_those_of_adapters(tmp_path: Path, run: Run) -> None:
    from tests.support.folders import adapter, pairs

    adapter(tmp_path / "sql", pairs(2))
    assert "is for whole models" in run("convert", "sql", "a.gguf", "--dtype", "q4_k_m", code=2).stderr
    assert "is for whole models" in run("convert", "sql", "a.gguf", "--imatrix", "x", code=2).stderr


def test_a_matrix_of_another_model_or_for_nothing_is_refused(tmp_path: Path, folders: Any, run: Run) -> None:
    folder, _ = folders("narrow rows")
    count = {"blk.0.ffn_up.weight": np.ones((1, 1), np.float32)}
    other_matrix = write_importance(tmp_path / "other.gguf", {"blk.0.ffn_up.weight": np.ones((1, 8), np.float32)}, count)
    ours = write_importance(tmp_path / "ours.gguf", {"blk.0.ffn_up.weight": np.ones((1, 96), np.float32)}, count)
    command = ("convert", folder, "x.gguf", "--imatrix")
    stderr = run(*command, other_matrix, "--dtype", "q4_k", code=6).stderr
    assert "8 numbers for blk.0.ffn_up.weight, which has 96 columns. Is this the matrix of another model?" in stderr
    assert "an importance matrix of no tensor that is quantized" in run(*command, ours, "--dtype", "f16", code=6).stderr
    assert "is for a quantized GGUF" in run("convert", folder, "x", "--to", "hf", "--imatrix", ours, code=2).stderr
    assert not (tmp_path / "x.gguf").exists()
    result = run(*command, ours, "--dtype", "q4_k_m")
    assert "11 tensors are not in the importance matrix" in result.stdout + result.stderr
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert MetadataValue("UINT32", file.header.metadata["general.file_type"]).value == 15
