"""Experts as earlier versions of peft saved them: `convert` and `fix` bring them forward, and today's peft computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.checks.repair import fix
from adapterhub_converters import bases
from adapterhub_converters.adapter import Adapter, LowRank, Meta, StackedLowRank
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert
from adapterhub_converters.formats import peft as format_peft
from adapterhub_converters.formats.peft import earlier_versions, stacks, target_parameters
from tests.conftest import need_module
from tests.converters import test_stacks as today

R, ALPHA = 2, 6
# Versions with the three layouts, and whether each has the factors of a base's experts swapped.
LAYOUTS = {
    "0.18.1": {"Qwen3Moe": True, "Jamba": True, "GptOss": False, "Llama4Text": False},
    "0.19.0": {"Qwen3Moe": True, "Jamba": True, "GptOss": True, "Llama4Text": False},
    "0.21.2": {"Qwen3Moe": False, "Jamba": False, "GptOss": False, "Llama4Text": True},
}
LATEST = LAYOUTS["0.21.2"]
OTHERS: dict[str, dict[str, Any]] = {
    "GptOss": {"num_local_experts": 4, "intermediate_size": 8, "head_dim": 8},
    "Llama4Text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 8, "intermediate_size_mlp": 24, "head_dim": 8,
    },
}  # fmt: skip


def model(name: str) -> Any:
    import torch
    import transformers

    if name not in OTHERS:
        return today.model(name)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**today.SIZES | OTHERS[name])
    return getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)


def merged(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The weights of a model with an adapter merged by peft."""
    import peft

    state_dict = peft.PeftModel.from_pretrained(model(name), str(folder)).merge_and_unload().state_dict()
    return {key: tensor.numpy() for key, tensor in state_dict.items()}


