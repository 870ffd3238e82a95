"""Deltas of modules made of PEFT tensors: shared where they are alike, refused all at once where they are not understood."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.adapter import LowRank, with_factored_as_pairs
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.converters.test_peft_reader import PAIR, folder
from tests.support import folders


def test_every_delta_that_is_not_understood_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="and 1 more like it") as caught:
        peft.read(folder(tmp_path / "a", {**PAIR, "l.0.k.lora_E": (2, 1), "l.0.v.hada_w1_a": (2, 1)}))
    assert [item.partition(" ")[0] for item in caught.value.items] == ["l.0.k.lora_E", "l.0.v.hada_w1_a"]


def test_modules_that_are_alike_share_one_delta_where_only_shapes_are_read(tmp_path: Path) -> None:
    """The adapter.json of 150,000 pairs took as long as their check: it looked at each pair again for each of its facts."""
    shapes = {f"layers.{n}.q_proj.lora_{half}.weight": (2, 4) if half == "A" else (4, 2) for n in range(9) for half in "AB"}
    shapes["layers.9.q_proj.lora_A.weight"], shapes["layers.9.q_proj.lora_B.weight"] = (3, 4), (4, 3)
    path = folders.adapter(tmp_path / "a", shapes)
    adapter = peft.read_shapes(path)
    assert [(delta.r, count) for delta, count in adapter.distinct_deltas] == [(2, 9), (3, 1)]
    assert adapter.parameters == sum(tensor.size for _, tensor in adapter.tensors()) == 9 * 16 + 24
    assert any("layers.9.q_proj: rank 3 by its tensors" in note for note in adapter.notes)
    config = json.loads((path / peft.CONFIG).read_text())
    (path / peft.CONFIG).write_text(json.dumps({**config, "alpha_pattern": {"layers.3.q_proj": 32}}))
    alphas = {target: delta.alpha for target, delta in peft.read_shapes(path).deltas.items() if isinstance(delta, LowRank)}
    assert (alphas["layers.3.q_proj"], alphas["layers.4.q_proj"]) == (32, 4)


def test_qalora_is_the_pair_whose_columns_are_repeated(tmp_path: Path) -> None:
    adapter = peft.read(folder(tmp_path / "a", PAIR, use_qalora=True, qalora_group_size=4))
    x = np.random.default_rng(1).normal(size=32).astype(np.float32)
    pooled = adapter.deltas["l.0.q"]
    wide = with_factored_as_pairs(adapter).deltas["l.0.q"]
    groups = x.reshape(8, 4).mean(1) * 8  # peft, QALoraLinearVariant.forward
    want = pooled.scaling * (pooled.lora_B @ (pooled.lora_A @ groups))
    np.testing.assert_allclose(wide.scaling * (wide.lora_B @ (wide.lora_A @ x)), want, rtol=1e-5)
