"""mergekit as the oracle: models that it makes of a base and adapters, tensor by tensor against ours.

It merges whole models: each adapter goes into the base first, and the task vectors are taken from that. What it does with
whole weights (`slerp`, `karcher`) it does to deltas where the base is zero.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import METHODS, combine, join, merge_into_base, prepare_merge
from adapterhub.merging.adapters.methods.element_rules import keep_probabilities
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.formats import peft
from tests.conftest import missing
from tests.support import mergekit_env
from tests.support.folders import adapter

pytestmark = pytest.mark.peer

WIDE, INNER, VOCABULARY, LAYERS = 32, 48, 64, 2
LINEAR = {
    "self_attn.q_proj": (WIDE, WIDE), "self_attn.k_proj": (WIDE // 2, WIDE), "self_attn.v_proj": (WIDE // 2, WIDE),
    "self_attn.o_proj": (WIDE, WIDE), "mlp.gate_proj": (INNER, WIDE), "mlp.up_proj": (INNER, WIDE),
    "mlp.down_proj": (WIDE, INNER),
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDE, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
SHARED = ("self_attn.q_proj", "mlp.down_proj")  # what all three adapters change
ADAPTERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "a": (SHARED, {"r": 3, "lora_alpha": 6}),
    "b": ((*SHARED, "self_attn.v_proj"), {"r": 5, "lora_alpha": 4, "use_rslora": True}),
    "c": ((*SHARED, "self_attn.o_proj"), {"r": 4, "lora_alpha": 8}),
}
MIXED, POSITIVE = (0.7, -0.4, 0.5), (0.7, 0.4, 0.5)


@dataclass(frozen=True)
class Case:
    """One merge in the words of both.

    Attributes:
        theirs: Their method, and `settings` of it; `per_adapter` is said of every adapter, and so is its weight.
        ours: The method here, and its `parameters`.
        weights: Of the adapters a, b, c, as many as there are; None where mergekit is told none.
        zero: The base is zero.
        only: The modules that are compared; all tensors by default.
        without: `base_model` is not said.
        near: The largest difference over the largest change.
    """

    theirs: str
    ours: str
    weights: tuple[float, ...] | None = POSITIVE
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_adapter: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    count: int = 3
    zero: bool = False
    only: tuple[str, ...] = ()
    without: bool = False
    near: float = 2e-6


CASES = {
    "task_arithmetic": Case("task_arithmetic", "linear", MIXED),
    "linear": Case("linear", "linear", settings={"normalize": False}, zero=True, without=True),
    "ties": Case(
        "ties", "ties", settings={"lambda": 1.5}, per_adapter={"density": 0.3}, parameters={"density": 0.3, "lambda": 1.5}
    ),
    "ties-whole": Case("ties", "ties", per_adapter={"density": 1.0}, parameters={"density": 1.0}),
    "breadcrumbs": Case(
        "breadcrumbs", "breadcrumbs", MIXED, {"lambda": 1.5}, {"density": 0.6, "gamma": 0.1},
        {"density": 0.6, "gamma": 0.1, "lambda": 1.5},
    ),
    "dare_linear": Case("dare_linear", "dare_linear", MIXED, per_adapter={"density": 1.0}, parameters={"density": 1.0}),
    "dare_ties": Case(
        "dare_ties", "dare_ties", settings={"normalize": True}, per_adapter={"density": 1.0}, parameters={"density": 1.0}
    ),
    "della": Case("della", "della", per_adapter={"density": 1.0, "epsilon": 0.0}, parameters={"density": 1.0, "epsilon": 0.0}),
    "sce": Case("sce", "sce", None, {"select_topk": 0.4}, parameters={"density": 0.4}),
    "slerp": Case("slerp", "slerp", None, {"t": 0.3}, parameters={"t": 0.3}, count=2, zero=True, only=SHARED),
    "nuslerp": Case("nuslerp", "nuslerp", POSITIVE[:2], count=2, only=SHARED),
    "nuslerp-rows": Case(
        "nuslerp", "nuslerp", POSITIVE[:2], {"nuslerp_flatten": False, "nuslerp_row_wise": False}, parameters={"by": "rows"},
        count=2, only=SHARED,
    ),
    "nuslerp-columns": Case(
        "nuslerp", "nuslerp", POSITIVE[:2], {"nuslerp_flatten": False, "nuslerp_row_wise": True}, parameters={"by": "columns"},
        count=2, only=SHARED,
    ),
    "karcher": Case("karcher", "karcher", None, {"max_iter": 100, "tol": 1e-9}, zero=True, without=True),
    "model_stock": Case("model_stock", "model_stock", None, only=SHARED),
}  # fmt: skip
# Of one adapter, to see the masks.
MASKED = {
    "dare": Case("dare_linear", "", (1.0,), {"rescale": False}, {"density": 0.6}, count=1),
    "della": Case("della_linear", "", (1.0,), {"rescale": False}, {"density": 0.6, "epsilon": 0.3}, count=1),
}


def config(case: Case, folder: Path) -> dict[str, Any]:
    """The case as mergekit-yaml reads it."""
    base = str(folder / ("zero" if case.zero else "base"))
    adapted = [{"model": {"path": base}, "lora": {"path": str(folder / name)}} for name in "abc"[: case.count]]
    weights = [{"weight": weight} for weight in case.weights] if case.weights else [{}] * case.count
    models = [
        {"model": model, "parameters": {**case.per_adapter, **weight}} for model, weight in zip(adapted, weights, strict=True)
    ]
    first: Any = adapted[0] if case.theirs == "slerp" else base
    return {
        "merge_method": case.theirs, "models": models, "dtype": "float32", "parameters": dict(case.settings),
        **({} if case.without else {"base_model": first}),
    }  # fmt: skip


def base(path: Path, scale: float) -> None:
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    shapes: dict[str, tuple[int, ...]] = {**dict.fromkeys(tables, (VOCABULARY, WIDE)), "model.norm.weight": (WIDE,)}
    for layer in range(LAYERS):
        norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (WIDE,))
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in {**LINEAR, **norms}.items()}
    random = np.random.default_rng(7)
    path.mkdir()
    tensors = {name: (scale * random.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
    safetensors_file.write(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))


def trained(path: Path, modules: tuple[str, ...], seed: int, **settings: Any) -> None:
    """An adapter half of whose numbers are those of every other."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in modules]:
        out, into = LINEAR[name.partition(".")[2].split(".", 2)[2]]
        shapes |= {f"{name}.lora_A.weight": (settings["r"], into), f"{name}.lora_B.weight": (out, settings["r"])}

    def numbers(name: str, array: np.ndarray) -> np.ndarray:
        common, own_noise = np.random.default_rng(len(name)), np.random.default_rng([seed, len(name)])
        rows = common.normal(size=(5, max(array.shape)))[: settings["r"]]
        mixed: np.ndarray = (0.2 * ((rows if ".lora_A" in name else rows.T) + own_noise.normal(size=array.shape))).astype(
            np.float32
        )
        return mixed

    adapter(path, shapes, numbers, task_type="CAUSAL_LM", **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, adapters, and in `theirs/` what mergekit made of every case; made in one process."""
    if os.environ.get("ADAPTERHUB_REQUIRE_PEERS"):
        mergekit_env.create()
    python = mergekit_env.installed_python()
    if python is None:
        missing("mergekit", install="python -m tests.support.mergekit_env")
    root = tmp_path_factory.mktemp("mergekit")
    base(root / "base", 0.1)
    base(root / "zero", 0.0)
    for seed, (name, (modules, settings)) in enumerate(ADAPTERS.items()):
        trained(root / name, modules, seed, **settings)
    cases = {**CASES, **{f"masked-{name}": case for name, case in MASKED.items()}}
    jobs = [{"out": str(root / "theirs" / name), "config": config(case, root)} for name, case in cases.items()]
    mergekit_env.merge(python, jobs)
    return root


def read(folder: Path) -> dict[str, np.ndarray]:
    with SafetensorsFile(next(folder.glob("*.safetensors"))) as file:
        return {name: np.array(file.tensor(name)) for name in file.tensors}


def adapters(folder: Path, count: int = 3) -> list[Adapter]:
    return [peft.read(folder / name) for name in "abc"[:count]]


def assert_same(ours: Path, theirs: Path, start: Path, near: float, only: tuple[str, ...] = ()) -> None:
    """The tensors are the same up to `near` of the largest change, and some are changed."""
    our_tensors, their_tensors, before = read(ours), read(theirs), read(start)
    assert our_tensors.keys() == their_tensors.keys()
    names = [name for name in our_tensors if not only or name.removesuffix(".weight").endswith(only)]
    largest = max(np.abs(their_tensors[name] - before[name]).max() for name in names)
    assert largest > 0.1
    for name in names:
        np.testing.assert_allclose(our_tensors[name], their_tensors[name], rtol=0, atol=near * largest, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_merged_adapter_added_to_the_base_is_the_model_that_mergekit_makes(folder: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    start = folder / ("zero" if case.zero else "base")
    weights = case.weights or (1.0,) * case.count
    merged, report = combine(adapters(folder, case.count), weights, method=case.ours, parameters=case.parameters, rank=WIDE)
    assert report.error < 1e-6
    merge_into_base([(merged, 1.0)], start, tmp_path / "ours")
    assert_same(tmp_path / "ours", folder / "theirs" / name, start, case.near, case.only)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not METHODS[case.ours].on_factors])
def test_adapters_into_a_base_by_a_method_are_the_model_that_mergekit_makes(folder: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    start = folder / ("zero" if case.zero else "base")
    weights = case.weights or (1.0,) * case.count
    inputs = adapters(folder, case.count)
    joined = join(inputs, weights, method=case.ours, parameters=case.parameters)
    prepare_merge(list(zip(inputs, weights, strict=True)), start, join=joined).write(tmp_path / "ours")
    assert_same(tmp_path / "ours", folder / "theirs" / name, start, case.near, case.only)


def test_adapters_into_a_base_are_mergekits_task_arithmetic(folder: Path, tmp_path: Path) -> None:
    merge_into_base(list(zip(adapters(folder), MIXED, strict=True)), folder / "base", tmp_path / "ours")
    assert_same(tmp_path / "ours", folder / "theirs" / "task_arithmetic", folder / "base", 1e-6)


def masks(folder: Path, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every module that a changes: its delta, and what mergekit left of it."""
    masked, before = read(folder / "theirs" / f"masked-{name}"), read(folder / "base")
    [lora] = adapters(folder, 1)
    pairs = []
    for target, delta in lora.deltas.items():
        assert hasattr(delta, "lora_B")
        whole = (delta.scaling * delta.lora_B @ delta.lora_A).astype(np.float32)
        pairs.append((whole, masked[f"{target}.weight"] - before[f"{target}.weight"]))
    return pairs


@pytest.mark.parametrize("name", MASKED)
def test_elements_are_dropped_or_left_whole_before_they_are_scaled_up(folder: Path, name: str) -> None:
    for whole, pruned in masks(folder, name):
        np.testing.assert_allclose(pruned, np.where(pruned == 0, 0, whole), atol=1e-6)
        assert 0.5 < np.mean(pruned != 0) < 0.7


def test_della_keeps_elements_as_often_as_their_place_in_the_row_implies(folder: Path) -> None:
    likely = [(keep_probabilities(whole, 0.6, 0.3), pruned != 0) for whole, pruned in masks(folder, "della")]
    probabilities, is_kept = (np.concatenate([part.ravel() for part in parts]) for parts in zip(*likely, strict=True))
    for low, high in ((0.3, 0.45), (0.45, 0.6), (0.6, 0.75), (0.75, 0.9)):
        in_range = (probabilities >= low) & (probabilities < high)
        assert abs(is_kept[in_range].mean() - probabilities[in_range].mean()) < 3 * (0.25 / in_range.sum()) ** 0.5