def in_layout(name: str, version: str, folder: Path) -> dict[str, np.ndarray]:
    """An adapter on the experts of a model as a version of peft saved it; returns the weights with its deltas."""
    rng, turned = np.random.default_rng(0), LAYOUTS[version][name]
    transposed = name in OTHERS  # the base stores (experts, in, out)
    deltas, expected = dict[str, StackedLowRank](), {key: t.numpy().copy() for key, t in model(name).state_dict().items()}
    for key in [key for key in expected if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, first, second = expected[key].shape
        out, into = (second, first) if transposed else (first, second)
        delta = StackedLowRank(normal(rng, (count, R, into)), normal(rng, (count, out, R)), ALPHA, transposed_base=transposed)
        product = delta.scaling * delta.lora_B @ delta.lora_A
        expected[key] += product.swapaxes(1, 2) if transposed else product
        deltas[key] = delta
    names = target_parameters.wrapper_names_by_target([*deltas])
    tensors = {}
    for target, delta in deltas.items():
        factors = zip("AB", target_parameters.file_factors(delta, is_swapped=turned), strict=True)
        tensors |= {f"base_model.model.{names[target]}.lora_{half}.weight": array for half, array in factors}
    config = {
        "peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": [], "peft_version": version,
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    save(folder, config, tensors)
    return expected


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def save(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    json_file.write_text(folder / format_peft.CONFIG, json.dumps(config))
    safetensors_file.write(folder / format_peft.WEIGHTS, tensors, {"format": "pt"})


def same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for key, array in expected.items():
        np.testing.assert_allclose(actual[key], array, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", LATEST)
@pytest.mark.parametrize("version", LAYOUTS)
def test_each_layout_is_brought_forward(name: str, version: str, tmp_path: Path) -> None:
    need_module("peft")
    expected = in_layout(name, version, tmp_path / "a")
    model(name).save_pretrained(tmp_path / "base")
    base = bases.read_hf(tmp_path / "base")
    old = LAYOUTS[version][name] != LATEST[name]
    report = checks.check(tmp_path / "a", base=base)
    assert ("old-experts" in report.counted()) == old
    assert report.verdicts["peft"].verdict == ("refused" if old else "applied")
    convert.convert(tmp_path / "a", tmp_path / "alone", to="peft")  # the shapes of the two parameters tell the layout
    convert.convert(tmp_path / "a", tmp_path / "b", to="peft", base=base)
    for path in ("alone", "b"):
        same(merged(name, tmp_path / path), expected)
        assert "old-experts" not in checks.check(tmp_path / path, base=base).counted()
    if old:
        fixed = fix(tmp_path / "a", tmp_path / "f", base=base)
        assert [repair.code for repair in fixed.repairs if repair.code == "old-experts"]
        same(merged(name, tmp_path / "f"), expected)
        assert json.loads((tmp_path / "f" / format_peft.CONFIG).read_text())["target_parameters"]
    else:
        assert same_files(tmp_path / "a", tmp_path / "b")


def same_files(first: Path, second: Path) -> bool:
    return all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in (format_peft.CONFIG, format_peft.WEIGHTS)
    )


def one_by_one(name: str, folder: Path, **changes: Any) -> dict[str, np.ndarray]:
    """An adapter with every expert by itself, as made with transformers 4; returns the weights with its deltas."""
    dialect = earlier_versions.MAPPED.get({"Mixtral": "mixtral"}.get(name, ""), ("gate_proj", "up_proj", "down_proj"))
    rng, deltas = np.random.default_rng(0), dict[str, Any]()
    expected = {key: tensor.numpy().copy() for key, tensor in model(name).state_dict().items()}
    rslora, patterns = bool(changes.get("use_rslora")), changes.get("rank_pattern", {})
    for key, array in expected.items():
        if key.endswith("self_attn.q_proj.weight"):
            add(deltas, key.removesuffix(".weight"), array, rng, rslora=rslora)
        if key.endswith("experts.gate_up_proj"):
            place = key.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0] + f".{today.MODELS[name][1]}.experts"
            inner, down = array.shape[1] // 2, expected[key.replace("gate_up_proj", "down_proj")]
            for expert in range(len(array)):
                views = (array[expert, :inner], array[expert, inner:], down[expert])
                for part, view in zip(dialect, views, strict=True):
                    if part not in changes.get("without", ()):
                        add(deltas, f"{place}.{expert}.{part}", view, rng, r=patterns.get(part, R), rslora=rslora)
        if key.endswith(tuple(f"{suffix}.weight" for suffix in changes.get("taken", ()))) and "experts" not in key:
            add(deltas, key.removesuffix(".weight"), array, rng)
    targets = sorted({target.rpartition(".")[2] for target in deltas})
    config = {
        "peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": targets, "peft_version": "0.17.1",
        "rank_pattern": patterns, "use_rslora": rslora, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    tensors = format_peft.state_dict(Adapter(deltas, meta=Meta(task_type="CAUSAL_LM")))
    save(folder, config, tensors)
    return expected


def add(
    deltas: dict[str, Any], target: str, view: np.ndarray, rng: np.random.Generator, r: int = R, rslora: bool = False
) -> None:
    """Give a module a pair, and add it to its weight."""
    low = LowRank(normal(rng, (r, view.shape[1])), normal(rng, (view.shape[0], r)), ALPHA, rslora)
    view += low.scaling * low.lora_B @ low.lora_A
    deltas[target] = low


# What makes peft 0.21.2 do something else than apply a file with experts one by one, and its verdict.
LISTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a model that peft maps": ("Qwen3Moe", {}, "applied"),
    "Mixtral": ("Mixtral", {}, "applied"),
    "a model that peft does not map": ("Phimoe", {}, "ignored"),
    "Qwen2-MoE": ("Qwen2Moe", {}, "ignored"),
    "Jamba": ("Jamba", {}, "ignored"),
    "another rank": ("Qwen3Moe", {"rank_pattern": {"gate_proj": 1}}, "refused"),
    "another rank that peft finds": ("Qwen3Moe", {"rank_pattern": {"down_proj": 1}}, "applied"),
    "gate alone": ("Olmoe", {"without": ("up_proj",)}, "refused"),
    "a dense layer's": ("Glm4Moe", {"taken": ("gate_proj", "up_proj", "down_proj")}, "ignored"),
    "rsLoRA": ("Qwen3Moe", {"use_rslora": True}, "wrong"),
}


@pytest.mark.parametrize("case", LISTED)
def test_experts_one_by_one_are_stacked_only_where_peft_does_not_do_it_right(case: str, tmp_path: Path) -> None:
    need_module("peft")
    name, changes, verdict = LISTED[case]
    expected = one_by_one(name, tmp_path / "a", **changes)
    model(name).save_pretrained(tmp_path / "base")
    base = bases.read_hf(tmp_path / "base")
    assert checks.check(tmp_path / "a", base=base).verdicts["peft"].verdict == verdict
    if verdict != "applied":
        assert not peft_is_right(name, tmp_path / "a", expected)
    convert.convert(tmp_path / "a", tmp_path / "b", to="peft", base=base)
    assert same_files(tmp_path / "a", tmp_path / "b") == (verdict == "applied")
    same(merged(name, tmp_path / "b"), expected)
    if verdict != "applied":
        fix(tmp_path / "a", tmp_path / "f", base=base)
        same(merged(name, tmp_path / "f"), expected)


def peft_is_right(name: str, folder: Path, expected: dict[str, np.ndarray]) -> bool:
    try:
        same(merged(name, folder), expected)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


def test_dora_of_experts_is_refused_and_proposed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    target = "model.layers.0.mlp.experts.0.up_proj"
    low = LowRank(normal(rng, (R, 8)), normal(rng, (4, R)), ALPHA, magnitude=np.ones(4, np.float32))
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "use_dora": True, "target_modules": ["up_proj"]}
    save(tmp_path / "a", config, format_peft.state_dict(Adapter({target: low})))
    base = bases.BaseSpec("a base", "hf", "Qwen2MoeForCausalLM", "qwen2_moe", {"num_experts": 1})
    with pytest.raises(RefusedError, match="an expert with more than a pair"):
        convert.convert(tmp_path / "a", tmp_path / "b", to="peft", base=base)
    assert not (tmp_path / "b").exists()
    result = fix(tmp_path / "a", tmp_path / "f", base=base)
    assert "old-experts" in {proposal.code for proposal in result.proposals}


def test_the_models_that_peft_maps_are_those_of_its_tables() -> None:
    need_module("peft")
    from peft.utils import transformers_weight_conversion as own

    names = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}
    known_renames = {kind: names[like] for kind, like in own._MODEL_TO_CONVERSION_PATTERN.items() if like in names}
    assert {kind: known_renames[kind] for kind in known_renames if kind in stacks.STACKING} == earlier_versions.MAPPED
