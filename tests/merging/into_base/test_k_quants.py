"""K-quants: the bytes of ggml's own quantizers, in a merge too, whose result llama.cpp runs."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub.merging.into_base.k_quants import K_QUANTS, WEIGHTED, quantize, quantize_weighted
from adapterhub.merging.into_base.tensor_types import Blocks
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import gguf_types
from adapterhub_converters.containers.gguf_file import GGUFFile
from tests.conftest import need_module
from tests.support import llama_cpp, tiny

RNG = np.random.default_rng(0)
ROWS = {
    "normal": RNG.normal(size=(40, 2048)),
    "tiny": RNG.normal(size=(4, 256)) * 1e-12,
    "large": RNG.normal(size=(4, 256)) * 3e4,
    "outliers": RNG.standard_cauchy(size=(16, 512)),
    "mostly zeros": RNG.normal(size=(8, 512)) * (RNG.random((8, 512)) < 0.05),
    "half zeros": np.concatenate([np.zeros((4, 128)), RNG.normal(size=(4, 128))], axis=1),
    "zeros": np.zeros((2, 256)),
    "one number": np.full((2, 256), 0.3),
    "above zero": np.abs(RNG.normal(size=(8, 256))),
    "below zero": -np.abs(RNG.normal(size=(8, 256))),
    "integers": RNG.integers(-3, 4, (8, 256)),
}


def by_ggml(rows: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    import llama_cpp_py_sync

    ggml = ctypes.CDLL(str(Path(llama_cpp_py_sync.__file__).parent / "libggml-base.so.0"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    blocks = np.zeros((len(rows), Blocks(name).row_size(rows.shape[1])), np.uint8)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, blocks))
    weights = None if importance is None else importance.ctypes.data_as(ctypes.c_void_p)
    sizes = (ctypes.c_int64(n) for n in (0, *rows.shape))
    assert ggml.ggml_quantize_chunk(gguf_types.TYPES[name][0], *pointers, *sizes, weights) == blocks.nbytes
    return blocks


@pytest.mark.peer
@pytest.mark.parametrize("name", K_QUANTS)
def test_the_bytes_are_ggmls(name: str) -> None:
    need_module("llama_cpp_py_sync")
    for label, rows in ROWS.items():
        wide = np.ascontiguousarray(rows, np.float32)
        assert quantize(wide, name).tobytes() == by_ggml(wide, name).tobytes(), label


IMPORTANCE = {
    "squares": lambda n: RNG.normal(size=n) ** 2,
    "far apart": lambda n: 10.0 ** RNG.uniform(-6, 4, n),
    "some zero": lambda n: RNG.random(n) * (RNG.random(n) < 0.5),
    "ones": np.ones,
}


@pytest.mark.peer
@pytest.mark.parametrize("name", WEIGHTED)
def test_the_bytes_by_an_importance_matrix_are_ggmls(name: str) -> None:
    need_module("llama_cpp_py_sync")
    for label, rows in ROWS.items():
        wide = np.ascontiguousarray(rows[:16], np.float32)
        for importance_kind, make_importance in IMPORTANCE.items():
            importance = np.ascontiguousarray(make_importance(wide.shape[1]), np.float32)
            expected = by_ggml(wide, name, importance).tobytes()
            assert quantize_weighted(wide, name, importance).tobytes() == expected, (label, importance_kind)


@pytest.mark.parametrize(("name", "tolerance"), zip(K_QUANTS, (0.09, 0.045, 0.025), strict=True))
def test_what_is_read_is_close_to_what_was_written(name: str, tolerance: float) -> None:
    need_module("gguf")
    wide = np.ascontiguousarray(ROWS["normal"], np.float32)
    raw, decoded = quantize(wide, name), np.empty_like(wide)
    Blocks(name).decode(raw, decoded)
    assert np.linalg.norm(decoded - wide) < tolerance * np.linalg.norm(wide)
    assert quantize(wide[:1], name).tobytes() == raw[:1].tobytes()  # a row does not depend on the others


@pytest.mark.peer
def test_a_merge_writes_them_and_a_mixture_stays_one(tmp_path: Path) -> None:
    for module in ("torch", "transformers", "llama_cpp_py_sync"):
        need_module(module)
    model = tiny.model(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    base = tiny.write_gguf(model, tmp_path / "base.gguf")
    pair = LowRank(RNG.normal(size=(4, 256)).astype(np.float32), RNG.normal(size=(256, 4)).astype(np.float32), 0.4)
    adapter = [(Adapter({"model.layers.0.mlp.up_proj": pair}), 1.0)]
    merge_into_base(adapter, base, tmp_path / "wide.gguf")
    merge_into_base(adapter, base, tmp_path / "q4.gguf", options=Options(requantize="q4_k"))
    with GGUFFile(tmp_path / "q4.gguf") as file, GGUFFile(tmp_path / "wide.gguf") as wide:
        assert {info.type_name for info in file.tensors.values()} == {"Q4_K", "F32"}
        assert file.header.metadata["general.file_type"] == 14
        for name in ("blk.0.ffn_up.weight", "output.weight"):
            assert file.raw(name).tobytes() == by_ggml(wide.tensor(name), "Q4_K").tobytes()
    merge_into_base(adapter, tmp_path / "q4.gguf", tmp_path / "again.gguf", options=Options(force=True))
    with GGUFFile(tmp_path / "again.gguf") as file:
        assert file.tensors["blk.0.ffn_up.weight"].type_name == "Q4_K"
    tokens = [3, 17, 99, 5]
    expected, quantized = (llama_cpp.logits(tmp_path / name, tokens) for name in ("wide.gguf", "q4.gguf"))
    assert np.linalg.norm(quantized - expected) < 0.5 * np.linalg.norm(expected)
