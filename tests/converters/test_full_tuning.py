"""Layers tuned as a whole by mlx-lm: described as such, and merged to the model that mlx-lm runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub_converters.bases import BaseSpec, BaseTensor, read_base
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import WRITTEN, convert, mlx
from adapterhub_converters.formats.mlx import full_tuning
from tests.conftest import Run, need_module
from tests.converters.test_mlx_module_names import loaded, saved
from tests.support import mlx_models, tiny

CONFIG = {"fine_tune_type": "full", "num_layers": 1, "model": "org/base", "lora_parameters": {"rank": 8, "scale": 20.0}}
LAYER = "model.layers.1."
PARTS = {f"{LAYER}mlp.up_proj.weight": (96, 64), f"{LAYER}input_layernorm.weight": (64,)}


def folder(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    safetensors_file.write(path / mlx.WEIGHTS, tensors)
    (path / mlx.CONFIG).write_text(json.dumps(CONFIG))
    return path


def tuned_model(path: Path, **more_tensors: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    return folder(path, {name: rng.normal(size=shape).astype(np.float32) for name, shape in PARTS.items()} | more_tensors)


def trained(model: Any, path: Path) -> Path:
    """What mlx-lm saves of a model whose last layer was trained (`lora.py`), with random numbers."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model.freeze()
    model.layers[-1].unfreeze()
    rng, weights = np.random.default_rng(0), dict(tree_flatten(model.trainable_parameters()))
    path.mkdir()
    changed = {name: mx.array(0.1 * rng.normal(size=array.shape).astype(np.float32)) for name, array in weights.items()}
    mx.save_safetensors(str(path / mlx.WEIGHTS), changed)
    (path / mlx.CONFIG).write_text(json.dumps(CONFIG))
    return path


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM", "Qwen2MoeForCausalLM", "MixtralForCausalLM", "Gemma3ForConditionalGeneration",
        "Qwen3VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    ],
)  # fmt: skip
def test_the_merged_model_is_the_one_that_mlx_lm_runs(name: str, tmp_path: Path) -> None:
    need_module("mlx_lm")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    base = saved(tiny.model(name), tmp_path / "base")
    trained(loaded(base), tmp_path / "a")
    assert ah.check(tmp_path / "a", base=base).ok
    ah.merge_into(tmp_path / "a", base, tmp_path / "merged")
    tokens = mx.array([[3, 17, 99, 5, 64, 23]])
    before, expected = np.array(loaded(base)(tokens)), np.array(load_adapters(loaded(base), str(tmp_path / "a"))(tokens))
    (tmp_path / "merged/config.json").write_text((base / "config.json").read_text())
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_array_equal(np.array(loaded(tmp_path / "merged")(tokens)), expected)


@pytest.mark.peer
@pytest.mark.parametrize("kind", sorted(full_tuning.SAME_PARAMETERS))
def test_mlx_lm_loads_the_parameters_as_they_are_read(kind: str) -> None:
    need_module("mlx_lm")
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model = mlx_models.model(kind)
    rng = np.random.default_rng(0)
    parameters = {n: rng.normal(size=array.shape).astype(np.float32) for n, array in tree_flatten(model.parameters())}
    layers = {name: array for name, array in parameters.items() if ".layers." in name}
    as_saved = {name: BaseTensor(array.shape, "F32") for name, array in layers.items()} if kind in FILES else {}
    read = full_tuning.read(CONFIG, layers, "", BaseSpec(kind, "hf", "", kind, {}, tensors=as_saved)).replaced
    outside_layers = {name: array for name, array in parameters.items() if name not in layers}
    weights = {name: mx.array(array) for name, array in (outside_layers | dict(read)).items()}
    sanitized = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    for name, array in layers.items():
        np.testing.assert_array_equal(np.array(sanitized[name]), array, err_msg=name)


FILES = {"gemma3"}  # whose own files have the prefix that mlx-lm has


