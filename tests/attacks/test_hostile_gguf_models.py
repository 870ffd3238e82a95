"""A GGUF model whose metadata is missing, zero, of another kind or beyond its tensors: one error, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.generation import llama_cpp
from adapterhub_converters.containers import gguf_output
from adapterhub_converters.containers.gguf_types import (
    MetadataValue,
    bool_value,
    f32_value,
    string_value,
    strings_value,
    u32_value,
)
from adapterhub_converters.errors import AdapterhubError, FormatError
from adapterhub_converters.formats.gguf_model import to_folder
from tests.attacks.test_hostile_servers import one_line
from tests.conftest import Run, need_module
from tests.support import tiny

GOOD: dict[str, MetadataValue] = {
    "general.architecture": string_value("llama"),
    "general.type": string_value("model"),
    "llama.attention.head_count": u32_value(2),
    "llama.attention.head_count_kv": u32_value(2),
    "llama.attention.key_length": u32_value(8),
    "llama.attention.layer_norm_rms_epsilon": f32_value(1e-5),
    "llama.block_count": u32_value(1),
    "llama.context_length": u32_value(64),
    "llama.embedding_length": u32_value(16),
    "llama.expert_count": u32_value(0),
    "llama.feed_forward_length": u32_value(32),
    "llama.rope.freq_base": f32_value(10000.0),
    "llama.rope.dimension_count": u32_value(8),
    "tokenizer.ggml.model": string_value("gpt2"),
    "tokenizer.ggml.pre": string_value("gpt-2"),
    "tokenizer.ggml.tokens": strings_value(["<s>", "a", "b", "ab"]),
    "tokenizer.ggml.token_type": MetadataValue("[INT32]", [3, 1, 1, 1]),
    "tokenizer.ggml.merges": strings_value(["a b"]),
    "tokenizer.ggml.bos_token_id": u32_value(0),
    "tokenizer.ggml.eos_token_id": u32_value(0),
    "tokenizer.ggml.unknown_token_id": u32_value(0),
    "tokenizer.ggml.add_bos_token": bool_value(True),
    "tokenizer.chat_template": string_value("{{ messages }}"),
}
OTHERS: dict[str, MetadataValue | None] = {
    "missing": None,
    "0": u32_value(0),
    "huge": u32_value(2**32 - 1),
    "negative": MetadataValue("INT32", -1),
    "NaN": f32_value(float("nan")),
    "a text": string_value("\x1b[31mx"),
    "no text": string_value(""),
    "a boolean": bool_value(True),
    "numbers": MetadataValue("[UINT32]", [1, 2]),
    "nothing": MetadataValue("[UINT32]", []),
    "floats": MetadataValue("[FLOAT32]", [0.5]),
    "texts": strings_value(["a", "a", "b c d", ""]),
}
TENSORS = {
    "token_embd.weight": (4, 16),
    "output_norm.weight": (16,),
    "blk.0.attn_q.weight": (16, 16),
    "blk.0.attn_k.weight": (16, 16),
}


def written(path: Path, metadata: dict[str, MetadataValue], tensors: dict[str, tuple[int, ...]] = TENSORS) -> Path:
    gguf_output.write(path, metadata, {name: np.ones(shape, np.float32) for name, shape in tensors.items()})
    return path


@pytest.mark.parametrize("key", GOOD)
def test_a_key_of_any_other_kind_is_taken_or_refused(tmp_path: Path, key: str) -> None:
    to_folder.to_hf(written(tmp_path / "good.gguf", GOOD), tmp_path / "good")
    for name, value in OTHERS.items():
        changed: dict[str, Any] = {**GOOD, key: value}
        path = written(tmp_path / "m.gguf", {key: value for key, value in changed.items() if value is not None})
        out = tmp_path / name.replace(" ", "-")
        try:
            to_folder.to_hf(path, out)
        except AdapterhubError:
            assert not out.exists()


@pytest.mark.parametrize("shape", [(), (0, 16), (4,), (16, 16, 4), (1, 1)])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_any_other_shape_is_taken_or_refused(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = {other_name: old for other_name, old in TENSORS.items() if other_name != name} | ({name: shape} if shape else {})
    path = written(tmp_path / "m.gguf", GOOD, tensors)
    try:
        to_folder.to_hf(path, tmp_path / "out")
    except AdapterhubError:
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["llama.attention.head_count", "llama.embedding_length", "tokenizer.ggml.bos_token_id"])
def test_a_number_that_cannot_be_is_one_line(run: Run, tmp_path: Path, key: str) -> None:
    written(tmp_path / "m.gguf", {**GOOD, key: u32_value(0 if key.startswith("llama") else 4)})
    one_line(run("convert", "m.gguf", "out", "--to", "hf", code=6), key)


@pytest.fixture
def aborting(tmp_path: Path) -> Path:
    """A model whose number of experts fails an assertion of llama.cpp, which ends the process."""
    need_module("llama_cpp_py_sync")
    metadata = {**GOOD, "llama.expert_count": u32_value(9999)}
    gguf_output.write(tmp_path / "aborting.gguf", metadata, {"token_embd.weight": np.zeros((4, 16), np.float32)})
    return tmp_path / "aborting.gguf"


@pytest.mark.parametrize("command", ["run", "chat", "serve"])
def test_a_model_that_makes_llama_cpp_abort_ends_no_command(run: Run, aborting: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "bin").mkdir()
    options: dict[str, list[object]] = {
        "run": ["hello"],
        "chat": ["--engine", "llama.cpp"],
        "serve": ["--engine", "llama.cpp", "--port", 0],
    }
    result = run(command, aborting, *options[command], code=4, env={"PATH": str(tmp_path / "bin"), "LLAMA_SERVER": ""})
    assert "aborting.gguf: llama.cpp ends by SIGABRT when it loads it (" in result.stderr
    assert "GGML_ASSERT(hparams.n_expert <= LLAMA_MAX_EXPERTS) failed" in result.stderr


def test_an_adapter_that_makes_llama_cpp_abort_ends_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No adapter is known that aborts: the trial of this one does."""
    need_module("llama_cpp_py_sync")
    base = tiny.write_gguf(tiny.model(), tmp_path / "base.gguf")
    with llama_cpp.open_engine(None, base, location="base") as engine:
        trial = tmp_path / "trial.py"
        trial.write_text(
            "import os, sys\nassert len(sys.argv) == 3\nprint('GGML_ASSERT(x) failed')\nsys.stdout.flush()\nos.abort()"
        )
        monkeypatch.setattr(llama_cpp, "_TRIAL", trial)
        with pytest.raises(FormatError, match=r"^sql: llama.cpp ends by SIGABRT when it loads it \(GGML_ASSERT\(x\) failed\)"):
            engine.load_adapter(base, "sql")
