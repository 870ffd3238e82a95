"""mlx-lm's names of modules: each row is what mlx-lm makes of a config, and it loads and computes what is written by them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert
from adapterhub_converters.formats.mlx import module_names as mlx_names
from tests.conftest import need_module
from tests.support import mlx_models, tiny

pytestmark = pytest.mark.peer

_RARE = {"per_layer_input_gate", "per_layer_projection"}


def found_in(kind: str, **changes: Any) -> tuple[set[str], set[str], set[str], set[str]]:
    """The paths of linear modules and of stacks within a layer of mlx-lm's model, the lists of layers, and other modules."""
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import SwitchLinear

    linear, stacks, lists, other_modules = set[str](), set[str](), set[str](), set[str]()
    for name, module in mlx_models.model(kind, **changes).named_modules():
        inside = re.fullmatch(r"(.*?\.(?:layers|h))\.\d+\.(.+)", name)
        if inside and isinstance(module, nn.Linear):
            linear.add(inside[2])
            lists.add(inside[1])
        elif inside and isinstance(module, SwitchLinear):
            stacks.add(inside[2].rpartition(".")[0])
        elif isinstance(module, nn.Linear | nn.Embedding):
            other_modules.add(name)
    return linear, stacks, lists, other_modules


@pytest.mark.parametrize("kind", [kind for row in mlx_names.ROWS for kind in row.types.split()])
def test_each_row_is_what_mlx_lm_makes_of_a_config(kind: str) -> None:
    need_module("mlx_lm")
    row = mlx_names.rows()[kind]
    linear, stacks, lists, other_modules = found_in(kind)
    assert lists == {row.layers}
    assert linear <= set(row.paths)
    assert {row.experts} <= {*stacks, ""}
    assert row.table in other_modules
    assert row.head in other_modules or not any("head" in name for name in other_modules)


def test_the_paths_of_a_row_are_all_of_some_model_of_it() -> None:
    need_module("mlx_lm")
    for row in mlx_names.ROWS:
        linear_paths = set[str]().union(*(found_in(kind)[0] for kind in row.types.split()))
        if {"self_attn.q_proj", "self_attn.q_a_proj"} <= set(
            row.paths
        ):  # without a rank of queries there is a q_proj in its place
            linear_paths |= found_in(row.types.split()[0], q_lora_rank=None)[0]
        assert set(row.paths) - _RARE <= linear_paths, (row.types, set(row.paths) - linear_paths)


def test_every_type_is_one_of_mlx_lms() -> None:
    need_module("mlx_lm")
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING

    model_types = {path.stem for path in Path(next(iter(mlx_lm.models.__path__))).glob("*.py")}
    assert all(MODEL_REMAPPING.get(kind, kind) in model_types for row in mlx_names.ROWS for kind in row.types.split())


EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# Models whose names in mlx-lm differ from those in memory, with what peft trains of them.
TRAINED: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"target_modules": ["q_proj"], **EXPERTS},
    "MiniMaxM2ForCausalLM": {"target_modules": ["o_proj"], **EXPERTS},
    "GraniteMoeForCausalLM": {"target_modules": ["q_proj"], **EXPERTS},
    "Glm4MoeForCausalLM": {"target_modules": ["q_proj"], **EXPERTS},
    "Qwen3_5MoeForConditionalGeneration": {"target_modules": ["q_proj", "in_proj_qkv", "out_proj"], **EXPERTS},
    "Qwen3VLForConditionalGeneration": {"target_modules": r".*language_model.*\.(q_proj|up_proj)"},
    "Qwen2_5_VLForConditionalGeneration": {"target_modules": r".*language_model.*\.(q_proj|up_proj)"},
    "Gemma3ForConditionalGeneration": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "Mistral3ForConditionalGeneration": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "NemotronHForCausalLM": {"target_modules": ["in_proj", "q_proj"]},
    "GlmForCausalLM": {"target_modules": ["gate_up_proj", "down_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_mlx_lm_adds_what_peft_adds(name: str, tmp_path: Path) -> None:
    for module in ("mlx_lm", "peft"):
        need_module(module)
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    base = saved(tiny.model(name), tmp_path / "base")
    wrapped = tiny.adapter(tiny.model(name), tmp_path / "a", **TRAINED[name])
    merged = saved(wrapped.merge_and_unload(), tmp_path / "merged")
    convert.convert(tmp_path / "a", tmp_path / "mlx", to="mlx", base=read_base(base))
    tokens = mx.array([[3, 17, 99, 5, 64, 23]])
    before, merged_logits = (np.array(loaded(path)(tokens)) for path in (base, merged))
    model = loaded(base)
    mlx_logits = np.array(load_adapters(model, str(tmp_path / "mlx"))(tokens))
    assert np.abs(merged_logits - before).max() > 0.1
    assert np.abs(mlx_logits - merged_logits).max() < 2e-3 * np.abs(merged_logits - before).max()
    again = convert.read(tmp_path / "mlx", base=read_base(base))
    assert len(again.deltas) >= len(convert.read(tmp_path / "a", base=read_base(base)).deltas)


def saved(model: Any, folder: Path) -> Path:
    """A folder of a model with the keys of before transformers 5, which mlx-lm wants."""
    model.save_pretrained(folder, save_original_format=type(model).__name__ not in FUSED)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        rope = part.get("rope_parameters") or {}
        part["rope_theta"] = rope.get("rope_theta", 10_000.0)
        part |= {key: value for key, value in MISSING.items() if key not in part}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MISSING = {
    "num_local_experts": 4, "shared_intermediate_size": 96, "partial_rotary_factor": 1.0, "rope_scaling": None,
    "full_attention_interval": 2, "vocab_size": 128, "sliding_window_pattern": 2,
}  # fmt: skip
FUSED = {"Qwen3_5MoeForConditionalGeneration"}  # whose experts mlx-lm reads in stacks alone


def loaded(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    return load_model(folder)[0]


REFUSED = {
    "Glm4MoeForCausalLM": ("mlp.gate.weight", "mlp.gate"),
    "DeepseekV3ForCausalLM": ("kv_b_proj", "kv_b_proj"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_lm_refuses_is_refused_beforehand(name: str, tmp_path: Path) -> None:
    need_module("peft")
    trained, module = REFUSED[name]
    base = saved(tiny.model(name), tmp_path / "base")
    key = "target_parameters" if trained.endswith(".weight") else "target_modules"
    config: dict[str, Any] = {"target_modules": ["o_proj"], key: [trained]}
    tiny.adapter(tiny.model(name), tmp_path / "a", **config)
    with pytest.raises(RefusedError, match=f"{module}: not a module that mlx-lm is known to have"):
        convert.convert(tmp_path / "a", tmp_path / "mlx", to="mlx", base=read_base(base))
    assert checks.check(tmp_path / "a", base=read_base(base)).verdicts["mlx"].verdict == "refused"


def test_a_model_type_that_mlx_lm_does_not_have_is_refused(tmp_path: Path) -> None:
    need_module("peft")
    base = saved(tiny.model("BloomForCausalLM"), tmp_path / "base")
    tiny.adapter(tiny.model("BloomForCausalLM"), tmp_path / "a", target_modules=["query_key_value"])
    with pytest.raises(RefusedError, match="no model type bloom"):
        convert.convert(tmp_path / "a", tmp_path / "mlx", to="mlx", base=read_base(base))