def test_it_is_described_kept_and_checked_as_what_it_is(run: Run, tmp_path: Path) -> None:
    model = tiny.model("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "base")
    tuned_model(tmp_path / "a")
    facts = json.loads(run("show", "a", "--json").stdout)["manifest"]
    assert (facts["method"], facts["format"], facts["r"], facts["targets"]) == ("full", "mlx", None, [])
    assert (facts["replaced"], facts["parameters"], facts["base"]["repo"]) == (sorted(PARTS), 96 * 64 + 64, "org/base")
    run("init")
    run("push", "a", "team/a:one", "--base", "base")
    run("pull", "team/a:one", "-o", "back")
    assert (tmp_path / "back" / mlx.WEIGHTS).read_bytes() == (tmp_path / "a" / mlx.WEIGHTS).read_bytes()
    report = ah.check(tmp_path / "a", base=tmp_path / "base")
    assert report.ok
    assert [name for name, verdict in report.verdicts.items() if verdict.verdict == "applied"] == ["mlx"]
    tuned_model(tmp_path / "b", **{f"{LAYER}mlp.down_proj.weight": np.ones((64, 32), np.float32)})
    assert [problem.code for problem in ah.check(tmp_path / "b", base=tmp_path / "base").problems] == ["shape-mismatch"]


@pytest.mark.parametrize("to", [name for name in WRITTEN if name != "mlx"])
def test_no_other_format_calls_it_lora(to: str, tmp_path: Path) -> None:
    tiny.model("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    says = "there is no low-rank delta to write"
    with pytest.raises(RefusedError, match=rf"{says}\. Merge the adapter into its base" if to == "peft" else says):
        convert.convert(tuned_model(tmp_path / "a"), tmp_path / "b", to=to, base=read_base(tmp_path / "base"))
    assert not (tmp_path / "b").exists()


def test_only_a_merge_into_its_base_merges_it(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"an adapter by full is no sum of deltas. Merge it into its base"):
        ah.merge([tuned_model(tmp_path / "a"), tmp_path / "a"], tmp_path / "b", weights=[0.5, 0.5])


def test_a_table_of_a_base_that_ties_it_is_its_output_layer_too(tmp_path: Path) -> None:
    table = {"model.embed_tokens.weight": np.ones((128, 64), np.float32)}
    base = BaseSpec("base", "hf", "LlamaForCausalLM", "llama", {}, tied=True)
    assert set(convert.read(folder(tmp_path / "a", table), base=base).replaced) == {*table, "lm_head.weight"}
    assert set(convert.read(tmp_path / "a").replaced) == set(table)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "there is no parameter in it"),
        ({f"{LAYER}mlp.up_proj.weight": np.ones((96, 8), np.uint32)}, "as in a quantized model"),
        ({f"{LAYER}mlp.up_proj.scales": np.ones((96, 1), np.float16)}, "as in a quantized model"),
        ({f"{LAYER}mlp.up_proj.weight": np.ones((0, 8), np.float32)}, r"up_proj.weight' has the shape \(0, 8\)"),
        ({f"{LAYER}mlp.switch_mlp.up_proj.weight": np.ones((9000, 1, 1), np.float16)}, r"has the shape \(9000, 1, 1\)"),
    ],
)
def test_what_is_no_parameter_is_refused_in_one_line(tmp_path: Path, tensors: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(AdapterhubError, match=says):
        convert.read(folder(tmp_path / "a", tensors))


def test_a_model_type_that_mlx_lm_changes_when_it_loads_it_is_refused_by_name(tmp_path: Path) -> None:
    base = BaseSpec("base", "hf", "Qwen3_5ForCausalLM", "qwen3_5", {})  # 1 is added to its norms
    says = "the parameters of qwen3_5 in the form of its files. Fuse the two with mlx_lm.fuse, and use the fused model"
    with pytest.raises(RefusedError, match=says):
        convert.read(tuned_model(tmp_path / "a"), base=base)
