"""A merge of several files that is interrupted goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import safetensors_file
from tests.conftest import ROOT

OPTIONS = Options(shard_size=40_000)
LAYERS = [f"model.layers.{number}.self_attn.q_proj" for number in range(4)]


def adapter(scale: float = 1) -> Adapter:
    all_ones = np.ones((2, 96), np.float32)
    return Adapter({name: LowRank(all_ones * scale, all_ones.T.copy(), alpha=2 + number) for number, name in enumerate(LAYERS)})


def base_in(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=(96, 96)).astype(np.float32) for name in LAYERS}
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MERGE = """
import sys, time
from pathlib import Path
from adapterhub.merging import merge_into_base
from tests.merging.into_base.test_resume import OPTIONS, adapter
folder = Path(sys.argv[1])
def wait(done, size):
    if done > size // 2:
        while not any(note.read_text() for note in folder.glob(".out.partial-*/finished/*")):
            time.sleep(0.01)
        print("half way", flush=True)
        time.sleep(60)
merge_into_base([(adapter(), 1.0)], folder / "base", folder / "out", options=OPTIONS, progress=wait)
"""


def interrupted(folder: Path, signal_number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MERGE, str(folder)],
        env={"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "converters")))},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal_number)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_what_was_finished_is_taken_over(tmp_path: Path, signal_number: int) -> None:
    base = base_in(tmp_path / "base")
    interrupted(tmp_path, signal_number)
    [leftover] = [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    recorded = {note.name for note in (leftover / "finished").iterdir() if note.read_text()}  # the kill may leave an empty one
    inodes = {path.stat().st_ino for path in leftover.glob("out/model-*") if path.name in recorded}
    assert inodes
    reports: list[tuple[int, int]] = []
    report = merge_into_base(
        [(adapter(), 1.0)], base, tmp_path / "out", options=OPTIONS, progress=lambda *counts: reports.append(counts)
    )
    assert reports[0][0] > 0
    assert reports[-1] == (report.size, report.size)
    shards = sorted((tmp_path / "out").glob("model-*"))
    assert inodes <= {path.stat().st_ino for path in shards}
    merge_into_base([(adapter(), 1.0)], base, tmp_path / "wanted", options=OPTIONS)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "wanted"]


@pytest.mark.parametrize("spoil", ["a byte", "the adapter", "the base"])
def test_what_is_not_the_same_is_made_again(tmp_path: Path, spoil: str) -> None:
    base = base_in(tmp_path / "base")
    interrupted(tmp_path, signal.SIGKILL)
    [leftover] = [path for path in tmp_path.iterdir() if path.name.startswith(".out.")]
    if spoil == "a byte":
        for path in leftover.glob("out/model-*"):
            path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif spoil == "the base":
        os.utime(base / "model.safetensors", (1, 1))
    merged = adapter(2 if spoil == "the adapter" else 1)
    merge_into_base([(merged, 1.0)], base, tmp_path / "out", options=OPTIONS)
    merge_into_base([(merged, 1.0)], base, tmp_path / "wanted", options=OPTIONS)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "wanted").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "wanted"]
