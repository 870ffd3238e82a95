"""What is written with a base has the names of the base's modules, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub
from adapterhub_converters import bases
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft

OLD = "language_model.model.layers.0.self_attn.q_proj"
NEW = "model.language_model.layers.0.self_attn.q_proj"


def mlx(folder: Path, *modules: str) -> Path:
    """An adapter as mlx-lm saves it."""
    folder.mkdir()
    shapes = {f"{module}.lora_{half}": shape for module in modules for half, shape in (("a", (8, 2)), ("b", (2, 8)))}
    safetensors_file.write(folder / "adapters.safetensors", {n: np.ones(shape, np.float32) for n, shape in shapes.items()})
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def base(folder: Path, kind: str, *modules: str, **config: Any) -> bases.BaseSpec:
    folder.mkdir()
    names = [*(f"{module}.weight" for module in modules), "model.embed_tokens.weight"]
    safetensors_file.write(folder / "model.safetensors", {name: np.zeros((8, 8), np.float32) for name in names})
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [kind], "hidden_size": 8, **config}))
    return bases.read_hf(folder)


@pytest.mark.parametrize(("kind", "in_files"), [("gemma3", OLD), ("qwen3_5", NEW), ("qwen3_vl", NEW)])
def test_an_adapter_of_mlx_lm_is_merged_into_a_vision_model(kind: str, in_files: str, tmp_path: Path) -> None:
    spec = base(tmp_path / "base", kind, in_files)
    source = mlx(tmp_path / "a", OLD)
    assert adapterhub.check(source, base=spec).ok
    adapterhub.merge_into(source, tmp_path / "base", tmp_path / "merged")
    with safetensors_file.SafetensorsFile(tmp_path / "merged/model.safetensors") as file:
        np.testing.assert_array_equal(file.tensor(f"{in_files}.weight"), np.full((8, 8), 4.0, np.float32))


@pytest.mark.parametrize(("kind", "in_files"), [("gemma3", OLD), ("qwen3_5", NEW), ("qwen3_vl", NEW)])
def test_a_vision_model_has_the_names_of_the_model_in_memory(kind: str, in_files: str, tmp_path: Path) -> None:
    spec = base(tmp_path / "base", kind, in_files)
    convert.convert(mlx(tmp_path / "a", OLD), tmp_path / "out", to="peft", base=spec)
    assert [*peft.read(tmp_path / "out").deltas] == [NEW]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_modules"] == [NEW]


@pytest.mark.parametrize("to", ["peft", "raw", "litgpt"])
def test_a_module_that_the_base_does_not_have_is_not_written(to: str, tmp_path: Path) -> None:
    spec = base(tmp_path / "base", "qwen3", "model.layers.0.self_attn.q_proj")
    with pytest.raises(RefusedError, match=r"model\.layers\.0\.cross_attn\.k: the base has no such module"):
        convert.convert(mlx(tmp_path / "a", "model.layers.0.cross_attn.k"), tmp_path / "out", to=to, base=spec)
    assert not (tmp_path / "out").exists()
    deeper = mlx(tmp_path / "b", "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj")
    with pytest.raises(RefusedError, match="and 1 more"):
        convert.convert(deeper, tmp_path / "out", to=to, base=spec)


def test_names_of_a_video_model_that_diffusers_does_not_have_are_written_as_its_own(tmp_path: Path) -> None:
    module = "blocks.0.cross_attn.k"
    shapes = {f"{module}.lora_{half}.default.weight": shape for half, shape in (("A", (2, 8)), ("B", (8, 2)))}
    safetensors_file.write(tmp_path / "a.safetensors", {n: np.ones(shape, np.float32) for n, shape in shapes.items()})
    spec = base(tmp_path / "base", "", "blocks.0.attn2.to_k", _class_name="WanTransformer3DModel")
    convert.convert(tmp_path / "a.safetensors", tmp_path / "out", to="peft", base=spec)
    assert [*peft.read(tmp_path / "out").deltas] == ["blocks.0.attn2.to_k"]
    other_base = base(tmp_path / "other", "", "blocks.0.attn1.to_k", _class_name="WanTransformer3DModel")
    with pytest.raises(RefusedError, match="has no such module|matches no module"):
        convert.convert(tmp_path / "a.safetensors", tmp_path / "no", to="peft", base=other_base)


@pytest.mark.parametrize("name", ["lm_head", "model.layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj"])
def test_what_a_loader_corrects_is_written(name: str, tmp_path: Path) -> None:
    spec = base(tmp_path / "base", "qwen3", "model.layers.0.self_attn.q_proj", tie_word_embeddings=True)
    convert.convert(mlx(tmp_path / "a", name), tmp_path / "out", to="peft", base=spec)
    assert [*peft.read(tmp_path / "out").deltas] == [name]
