"""What a check makes of an adapter that is more than pairs of matrices: experts, copies of tables, trainers' names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from adapterhub.checks import check
from adapterhub_converters.bases import BaseTensor
from tests.support import folders

UP, DOWN = "model.layers.0.mlp.experts.base_layer", "model.layers.0.mlp.experts"
EXPERTS = {
    f"{UP}.lora_A.weight": (8, 8), f"{UP}.lora_B.weight": (12, 8),
    f"{DOWN}.lora_A.weight": (8, 6), f"{DOWN}.lora_B.weight": (8, 8),
}  # fmt: skip
TARGETS: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "target_modules": []}
EMBEDDING = "model.embed_tokens"


def codes(path: Path, base: object = None) -> set[str]:
    report = check(path, base=base)  # type: ignore[arg-type]
    return {problem.code for problem in report.problems} - {"unpinned"}


@pytest.mark.parametrize("shape", [(4, 12, 8), (4, 8, 12), (3, 12, 8)])
def test_stacked_experts_fit_a_base_that_has_as_many(tmp_path: Path, shape: tuple[int, ...]) -> None:
    adapter = folders.adapter(tmp_path / "a", EXPERTS, **TARGETS)
    base = folders.base(tmp_path / "base", layers=1)
    stacks = {f"{DOWN}.gate_up_proj": BaseTensor(shape, "F32"), f"{DOWN}.down_proj": BaseTensor((4, 8, 6), "F32")}
    fits = codes(adapter, dataclasses.replace(base, tensors={**base.tensors, **stacks}))
    assert ("shape-mismatch" in fits) == (shape[0] != 4)
    verdicts = check(adapter).verdicts
    assert (verdicts["llama.cpp"].verdict, verdicts["llama.cpp"].convert_to) == ("applied", "gguf")
    assert verdicts["peft"].verdict == "applied"


@pytest.mark.parametrize(("rows", "expected_codes"), [(12, set()), (14, {"vocab-differs"})])
def test_the_copy_of_a_table_must_be_as_large_as_the_bases(tmp_path: Path, rows: int, expected_codes: set[str]) -> None:
    shapes = {f"{EMBEDDING}.lora_embedding_A": (2, 12), f"{EMBEDDING}.lora_embedding_B": (8, 2)}
    shapes[f"{EMBEDDING}.base_layer.weight"] = (rows, 8)
    adapter = folders.adapter(tmp_path / "a", shapes, target_modules=["embed_tokens"])
    assert codes(adapter, folders.base(tmp_path / "base", tied=False)) == expected_codes


@pytest.mark.parametrize(
    "name",
    ["model.l.q.lora_{}.sql.weight", "_orig_mod.model.l.q.lora_{}.weight", "base_model.model.model.l.q.lora_{}.weight"],
)
def test_names_that_peft_would_skip_are_an_error(tmp_path: Path, name: str) -> None:
    adapter = folders.adapter(tmp_path / "a", {name.format("A"): (2, 8), name.format("B"): (8, 2)})
    assert codes(adapter) == {"key-prefix"}


def test_the_usual_name_of_an_adapter_inside_is_a_warning_since_peft_loads_it(tmp_path: Path) -> None:
    name = "model.l.q.lora_{}.default.weight"
    adapter = folders.adapter(tmp_path / "a", {name.format("A"): (2, 8), name.format("B"): (8, 2)})
    report = check(adapter)
    assert (report.ok, {problem.code for problem in report.problems}) == (True, {"adapter-name"})
    assert {runtime: report.verdicts[runtime].verdict for runtime in ("peft", "vllm")} == {"peft": "applied", "vllm": "refused"}


VERA = {"model.layers.0.self_attn.q_proj.vera_lambda_b": (8,), "model.layers.0.self_attn.q_proj.vera_lambda_d": (2,)}


def test_vera_fits_where_the_base_is_as_large_and_needs_its_projections(tmp_path: Path) -> None:
    adapter = folders.adapter(tmp_path / "a", VERA, peft_type="VERA", save_projection=False)
    assert codes(adapter) == {"not-understood"}
    adapter = folders.vera(tmp_path / "b", {"model.layers.0.self_attn.q_proj": 8}, (8, 8))
    assert codes(adapter) == codes(adapter, folders.base(tmp_path / "base", layers=1)) == set()
    assert codes(adapter, folders.base(tmp_path / "larger", layers=1, size=16)) == {"shape-mismatch"}
