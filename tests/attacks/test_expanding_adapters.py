"""A file of a few kilobytes that asks for gigabytes: kinds of adapters whose low-rank pairs are as large as a number says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapterhub.analysis import norms
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert
from tests.hub.conftest import Running, hub
from tests.support.hub_tenants import Tenant

__all__ = ["hub"]
Shapes = Mapping[str, tuple[int, ...]]
BOMBS: dict[str, tuple[dict[str, Any], Shapes]] = {
    "a group of a billion columns": (
        {"use_qalora": True, "qalora_group_size": 10**9},
        {"lora_A.weight": (2, 64), "lora_B.weight": (64, 2)},
    ),
    "the product of two whole matrices": (
        {"peft_type": "LOKR", "alpha": 2},
        {"lokr_w1": (500, 500), "lokr_w2": (500, 500)},
    ),
    "the square of a rank": (
        {"peft_type": "LOHA", "alpha": 2, "r": 3000},
        {"hada_w1_a": (4, 3000), "hada_w1_b": (3000, 4), "hada_w2_a": (4, 3000), "hada_w2_b": (3000, 4)},
    ),
}


@pytest.fixture(params=BOMBS.values(), ids=BOMBS)
def bomb(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A PEFT folder of less than 2 MB."""
    config, shapes = request.param
    folder = tmp_path / "bomb"
    folder.mkdir()
    common = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**common, "base_model_name_or_path": "x/y", **config}))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors = {prefix + name: np.full(shape, 0.01, np.float16) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_it_is_not_written_as_what_it_asks_for(bomb: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="numbers are to become low-rank pairs of"):
        convert.convert(bomb, tmp_path / "out", to="mlx")
    assert not (tmp_path / "out").exists()


def test_its_norm_is_not_computed(bomb: Path) -> None:
    heat = norms.build_heat_map(convert.read(bomb))
    assert list(heat.left_out) == ["model.layers.0.self_attn.q_proj"]
    assert "too large" in heat.left_out["model.layers.0.self_attn.q_proj"]


def test_no_page_and_no_form_of_a_hub_computes_with_it(hub: Running, bomb: Path) -> None:
    red = Tenant(hub, "red")
    red.create("bomb")
    assert red.upload("bomb", bomb).ok
    for answer in (red.get("/red/bomb/v1/norms"), red.get("/api/models/red/bomb.mlx")):
        assert "as low-rank pairs it has" in answer.text
        assert answer.status_code < 500


def test_a_kind_that_grows_as_it_does_in_use_is_still_written(tmp_path: Path) -> None:
    """LoKr in a layer of 512 by 1376: its pair has 87 times its numbers."""
    folder = tmp_path / "lokr"
    folder.mkdir()
    config = {"peft_type": "LOKR", "alpha": 2, "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x/y"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj."
    save_file(
        {f"{prefix}lokr_w1": np.ones((8, 8), np.float16), f"{prefix}lokr_w2": np.ones((64, 172), np.float16)},
        folder / "adapter_model.safetensors",
    )
    convert.convert(folder, tmp_path / "out", to="mlx")
    assert (tmp_path / "out" / "adapters.safetensors").stat().st_size > 1 << 20
