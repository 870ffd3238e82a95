"""examples/qlora.py computes what the trainer does: the same losses and the same adapter, bit for bit in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training  # noqa: E402
from adapterhub.training import compute_device  # noqa: E402
from adapterhub.training.layers import nf4_matrix  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from examples import qlora  # noqa: E402

CONFIG = """
[base]
path = {base}
dtype = "{dtype}"
[data]
train = "data.jsonl"
sequence = 96
[lora]
r = 16
alpha = 32
[train]
rows = 4
threads = 1
learning_rate = 0.01
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_losses_and_its_adapter_are_the_trainers(dtype: str, tmp_path: Path, tiny_base: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    lines = [{"prompt": f"{n} times {n} is", "completion": f" {n * n}, " * (1 + n % 7)} for n in range(160)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "c.toml").write_text(CONFIG.format(base=json.dumps(str(tiny_base)), dtype=dtype))
    training.run(training.read_config(tmp_path / "c.toml"), tmp_path / "ours")
    log = [json.loads(line) for line in (tmp_path / "ours/log.jsonl").read_text().splitlines()]

    monkeypatch.setattr(qlora, "SEQUENCE", 96)
    monkeypatch.setattr(qlora, "RATE", 0.01)
    with compute_device.threads(1):
        losses = qlora.main(str(tiny_base), tmp_path / "data.jsonl", tmp_path / "theirs", getattr(torch, dtype))
    assert len(losses) > 15
    assert losses[-1] < losses[0] - 1
    assert losses[0] == log[0]["loss"]
    if dtype == "bfloat16":  # its attention has probabilities in float32
        assert losses == pytest.approx([line["loss"] for line in log], rel=5e-3)
        return
    assert losses == [line["loss"] for line in log]
    ours, theirs = (peft_format.read(tmp_path / name).deltas for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        assert (delta.lora_A == theirs[path].lora_A).all(), path
        assert (delta.lora_B == theirs[path].lora_B).all(), path


def test_its_nf4_is_the_trainers() -> None:
    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0)) ** 3
    ours, theirs = nf4_matrix.quantize(weight), qlora.quantize(weight)
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.absmax, theirs.absmax)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(nf4_matrix.dequantize(ours, dtype), qlora.dequantize(theirs, dtype))
