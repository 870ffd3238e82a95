"""`merge_into_base` without peers: what it refuses, what it copies, and what a death in the middle leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import merge_into_base
from adapterhub.merging.into_base.merge_proof import prove
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, Rows
from adapterhub_converters.containers import safetensors_file

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    f"{Q}.weight": (16, 16),
    f"{K}.weight": (8, 16),
    f"{Q}.bias": (16,),
    "lm_head.weight": (40, 16),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "tie_word_embeddings": False}


def base_in(folder: Path, dtype: np.dtype = dtypes.BF16, scale: float = 1, drop: str = "", **config: Any) -> Path:
    rng = np.random.default_rng(1)
    folder.mkdir()
    tensors = {name: (scale * rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items() if name != drop}
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def low_rank(m: int = 16, n: int = 16, r: int = 2, scale: float = 1, **fields: Any) -> LowRank:
    rng = np.random.default_rng(2)
    lora_A, lora_B = rng.normal(size=(r, n)), scale * rng.normal(size=(m, r))
    return LowRank(lora_A.astype(np.float32), lora_B.astype(np.float32), **{"alpha": 4.0, **fields})


def embedding(vocabulary: int = 40, **fields: Any) -> LowRankEmbedding:
    return LowRankEmbedding(np.ones((2, vocabulary), np.float32), np.ones((16, 2), np.float32), alpha=1, **fields)


PLAIN = Adapter({Q: low_rank()})
TABLE = np.ones((40, 16), np.float32)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        return {name: file.tensor(name) for name in file.tensors}


def test_only_the_target_changes_and_the_header_stays(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    reports: list[tuple[int, int]] = []
    report = merge_into_base(
        [(PLAIN, 0.5)], base, tmp_path / "out", progress=lambda bytes_done, size: reports.append((bytes_done, size))
    )
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {f"{Q}.weight"}
    delta = PLAIN.deltas[Q]
    expected = before[f"{Q}.weight"].astype(np.float32) + 0.5 * delta.scaling * (delta.lora_B @ delta.lora_A)
    np.testing.assert_allclose(after[f"{Q}.weight"].astype(np.float32), expected, rtol=2**-8)
    assert reports[-1] == (report.size, report.size)
    assert report.touched_size == 16 * 16 * 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_tied_base_takes_what_is_not_the_table(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", drop="lm_head.weight", vocab_size=16)  # as many as q_proj has rows
    assert set(merge_into_base([(PLAIN, 1.0)], base, tmp_path / "out").touched) == {f"{Q}.weight"}


@pytest.mark.parametrize("magnitude", [None, np.linspace(1, 2, 16, dtype=np.float32)], ids=["plain", "norms of columns"])
def test_tiles_and_workers_do_not_change_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magnitude: np.ndarray | None
) -> None:
    base = base_in(tmp_path / "base")
    deltas: dict[str, Delta] = {Q: low_rank(), K: low_rank(8), "model.embed_tokens": embedding(magnitude=magnitude)}
    adapter = Adapter(deltas, rows={"lm_head": Rows((39, 0), TABLE[:2])})
    merge_into_base([(adapter, 1.0)], base, tmp_path / "one")
    monkeypatch.setattr(sys.modules["adapterhub.merging.into_base.output_files"], "TILE", 40)
    merge_into_base([(adapter, 1.0)], base, tmp_path / "two")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    monkeypatch.setattr(sys.modules["adapterhub.merging.into_base.merge_proof"], "_TILE", 40)
    proofs = prove([(adapter, 1.0)], base, tmp_path / "two")
    assert {tensor.verdict for tensor in proofs.tensors} == {"exact", "untouched"}


def test_a_delta_below_the_steps_of_the_dtype_is_reported_as_lost(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    report = merge_into_base([(Adapter({Q: low_rank(scale=1e-4)}), 1.0)], base, tmp_path / "out")
    change = report.touched[f"{Q}.weight"]
    assert change.relative is not None
    assert change.relative < 1e-3
    assert change.retained is not None
    assert change.retained < 0.9
