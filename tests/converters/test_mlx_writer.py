"""Experts whose stacks differ from the usual: to mlx-lm and back, they add what mlx-lm's own loading makes of their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, StackedLowRank
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import mlx, peft
from tests.conftest import need_module
from tests.support import mlx_models

E, OUTER, INNER = 4, 64, 96
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # The experts of a layer in memory, their path in the files, and the config.
    "gpt_oss": ("model.layers.1.mlp.experts", "model.layers.1.mlp.experts", {}),
    "llama4": ("model.language_model.layers.1.feed_forward.experts", "language_model.model.layers.1.feed_forward.experts", {}),
    "nemotron_h": ("model.layers.3.mixer.experts", "backbone.layers.3.mixer.experts", {"moe_intermediate_size": INNER}),
}


def stacks(kind: str) -> dict[str, StackedLowRank]:
    """A delta on each parameter of a layer, of the rank 2 and 3."""
    rng = np.random.default_rng(0)

    def stack(out: int, into: int, r: int) -> StackedLowRank:
        lora_A, lora_B = (rng.normal(size=shape).astype(np.float32) for shape in ((E, r, into), (E, out, r)))
        return StackedLowRank(lora_A, lora_B, 4.0, transposed_base=kind != "nemotron_h")

    first = ("up_proj", INNER) if kind == "nemotron_h" else ("gate_up_proj", 2 * INNER)
    return {f"{KINDS[kind][0]}.{first[0]}": stack(first[1], OUTER, 2), f"{KINDS[kind][0]}.down_proj": stack(OUTER, INNER, 3)}


def dense(delta: StackedLowRank) -> np.ndarray:
    """The delta of every expert, `(experts, out, in)`."""
    return np.asarray(delta.scaling * delta.lora_B @ delta.lora_A)


def in_files(kind: str, deltas: dict[str, StackedLowRank]) -> dict[str, np.ndarray]:
    """The deltas as the base's files have the weights, which mlx-lm's `sanitize` reads."""
    tensors_by_name: dict[str, np.ndarray] = {}
    for target, delta in deltas.items():
        name, weights = target.rpartition(".")[2], dense(delta)
        place = KINDS[kind][1]
        if kind == "nemotron_h":
            tensors_by_name |= {f"{place}.{e}.{name}.weight": weight for e, weight in enumerate(weights)}
        else:  # gpt-oss's blocks are (experts, out, in), unlike its stacks in 16 bits
            tensors_by_name[f"{place}.{name}"] = weights if kind == "gpt_oss" else weights.swapaxes(1, 2)
    return tensors_by_name


@pytest.mark.peer
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_adds_what_its_loading_makes_of_the_sum(kind: str, tmp_path: Path) -> None:
    need_module("mlx_lm")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    deltas, base = stacks(kind), BaseSpec(kind, "hf", "", kind, {"n_routed_experts": E, "num_local_experts": E})
    (tmp_path / "a").mkdir()
    mlx.write(Adapter(deltas), tmp_path / "a", base=base)
    model = mlx_models.model(kind, **KINDS[kind][2])
    weights = {name: mx.array(array) for name, array in in_files(kind, deltas).items()}
    expected = {name.removesuffix(".weight"): np.array(array) for name, array in model.sanitize(weights).items()}
    modules = dict(load_adapters(model, str(tmp_path / "a")).named_modules())
    assert expected
    for name, delta in expected.items():
        module = modules[name]
        added = module.scale * np.array(module.lora_b) @ np.array(module.lora_a)
        np.testing.assert_allclose(added, delta, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_mlx_lm_saved_is_the_stack_that_peft_has(kind: str, tmp_path: Path) -> None:
    deltas, base = stacks(kind), BaseSpec(kind, "hf", "", kind, {"n_routed_experts": E, "num_local_experts": E})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    mlx.write(Adapter(deltas), tmp_path / "a", base=base)
    with safetensors_file.SafetensorsFile(tmp_path / "a" / mlx.WEIGHTS) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
    safetensors_file.write(tmp_path / "a" / mlx.WEIGHTS, tensors)  # without our keys
    read = mlx.read(tmp_path / "a", base=base)
    peft.write(read, tmp_path / "b", base=base)
    read_deltas = peft.read(tmp_path / "b", base=base).deltas
    assert {target.rpartition(".layers.")[2] for target in read_deltas} == {t.rpartition(".layers.")[2] for t in deltas}
    for target, delta in read_deltas.items():
        like = next(delta for name, delta in deltas.items() if name.endswith(target.rpartition(".layers.")[2]))
        assert isinstance(delta, StackedLowRank)
        assert delta.transposed_base == like.transposed_base
        np.testing.assert_allclose(dense(delta), dense(like), rtol=0, atol=1e-5, err_msg=target)


def test_a_gate_in_experts_without_one_is_refused(tmp_path: Path) -> None:
    base = BaseSpec("base", "hf", "", "nemotron_h", {"n_routed_experts": E})
    delta = next(iter(stacks("gpt_oss").values()))
    with pytest.raises(RefusedError, match="not known to have under this name"):
        mlx.write(Adapter({"model.layers.3.mixer.experts.gate_up_proj": delta}), tmp_path, base=base)
    with pytest.raises(RefusedError, match="decides whether gate and up alternate"):
        mlx.write(Adapter({"model.layers.3.mlp.experts.gate_up_proj": delta}), tmp_path)
