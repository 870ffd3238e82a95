"""mlx-lm folders: the same function in mlx-lm's own words, and the way back to PEFT loses no byte."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters import mlx, peft, safetensors_file
from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding, Meta, Rows
from adapterhub_converters.errors import AdapterhubError, RefusedError
from tests.conftest import need_module

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def delta(*, r: int = 2, alpha: float = 4, seed: int = 0, dtype: Any = np.float32, **more: Any) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.normal(size=(r, 8)).astype(dtype), rng.normal(size=(6, r)).astype(dtype), alpha, **more)


EMBED = LowRankEmbedding(np.arange(20, dtype=np.float32).reshape(2, 10), np.ones((6, 2), np.float32), 4)
ADAPTER = Adapter({Q: delta(seed=1), UP: delta(seed=2, alpha=5, dtype=np.float16), "model.embed_tokens": EMBED})


def write(adapter: Adapter, path: Path) -> Path:
    path.mkdir()
    mlx.write(adapter, path)
    return path


def applied(folder: Path) -> dict[str, np.ndarray]:
    """What mlx-lm adds to each weight, `(out, in)`: `scale * (lora_a @ lora_b).T` (mlx-lm, `tuner/lora.py`, `fuse`)."""
    scale = json.loads((folder / mlx.CONFIG).read_text())["lora_parameters"]["scale"]
    with safetensors_file.SafetensorsFile(folder / mlx.WEIGHTS) as file:
        tensors = {name: file.tensor(name).astype(np.float64) for name in file.tensors}
    targets = {name.rpartition(".")[0] for name in tensors}
    return {target: scale * (tensors[f"{target}.lora_a"] @ tensors[f"{target}.lora_b"]).T for target in targets}


def test_mlx_lm_applies_the_same_deltas(tmp_path: Path) -> None:
    found = applied(write(ADAPTER, tmp_path / "a"))
    for target, wanted in ADAPTER.deltas.items():
        dense = wanted.scaling * wanted.lora_B.astype(np.float64) @ wanted.lora_A.astype(np.float64)
        np.testing.assert_allclose(found[target], dense, rtol=1e-6)


def test_the_config_says_what_mlx_lm_reads(tmp_path: Path) -> None:
    assert json.loads((write(ADAPTER, tmp_path / "a") / mlx.CONFIG).read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["mlp.up_proj", "model.embed_tokens", "self_attn.q_proj"],
        },
    }  # fmt: skip


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
    again = mlx.read(folder)
    assert bool(again.notes) == (change in ("scale", "tensor"))
    assert (again.source is None) == (change is not None)
    for target, dense in applied(folder).items():
        found = again.deltas[target]
        np.testing.assert_allclose(found.scaling * found.lora_B.astype(np.float64) @ found.lora_A, dense, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (Adapter({}), "there is no low-rank delta"),
        (Adapter({Q: delta(), UP: delta(r=3)}), "ranks 2, 3: an mlx-lm adapter has one rank"),
        (Adapter({Q: delta(magnitude=np.ones(6))}), "q_proj: DoRA or a bias"),
        (Adapter({"transformer.h.0.attn.c_attn": delta()}), "not a module whose name mlx-lm is known to share"),
        (Adapter({Q: delta(transposed_base=True)}), "an embedding or transposed module"),
        (Adapter({Q: delta()}, replaced={"lm_head.weight": np.ones((2, 2))}), "a replaced parameter cannot be said"),
        (Adapter({Q: delta()}, rows={"model.embed_tokens": Rows((1,), np.ones((1, 2)))}), "replaced rows cannot be said"),
        (Adapter({Q: delta()}, meta=Meta(init="olora")), "its factors began as olora"),
    ],
)
def test_what_mlx_lm_cannot_say_is_refused_by_name(tmp_path: Path, adapter: Adapter, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        write(adapter, tmp_path / "a")
    assert says in str(caught.value)


GOOD = {"rank": 2, "scale": 20.0, "dropout": 0.0}
PAIR = {f"{Q}.lora_a": np.ones((8, 2), np.float32), f"{Q}.lora_b": np.ones((2, 6), np.float32)}


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({"fine_tune_type": "dora", "lora_parameters": GOOD}, PAIR, "fine_tune_type 'dora' is not read yet"),
        ({"fine_tune_type": "lora"}, PAIR, "there are no lora_parameters"),
        ({"lora_parameters": {"rank": 2}}, PAIR, '"scale" is null'),
        ({"lora_parameters": GOOD | {"scale": True}}, PAIR, '"scale" is true'),
        ({"lora_parameters": GOOD | {"rank": 4}}, PAIR, "lora_a (8, 2), lora_b (2, 6) but rank 4"),
        ({"lora_parameters": GOOD}, {f"{Q}.lora_a": PAIR[f"{Q}.lora_a"]}, "has lora_a alone"),
        ({"lora_parameters": GOOD}, PAIR | {f"{Q}.m": np.ones(6, np.float32)}, "(.m would be DoRA)"),
        ({"lora_parameters": GOOD}, PAIR | {f"{Q}.lora_a": np.ones((3, 8, 2), np.float32)}, "(experts?) is not read yet"),
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


def test_peft_to_mlx_and_back_is_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    peft.write(ADAPTER, tmp_path / "peft")
    original = peft.read(tmp_path / "peft")
    (tmp_path / "again").mkdir()
    peft.write(mlx.read(write(original, tmp_path / "mlx")), tmp_path / "again")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


@pytest.mark.peer
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"alpha_pattern": {"k_proj": 11}},
        {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "lm_head", "embed_tokens"]},
        {"lora_alpha": 0},
    ],
)
def test_the_real_mlx_lm_computes_what_peft_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    need_module("mlx_lm")
    import mlx.core as mx
    import torch
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    from tests import tiny

    tokens = [3, 17, 99, 5, 64, 23, 101, 7]
    made = tiny.model()
    made.save_pretrained(tmp_path / "base")
    wrapped = tiny.adapter(made, tmp_path / "peft", **config)
    with torch.no_grad():
        expected = wrapped(torch.tensor([tokens])).logits[0].numpy()
    write(peft.read(tmp_path / "peft"), tmp_path / "mlx")
    loaded, _ = load_model(tmp_path / "base")
    found = np.array(load_adapters(loaded, str(tmp_path / "mlx"))(mx.array([tokens]))[0])
    assert np.abs(found - expected).max() < 1e-4
