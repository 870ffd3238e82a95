"""A check reads each file once or twice, and reports very many bad tensors in a few lines."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from adapterhub import checks
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs
from tests.support.opens import opens

N = 50_000


def test_files_of_adapter_and_base_are_opened_once(started: Run, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    adapter(place / "a", pairs(2))
    base(place / "b")
    counts = opens(started, tmp_path, place, "validate", place / "a", "--base", place / "b")
    assert {"a/adapter_config.json", "a/adapter_model.safetensors", "b/config.json", "b/model.safetensors"} <= set(counts)
    assert max(counts.values()) <= 2, counts
    assert counts["a/adapter_model.safetensors"] == 1, counts


def many_tensors(folder: Path, name: str, shape: tuple[int, int]) -> Path:
    header, position = {}, 0
    for layer in range(N):
        header[name.format(layer)] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + 16]}
        position += 16
    raw = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("model.layers.{}.self_attn.q_proj.lora_A.weight", "key-prefix"),
        ("base_model.model.model.layers.{}.self_attn.q_proj.lora_Q", "unknown-tensor"),
        ("base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight", "missing-half"),
        ("base_model.model.model.layers.{}.norm.weight", "overwrites-base"),
    ],
)
def test_many_bad_tensors_are_one_group(tmp_path: Path, name: str, code: str) -> None:
    report = checks.check(many_tensors(tmp_path / "a", name, (2, 2)))
    group = next(group for group in report.grouped() if group.code == code)
    assert (group.count, len(group.places)) == (N, 10)
    assert group.places[:3] == tuple(problem.where for problem in report.problems if problem.code == code)[:3]
    assert "layers.0" in group.places[0]
    assert "layers.9" in group.places[9]
    assert len(repr(report)) < 200
