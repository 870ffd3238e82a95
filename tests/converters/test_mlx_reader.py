"""mlx-lm folders as they are read: without our keys, of mlx-vlm, changed or malformed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.adapter import Adapter, LowRankEmbedding
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import convert, mlx
from tests.converters.test_mlx import VARIANTS, applied, delta, experts, write

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


EMBED = LowRankEmbedding(np.arange(20, dtype=np.float32).reshape(2, 10), np.ones((6, 2), np.float32), 4)
ADAPTER = Adapter({Q: delta(seed=1), UP: delta(seed=2, alpha=5, dtype=np.float16), "model.embed_tokens": EMBED})
UNTIED = BaseSpec("untied", "hf", "Qwen3MoeForCausalLM", "qwen3_moe", {"num_experts": 4})
EXPERT = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("change", [None, "scale", "tensor", "metadata"])
def test_what_came_without_our_keys_or_was_changed_reads_to_the_same_function(tmp_path: Path, change: str | None) -> None:
    folder = write(ADAPTER, tmp_path / "a")
    with safetensors_file.SafetensorsFile(folder / mlx.WEIGHTS) as file:
        tensors, metadata = {name: file.tensor(name) for name in file.tensors}, file.header.metadata
    if change == "scale":
        config = json.loads((folder / mlx.CONFIG).read_text())
        config["lora_parameters"]["scale"] = 3.0
        (folder / mlx.CONFIG).write_text(json.dumps(config))
    if change == "tensor":
        tensors[f"{Q}.lora_a"] *= 2
    safetensors_file.write(folder / mlx.WEIGHTS, tensors, {} if change == "metadata" else metadata)
    again = mlx.read(folder, base=UNTIED)
    assert bool(again.notes) == (change in ("scale", "tensor"))
    assert (again.source is None) == (change is not None)
    for target, dense in applied(folder).items():
        read_delta = again.deltas[target]
        np.testing.assert_allclose(
            read_delta.scaling * read_delta.lora_B.astype(np.float64) @ read_delta.lora_A, dense, rtol=2e-3, atol=1e-5
        )


GOOD = {"rank": 2, "scale": 20.0, "dropout": 0.0}
PAIR = {f"{Q}.lora_a": np.ones((8, 2), np.float32), f"{Q}.lora_b": np.ones((2, 6), np.float32)}


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        (
            {"fine_tune_type": "next", "lora_parameters": GOOD},
            PAIR,
            "fine_tune_type 'next' is not supported, only lora, dora and full",
        ),
        ({"fine_tune_type": "full", "lora_parameters": GOOD}, PAIR, "belongs to a LoRA, but the config is for full parameters"),
        ({"fine_tune_type": "dora", "lora_parameters": GOOD}, PAIR, "m is missing in a DoRA adapter"),
        ({"fine_tune_type": "lora"}, PAIR, "there are no lora_parameters"),
        ({"lora_parameters": {"rank": 2}}, PAIR, '"scale" is null'),
        ({"lora_parameters": GOOD | {"scale": True}}, PAIR, '"scale" is true'),
        ({"lora_parameters": GOOD | {"rank": 4}}, PAIR, "lora_a (8, 2), lora_b (2, 6) but rank 4"),
        ({"lora_parameters": GOOD}, {f"{Q}.lora_a": PAIR[f"{Q}.lora_a"]}, "has lora_a alone"),
        ({"lora_parameters": GOOD}, PAIR | {f"{Q}.m": np.ones(6, np.float32)}, "there is an m in a LoRA adapter"),
        ({"fine_tune_type": "dora", "lora_parameters": GOOD}, PAIR | {f"{Q}.m": np.ones(5, np.float32)}, "not one number for"),
        ({"lora_parameters": GOOD}, PAIR | {f"{Q}.x": np.ones(6, np.float32)}, "not a lora_a, lora_b or m"),
        ({"lora_parameters": GOOD}, PAIR | {f"{Q}.lora_a": np.ones((3, 8, 2), np.float32)}, "are not a pair"),
        (
            {"lora_parameters": GOOD},
            {
                f"model.embed_tokens.{h}": a
                for h, a in (("lora_a", np.ones((8, 2), np.float32)), ("lora_b", np.ones((2, 6), np.float32)))
            },
            "also applies it to the output layer",
        ),
        ({"lora_parameters": GOOD}, None, "there is no adapters.safetensors"),
    ],
)
def test_malformed_adapters_are_refused_in_one_line(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None, says: str
) -> None:
    (tmp_path / mlx.CONFIG).write_text(json.dumps(config))
    if tensors is not None:
        safetensors_file.write(tmp_path / mlx.WEIGHTS, tensors)
    with pytest.raises(AdapterhubError) as caught:
        mlx.read(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rank", "scale", "keys"]), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(["fine_tune_type", "num_layers", "model", "lora_parameters"]), SCRAPS))
def test_any_config_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("mlx")
    (folder / mlx.CONFIG).write_text(json.dumps({"lora_parameters": GOOD} | config))
    safetensors_file.write(folder / mlx.WEIGHTS, PAIR)
    with contextlib.suppress(AdapterhubError):
        mlx.read(folder)


def test_a_filled_rank_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    folder = write(VARIANTS["ranks"], tmp_path / "a")
    with safetensors_file.SafetensorsFile(folder / mlx.WEIGHTS) as file:
        tensors, metadata = {name: file.tensor(name) for name in file.tensors}, dict(file.header.metadata)
    metadata["adapterhub.mlx.ranks"] = json.dumps({Q: 1})
    safetensors_file.write(folder / mlx.WEIGHTS, tensors, metadata)
    assert mlx.read(folder, base=UNTIED).notes  # another payload: the source config is ignored


def test_experts_without_a_source_config_come_back_one_by_one(tmp_path: Path) -> None:
    folder = write(experts(), tmp_path / "a")
    with safetensors_file.SafetensorsFile(folder / mlx.WEIGHTS) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    assert tensors["model.layers.0.mlp.switch_mlp.gate_proj.lora_a"].shape == (4, 4, 8)
    safetensors_file.write(folder / mlx.WEIGHTS, tensors)
    deltas = mlx.read(folder).deltas
    assert len(deltas) == 12
    for target, low in experts().deltas.items():
        dense = deltas[target].scaling * deltas[target].lora_B.astype(np.float64) @ deltas[target].lora_A
        np.testing.assert_allclose(dense, low.scaling * low.lora_B.astype(np.float64) @ low.lora_A, rtol=2e-3, atol=1e-5)


def of_vlm(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    factors = {"A": rng.normal(size=(8, 2)).astype(np.float32), "B": rng.normal(size=(2, 6)).astype(np.float32)}
    safetensors_file.write(folder / mlx.WEIGHTS, {f"language_model.{Q}.{half}": array for half, array in factors.items()})
    (folder / mlx.CONFIG).write_text(json.dumps({"rank": 2, "alpha": 0.5, "dropout": 0.1} | config))
    return folder


def test_an_adapter_of_mlx_vlm_is_read(tmp_path: Path) -> None:
    folder = of_vlm(tmp_path / "a")
    adapter = convert.read(folder)
    ((target, read_delta),) = adapter.deltas.items()
    assert target == f"language_model.{Q}"
    with safetensors_file.SafetensorsFile(folder / mlx.WEIGHTS) as file:
        product = file.tensor(f"{target}.A") @ file.tensor(f"{target}.B")
    np.testing.assert_allclose(read_delta.scaling * read_delta.lora_B @ read_delta.lora_A, 0.25 * product.T, rtol=1e-6)  # type: ignore[union-attr]
    assert "alpha / rank" in adapter.notes[0]


@pytest.mark.parametrize(
    ("config", "says"), [({"rank": 0}, '"rank" is 0'), ({"alpha": "x"}, '"alpha" is'), ({"rank": 3}, "but rank 3")]
)
def test_a_malformed_config_of_mlx_vlm_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterhubError, match=says):
        convert.read(of_vlm(tmp_path / "a", **config))
