"""From any format to any other: recognized by name, whole or not at all, and without loss on the way back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, Loss, LowRank
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import gguf_file
from adapterhub_converters.errors import (
    AdapterhubError,
    FormatError,
    LocalIOError,
    NotFoundError,
    OutputExistsError,
    RefusedError,
    UsageError,
)
from adapterhub_converters.formats import convert, peft
from tests.conftest import ROOT

CONFIG = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
BASE = BaseSpec("base", "hf", "LlamaForCausalLM", "llama", CONFIG, tied=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A PEFT folder with q, k and up in two layers, rsLoRA."""
    rng = np.random.default_rng(0)
    shapes = {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "mlp.up_proj": 48}
    deltas = {
        f"model.layers.{layer}.{path}": LowRank(
            rng.normal(size=(4, 32)).astype(np.float16), rng.normal(size=(rows, 4)).astype(np.float16), 8.0, True
        )
        for layer in (0, 1)
        for path, rows in shapes.items()
    }
    folder = tmp_path / "source"
    folder.mkdir()
    peft.write(Adapter(deltas), folder)
    return folder


def name_of(kind: str) -> str:
    return f"{kind}.gguf" if kind == "gguf" else kind


@pytest.mark.parametrize(
    "path", [["gguf"], ["mlx"], ["gguf", "mlx"], ["mlx", "gguf"], ["peft"], ["gguf", "gguf", "mlx", "mlx"]]
)
def test_there_and_back_again_is_the_same_bytes(tmp_path: Path, source: Path, path: list[str]) -> None:
    current = source
    for n, kind in enumerate([*path, "peft"]):
        target = tmp_path / str(n) / name_of(kind)
        report = convert.convert(current, target, to=kind, base=BASE)
        assert report.worst == Loss.EXACT
        assert len(report.losses) == 12
        assert convert.sniff(target) == kind
        current = target
    assert {file.name: file.read_bytes() for file in current.iterdir()} == {
        file.name: file.read_bytes() for file in source.iterdir()
    }


def test_the_way_back_needs_no_base(tmp_path: Path, source: Path) -> None:
    convert.convert(source, tmp_path / "a.gguf", to="gguf", base=BASE)
    convert.convert(tmp_path / "a.gguf", tmp_path / "b", to="peft")
    assert (tmp_path / "b" / peft.WEIGHTS).read_bytes() == (source / peft.WEIGHTS).read_bytes()


def test_a_manifest_next_to_the_source_is_base_enough(tmp_path: Path, source: Path) -> None:
    with pytest.raises(RefusedError, match="Name its base model"):
        convert.convert(source, tmp_path / "a.gguf", to="gguf")
    base = {"architecture": "LlamaForCausalLM", "model_type": "llama", "config": CONFIG, "repo": "a/b"}
    (source / "adapter.json").write_text(json.dumps({"schema_version": 1, "base": base}))
    convert.convert(source, tmp_path / "a.gguf", to="gguf")
    convert.convert(source, tmp_path / "b.gguf", to="gguf", base=BASE)
    with gguf_file.GGUFFile(tmp_path / "a.gguf") as first_file, gguf_file.GGUFFile(tmp_path / "b.gguf") as second_file:
        assert first_file.header.metadata["general.base_model.0.repo_url"] == "https://huggingface.co/a/b"
        for name in first_file.tensors:
            assert np.array_equal(first_file.raw(name), second_file.raw(name))


def test_nothing_that_exists_is_overwritten(tmp_path: Path, source: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "a.gguf").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, to in (
        ("full", "mlx"),
        ("a.gguf", "gguf"),
        ("a.gguf", "mlx"),
        ("full", "gguf"),
        ("link", "gguf"),
        ("link", "mlx"),
    ):
        with pytest.raises(OutputExistsError, match="already exists"):
            convert.convert(source, tmp_path / name, to=to, base=BASE)
    assert (tmp_path / "a.gguf").read_text() == (tmp_path / "full" / "x").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert.convert(source, tmp_path / "empty", to="mlx")
    assert sorted(file.name for file in (tmp_path / "empty").iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_the_current_folder_is_a_destination_if_it_is_empty(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert.convert(source, Path("."), to="mlx")
    assert convert.sniff(tmp_path / "here") == "mlx"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalIOError, match="file"):
        convert.convert(source, tmp_path / "file" / "a.gguf", to="gguf", base=BASE)


def test_a_refused_conversion_leaves_nothing(tmp_path: Path, source: Path) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterhubError):
        convert.convert(source, tmp_path / "a.gguf", to="gguf", base=BaseSpec("b", "hf", "GPT2LMHeadModel", "gpt2", {}))
    assert sorted(tmp_path.iterdir()) == before


