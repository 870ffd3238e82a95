"""Files that were found to break a command, each refused or reported in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_file, safetensors_header
from adapterhub_converters.formats import peft
from tests.conftest import Run
from tests.fuzz.fuzz_commands import Tensors, st
from tests.support.folders import adapter, base, pairs

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def folder(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir()
    (path / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **config}))
    (path / peft.WEIGHTS).write_bytes(st(tensors))
    return path


@pytest.mark.parametrize("kind", ["lora_A", "hada_w1_a", "lokr_w1", "vera_lambda_d"])
def test_tensors_of_another_kind_of_adapter_in_one_that_names_none(run: Run, tmp_path: Path, kind: str) -> None:
    folder(tmp_path / "a", {f"{Q}.{kind}": ("F32", (2, 8))}, peft_type="LOHA " + kind)
    assert "cannot check: peft_type" in run("validate", "a", "--strict", code=1).stdout


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({f"{Q}.lora_A.weight": ("F32", (2**62, 0))}, {}, "has a shape that is too large"),
        ({f"{Q}.lora_A.weight": ("F32", (0, 2**60, 2**60))}, {}, "has a shape that is too large"),
        ({f"{Q}.lokr_w1": ("F32", (2,)), f"{Q}.lokr_w2": ("F32", (2, 2))}, {"peft_type": "LOKR"}, "do not make a LOKR delta"),
        (
            {f"{Q}.lokr_w1": ("F32", (2, 2, 1)), f"{Q}.lokr_w2": ("F32", (2, 2))},
            {"peft_type": "LOKR"},
            "do not make a LOKR delta",
        ),
        (
            {"base_model.model.embed.token_adapter.trainable_tokens_delta": ("F32", ())},
            {"trainable_token_indices": {"embed": [1]}},
            "does not match any embedding table",
        ),
    ],
)
def test_shapes_that_make_no_adapter(run: Run, tmp_path: Path, tensors: Tensors, config: dict[str, Any], says: str) -> None:
    folder(tmp_path / "a", tensors, **config)
    for command in (["diff", "a", "a"], ["convert", "a", "b", "--to", "raw"]):
        assert says in run(*command, code=4).stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "text",
    ['{"peft_type": "LORA\\ud800"}', '{"peft_type": "LORA", "r": 1e400}', '{"peft_type": "LORA", "r": 1' + "0" * 400 + "}"],
)
def test_json_that_no_json_can_repeat(run: Run, tmp_path: Path, text: str) -> None:
    (adapter(tmp_path / "a", pairs(2)) / peft.CONFIG).write_text(text)
    for command in (["fix", "a"], ["diff", "a", "a"], ["convert", "a", "b", "--to", "gguf"]):
        assert "not valid JSON" in run(*command, code=4).stderr


def test_an_escaped_pair_of_surrogates_is_a_character(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2), base_model_name_or_path="org/😀")
    assert "\\ud83d" in (tmp_path / "a" / peft.CONFIG).read_text()
    run("validate", "a")


@pytest.mark.parametrize("name", ["a\0b.safetensors", "a\nb.safetensors", "a\x1b[31m.safetensors"])
def test_shards_whose_names_no_file_has(run: Run, tmp_path: Path, name: str) -> None:
    adapter(tmp_path / "a", pairs(2))
    base(tmp_path / "base")
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    assert "not a plain file name" in run("validate", "a", "--base", "base", code=4).stderr
    (tmp_path / "a" / peft.WEIGHTS).unlink()
    (tmp_path / "a" / peft.INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    assert "not a plain file name" in run("diff", "a", "a", code=4).stderr


@pytest.mark.parametrize(
    "numbers", [{"first_k_dense_replace": 1e308, "num_hidden_layers": 2000}, {"mlp_only_layers": list(range(200_000))}]
)
def test_configs_of_absurd_layers(run: Run, tmp_path: Path, numbers: dict[str, Any]) -> None:
    adapter(tmp_path / "a", pairs(2))
    (tmp_path / "base").mkdir()
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 2000, "hidden_size": 8,
        "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9, "num_experts": 2, "moe_intermediate_size": 4,
    }  # fmt: skip
    (tmp_path / "base/config.json").write_text(json.dumps({**config, **numbers}))
    run("validate", "a", "--base", "base", code=None)


@pytest.mark.parametrize(
    ("architecture", "tensors"),
    [
        ("deepseek2", {"blk.0.attn_k_b.weight": (8, 8), "blk.0.attn_v_b.weight": (2, 4, 4)}),
        ("deepseek2", {"blk.0.attn_k_b.weight": (2, 4, 4), "blk.0.attn_v_b.weight": (4,)}),
        ("gpt-oss", {"blk.0.ffn_gate_exps.weight": (8,), "blk.0.ffn_up_exps.weight": (2, 8, 8)}),
        ("gpt-oss", {"blk.0.ffn_gate_exps.weight": (2, 8, 8), "blk.0.ffn_up_exps.weight": (3, 8, 8)}),
        ("phi3", {"blk.0.ffn_gate.weight": (), "blk.0.ffn_up.weight": (8, 8)}),
        ("qwen3moe", {"blk.0.ffn_gate_exps.weight": (10**12, 8, 0)}),
    ],
)
def test_ggufs_whose_parts_do_not_fit(run: Run, tmp_path: Path, architecture: str, tensors: dict[str, tuple[int, ...]]) -> None:
    header = gguf_output.header_bytes(
        {"general.architecture": gguf_types.string_value(architecture)},
        [(name, "F32", shape) for name, shape in tensors.items()],
    )
    sizes = [4 * int(np.prod(shape, dtype=object)) for shape in tensors.values()]
    (tmp_path / "x.gguf").write_bytes(header + b"".join(bytes(-(-size // 32) * 32) for size in sizes))
    assert next(iter(tensors)) in json.loads(run("base", "show", "x.gguf", "--json").stdout)["tensors"]


def test_a_stack_of_more_experts_than_there_can_be_stays_as_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(
        json.dumps({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"})
    )
    name = "model.layers.0.mlp.experts.down_proj"
    raw = safetensors_header.header_bytes([(name, "F32", (10**12, 8, 0))], {})
    (tmp_path / "base/model.safetensors").write_bytes(raw)
    adapter(tmp_path / "a", pairs(2))
    run("validate", "a", "--base", "base", code=1)
    assert name in run("base", "show", "base", "--json").stdout


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gguf_with_numbers_that_are_not_finite(run: Run, tmp_path: Path, value: float) -> None:
    metadata = {"general.architecture": gguf_types.string_value("llama"), "llama.rope.freq_base": gguf_types.f32_value(value)}
    gguf_output.write(tmp_path / "x.gguf", metadata, {"blk.0.attn_q.weight": np.ones((8, 8), np.float32)})
    assert f"llama.rope.freq_base is {value}" in run("base", "show", "x.gguf", code=4).stderr


def test_module_paths_with_digits_that_are_no_numbers_are_sorted(run: Run, tmp_path: Path) -> None:
    adapter(
        tmp_path / "a", pairs(2, module="model.²layers.{}.q_proj") | pairs(1, module="model.².{}.v_proj"), target_modules=["x"]
    )
    assert "²" in run("validate", "a", code=1).stdout


def test_a_base_that_must_be_a_folder_and_a_file_that_must_be_one(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    gguf_output.write(
        tmp_path / "x.gguf",
        {"general.architecture": gguf_types.string_value("llama")},
        {"blk.0.attn_q.weight": np.ones((8, 8), np.float32)},
    )
    assert "Name the base's folder" in run("show", "a", "--base", "x.gguf", code=6).stderr
    assert "Name the .gguf file" in run("convert", "a", "b", "--to", "hf", code=2).stderr


def test_complex_numbers_are_not_made_real(run: Run, tmp_path: Path) -> None:
    folder(tmp_path / "a", {f"{Q}.lora_A.weight": ("C64", (2, 8)), f"{Q}.lora_B.weight": ("F32", (8, 2))})
    for command in (["diff", "a", "a"], ["convert", "a", "b", "--to", "gguf"], ["show", "a", "--base", "a"]):
        result = run(*command, code=None)
        assert result.returncode in (3, 4)
    assert "C64 is not supported in computations" in run("diff", "a", "a", code=4).stderr


def test_ranks_of_tensors_without_dimensions_are_not_repaired(run: Run, tmp_path: Path) -> None:
    folder(tmp_path / "a", {f"{Q}.lora_A.weight": ("F32", ()), f"{Q}.lora_B.weight": ("F32", (8, 2))}, rank_pattern={"x": 2})
    assert "bug" not in run("fix", "a", "--dry-run", code=None).stderr


def test_numbers_that_overflow_are_no_warnings_and_no_norms(run: Run, tmp_path: Path) -> None:
    shapes = pairs(2)
    adapter(tmp_path / "a", shapes, lambda _, array: np.full_like(array, 3e38))
    base(tmp_path / "base")
    weight = "model.layers.0.self_attn.q_proj.weight"
    safetensors_file.write(tmp_path / "base/model.safetensors", {weight: np.full((8, 8), np.nan, np.float32)})
    result = run("show", "a", "--base", "base", "--json")
    assert result.stderr == ""
    assert json.loads(result.stdout, parse_constant=lambda _: pytest.fail("NaN is no JSON"))
    assert "NaN or Inf" in result.stdout
    result = run("diff", "a", "a", "--json", code=None)
    assert "Warning" not in result.stderr


def test_pissa_on_weights_of_any_size(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(1), init_lora_weights="pissa")
    base(tmp_path / "base", 1)
    weight = "model.layers.0.self_attn.q_proj.weight"
    for largest, code in ((1e-40, 0), (1e30, 0), (3e38, 6)):
        values = np.full((8, 8), largest, np.float32)
        safetensors_file.write(tmp_path / "base/model.safetensors", {weight: values})
        result = run("convert", "a", f"o{largest}", "--to", "mlx", "--base", "base", code=code)
        assert (tmp_path / f"o{largest}").exists() == (code == 0)
        assert code == 0 or "too large for float32" in result.stderr
