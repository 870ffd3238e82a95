"""The types in which tensors are written are those that were asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub.merging.into_base.tensor_types import kind
from adapterhub_converters.containers.gguf_file import GGUFFile
from tests.conftest import need_module
from tests.converters.test_architecture_lookup import TOKENS
from tests.merging.into_base.test_write_gguf import adapter_on
from tests.support import llama_cpp, tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random Llama and its GGUF in float32."""
    for module in ("torch", "transformers"):
        need_module(module)
    model = tiny.model()
    return model, tiny.write_gguf(model, tmp_path_factory.mktemp("llama") / "base.gguf")


@pytest.mark.peer
@pytest.mark.parametrize(
    ("options", "kinds", "file_type"),
    [
        (Options(dtype="f16"), {"F16", "F32"}, 1),
        (Options(requantize="q8_0"), {"Q8_0", "F32"}, 7),
        (Options(requantize="q4_0"), {"Q4_0", "F32"}, 2),
        (Options(requantize="q4_k"), {"Q5_0", "F32"}, 8),  # rows of 64 and 96, of which llama-quantize makes Q5_0
    ],
)
def test_floats_become_what_is_asked_for(tmp_path: Path, llama: Any, options: Options, kinds: set[str], file_type: int) -> None:
    need_module("llama_cpp_py_sync")
    adapter = adapter_on(llama[1])
    merge_into_base([(adapter, 1.0)], llama[1], tmp_path / "out.gguf", options=options)
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert {info.type_name for info in file.tensors.values()} == kinds
        assert file.header.metadata["general.file_type"] == file_type
    merge_into_base([(adapter, 1.0)], llama[1], tmp_path / "exact.gguf")
    with GGUFFile(tmp_path / "exact.gguf") as exact, GGUFFile(tmp_path / "out.gguf") as out:
        for name, info in out.tensors.items():
            form, wide = kind(info.type_name), exact.tensor(name).reshape(-1, info.shape[-1])
            expected = np.empty((len(wide), form.row_size(wide.shape[1])), np.uint8)
            form.encode(wide, expected)
            assert out.raw(name).tobytes() == expected.tobytes(), name
    assert np.isfinite(llama_cpp.logits(tmp_path / "out.gguf", TOKENS)).all()
