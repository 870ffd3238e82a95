"""Where an adapter acts: numbers against dense matrices, the picture on a terminal, the PNG."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from adapterhub.analysis.low_rank import norm_cost
from adapterhub.analysis.norms import build_heat_map, estimated_seconds
from adapterhub_converters.adapter import Adapter, Hadamard, Kronecker, LowRank, StackedLowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import convert, peft
from tests.cli.test_commands import document
from tests.cli.test_process import PATH
from tests.conftest import Run, Terminal, need_module
from tests.support.folders import adapter, base, pairs

RNG = np.random.default_rng(0)
Q, MLP = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.up_proj"


def linear() -> LowRank:
    return LowRank(RNG.normal(size=(2, 5)).astype(np.float32), RNG.normal(size=(4, 2)).astype(np.float32), 6.0)


def dense(delta: LowRank | StackedLowRank) -> float:
    return float(np.linalg.norm(delta.scaling * (delta.lora_B.astype(float) @ delta.lora_A.astype(float))))


def test_norms_by_layer_and_kind() -> None:
    deltas = {Q.format(n): linear() for n in (0, 2, 10)} | {MLP.format(2): linear(), "lm_head": linear()}
    heat_map = build_heat_map(Adapter(deltas))
    assert (heat_map.layers, heat_map.kinds, heat_map.short_kinds) == (
        ("0", "2", "10"), ("self_attn.q_proj", "mlp.up_proj"), ("q", "up"),
    )  # fmt: skip
    assert heat_map.values[0] == (pytest.approx(dense(deltas[Q.format(0)])), None)
    assert heat_map.values[1][1] == pytest.approx(dense(deltas[MLP.format(2)]))
    assert heat_map.others == {"lm_head": pytest.approx(dense(deltas["lm_head"]))}


def test_kinds_are_shown_without_the_beginning_that_all_of_them_have() -> None:
    block = "down_blocks.0.attentions.1.transformer_blocks.0"
    deltas = {f"{block}.{attention}.{part}": linear() for attention in ("attn1", "attn2") for part in ("to_q", "to_out.0")}
    assert build_heat_map(Adapter(deltas)).short_kinds == ("attn1.to_out", "attn1.to_q", "attn2.to_out", "attn2.to_q")


def test_experts_of_a_layer_are_one_number_stacked_or_apart() -> None:
    experts = [linear() for _ in range(3)]
    apart = build_heat_map(Adapter({f"model.layers.0.mlp.experts.{n}.up_proj": delta for n, delta in enumerate(experts)}))
    stack = StackedLowRank(np.stack([d.lora_A for d in experts]), np.stack([d.lora_B for d in experts]), 6.0)
    together = build_heat_map(Adapter({"model.layers.0.mlp.experts.up_proj": stack}))
    assert apart.kinds == ("mlp.experts.*.up_proj",)
    assert apart.values[0][0] == pytest.approx(together.values[0][0])
    assert together.values[0][0] == pytest.approx(dense(stack))


def test_two_stacks_of_layers_are_distinguished_and_a_nan_is_left_out() -> None:
    bad = linear()
    bad.lora_A[0, 0] = np.nan
    heat_map = build_heat_map(Adapter({"encoder.layers.0.q_proj": linear(), "decoder.layers.0.q_proj": linear(), "x": bad}))
    assert heat_map.layers == ("encoder.layers.0", "decoder.layers.0")
    assert set(heat_map.left_out) == {"x"}


def test_folding_takes_means_of_neighbors() -> None:
    heat_map = build_heat_map(Adapter({Q.format(n): linear() for n in range(5)}))
    folded = heat_map.fold(3)
    assert folded.layers == ("0-1", "2-3", "4")
    assert folded.values[0][0] == pytest.approx(sum(row[0] or 0 for row in heat_map.values[:2]) / 2)
    assert heat_map.fold(5) is heat_map


def test_norms_over_those_of_the_base(tmp_path: Path) -> None:
    base(tmp_path / "base", 2)
    path = adapter(tmp_path / "a", pairs(2))
    zeros = build_heat_map(convert.read(path), base=tmp_path / "base")
    assert (zeros.layers, len(zeros.left_out)) == ((), 2)
    weights = {f"{Q.format(n)}.weight": np.full((8, 8), n + 1, np.float32) for n in (0, 1)}
    safetensors_file.write(tmp_path / "base/model.safetensors", weights)
    over, plain = build_heat_map(convert.read(path), base=tmp_path / "base"), build_heat_map(convert.read(path))
    assert over.relative
    assert [row[0] for row in over.values] == [pytest.approx(row[0] / 8 / n) for n, row in enumerate(plain.values, 1) if row[0]]


def test_show_has_numbers_for_programs_and_pipes(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(60) | pairs(60, module=MLP))
    norms_document = document(run, "show", "a")["norms"]
    assert (len(norms_document["layers"]), norms_document["missing"], norms_document["relative"]) == (60, None, False)
    stdout = run("show", "a").stdout
    assert len([line for line in stdout.splitlines() if line[:1].isdigit()]) == 60
    assert "\x1b" not in stdout
    assert "norms" not in document(run, "show", "a", "--headers-only")
    run("push", "a", "team/a")
    assert document(run, "show", "team/a")["norms"] == norms_document


def test_show_draws_on_a_terminal(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [f"model.layers.{{}}.a_rather_long_name_of_a_block.module_number_{n}" for n in range(14)]
    adapter(tmp_path / "a", pairs(60) | {name: shape for kind in kinds for name, shape in pairs(60, module=kind).items()})
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38;5;" in terminal("show", "a")
    monkeypatch.setenv("NO_COLOR", "1")
    screen = terminal("show", "a")
    assert "\x1b" not in screen
    assert "█" in screen
    assert "a row is the mean of 2 layers" in screen
    picture = screen[screen.index("layer ") :].partition("FILE")[0].splitlines()
    assert all(len(line) <= 80 for line in picture)
    assert len(picture) < 50
    assert "█" not in terminal("show", "a", first="import sys; sys.stdout.reconfigure(encoding='latin-1')")


def large(path: Path, *, r: int, width: int) -> Path:
    """An adapter of one module whose zeros take no space on the disk."""
    path.mkdir()
    sizes = {"A": (r, width), "B": (width, r)}
    header = {
        f"base_model.model.{Q.format(0)}.lora_{part}.weight": {
            "dtype": "F32", "shape": shape, "data_offsets": [number * r * width * 4, (number + 1) * r * width * 4],
        }
        for number, (part, shape) in enumerate(sizes.items())
    }  # fmt: skip
    text = json.dumps(header).encode()
    with open(path / "adapter_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * r * width * 4)
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["q_proj"]})
    )
    return path


def test_work_is_estimated_from_shapes_alone_and_is_that_of_the_pair_that_is_computed(tmp_path: Path) -> None:
    whole = {f"hada_w{n}_{half}": np.ones(shape) for n in (1, 2) for half, shape in (("a", (6, 3)), ("b", (3, 5)))}
    halves = {"lokr_w1": np.ones((2, 3)), "lokr_w2_a": np.ones((4, 2)), "lokr_w2_b": np.ones((2, 5))}
    for delta in (Hadamard(whole, 3.0), Kronecker(halves, 2.0, 2)):
        assert norm_cost(delta) == norm_cost(delta.as_low_rank())
    pair = linear()
    stack = StackedLowRank(np.stack([pair.lora_A] * 3), np.stack([pair.lora_B] * 3), 6.0)
    assert (norm_cost(pair), norm_cost(stack)) == ((5 + 4) * 2 * 18, 3 * (5 + 4) * 2 * 18)
    shapes = peft.read_shapes(large(tmp_path / "a", r=1024, width=1 << 20))
    assert 400 < estimated_seconds(shapes) < 500


def test_show_leaves_out_what_takes_over_two_seconds(run: Run, tmp_path: Path) -> None:
    large(tmp_path / "slow", r=1024, width=8192)
    reason = "left out, about 3 seconds of work; --full computes them"
    assert f"norms: {reason}" in run("show", "slow").stdout.splitlines()
    shown_document = document(run, "show", "slow")
    assert (shown_document["norms"], shown_document["digest"][:7]) == ({"missing": reason}, "sha256:")
    run("push", "slow", "team/slow", "--force")
    assert document(run, "show", "team/slow")["norms"] == {"missing": reason}
    adapter(tmp_path / "quick", pairs(2))
    assert document(run, "show", "quick", "--full") == document(run, "show", "quick")
    assert "Leave one of them out" in run("show", "quick", "--full", "--headers-only", code=2).stderr


def test_show_reads_no_large_files_unless_asked(run: Run, tmp_path: Path) -> None:
    large(tmp_path / "a", r=8, width=1 << 25)
    shown_document = document(run, "show", "a", "--headers-only")
    assert (shown_document["digest"], shown_document["oci_manifest"], shown_document["size"] > 2 * 10**9) == (None, None, True)
    assert [set(file) for file in shown_document["manifest"]["files"]] == [{"path", "size"}] * 2
    stdout = run("show", "a").stdout
    assert "left out, the files are large; --full computes it" in stdout
    assert "adapter_model.safetensors  2.1 GB" in stdout


def test_a_plot_is_a_png_whole_or_not_at_all(run: Run, tmp_path: Path) -> None:
    need_module("matplotlib")
    adapter(tmp_path / "a", pairs(3))
    run("show", "a", "--plot", "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "already exists" in run("show", "a", "--plot", "a.png", code=2).stderr
    assert "Leave one of them out" in run("show", "a", "--plot", "b.png", "--headers-only", code=2).stderr


def test_a_plot_without_matplotlib_names_the_package_to_install(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(3))
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    result = run("show", "a", "--plot", "a.png", env={"PYTHONPATH": os.pathsep.join([str(hook), PATH])}, code=9)
    assert (
        result.stderr
        == "error: requires matplotlib, which is not installed. Run `pip install 'adapterhub[plot]'`  [missing-extra]\n"
    )
    assert not (tmp_path / "a.png").exists()