KILLED = """
import sys, time
from pathlib import Path
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.containers import gguf_output
from tests.converters.test_convert import BASE
write = gguf_output.write
def slow(path, *rest):
    write(path, *rest)
    print("written", flush=True)
    time.sleep(60)
gguf_output.write = slow
formats.convert(Path(sys.argv[1]), Path(sys.argv[2]), to="gguf", base=BASE)
"""


def test_a_killed_conversion_leaves_no_result_and_does_not_hinder_the_next(tmp_path: Path, source: Path) -> None:
    path = f"{ROOT}:{ROOT / 'converters'}:{ROOT / 'schemas'}"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(tmp_path / "a.gguf")],
        env={"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "a.gguf").exists()
    convert.convert(source, tmp_path / "a.gguf", to="gguf", base=BASE)
    assert convert.sniff(tmp_path / "a.gguf") == "gguf"


@pytest.mark.parametrize(
    ("files", "error", "says"),
    [
        (None, NotFoundError, "no such file or folder"),
        ({}, NotFoundError, "no adapter in this folder: PEFT and MLX adapters have an adapter_config.json"),
        ({"adapter_config.json": b"{}"}, FormatError, "a known format: its adapter_config.json has no peft_type"),
        ({"adapter_config.json": b"{"}, FormatError, "adapter_config.json: not valid JSON"),
        ({"adapter_config.json": b"\xff"}, FormatError, "not UTF-8"),
        (b"hello", FormatError, "not an adapter of a known format"),
    ],
)
def test_what_is_no_adapter(tmp_path: Path, files: object, error: type[AdapterhubError], says: str) -> None:
    path = tmp_path / "x"
    if isinstance(files, bytes):
        path.write_bytes(files)
    elif isinstance(files, dict):
        path.mkdir()
        for name, raw in files.items():
            (path / name).write_bytes(raw)
    with pytest.raises(error, match=says):
        convert.sniff(path)


def test_an_unknown_format_is_a_usage_error(tmp_path: Path, source: Path) -> None:
    known_formats = "diffusers, gguf, kohya, litgpt, megatron, mlx, ollama, peft, raw, torchtune"
    with pytest.raises(UsageError, match=f"no format 'onnx'. One of {known_formats}"):
        convert.convert(source, tmp_path / "a", to="onnx")


def test_importing_the_formats_imports_nothing_heavy() -> None:
    heavy = ("torch", "gguf", "transformers", "safetensors")
    code = f"import sys, adapterhub_converters.formats.convert; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "converters")}, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


MEASURED = """
import sys
from pathlib import Path
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.bases import BaseSpec
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
BASE = BaseSpec("base", "hf", "LlamaForCausalLM", "llama", {"num_hidden_layers": 8, "num_attention_heads": 32})
before = peak()
formats.convert(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3], base=BASE)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to ask")
@pytest.mark.parametrize("to", ["gguf", "mlx", "raw", "peft"])
def test_a_conversion_holds_one_tensor_not_the_adapter(tmp_path: Path, to: str) -> None:
    large = np.zeros((64, 16384), np.float16)
    deltas = {f"model.layers.{n}.self_attn.{p}_proj": LowRank(large, large.T.copy(), 64.0) for n in range(8) for p in "vo"}
    (tmp_path / "a").mkdir()
    peft.write(Adapter(deltas), tmp_path / "a")
    assert (tmp_path / "a" / peft.WEIGHTS).stat().st_size > 64 << 20
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path / "a"), str(tmp_path / "out"), to],
        env={"PYTHONPATH": str(ROOT / "converters")}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(result.stdout) < 32 << 20
