"""Every benchmark runs at its smallest size with figures that make sense."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, missing
from tests.support import llama_cpp_scripts, llama_server, mergekit_env

BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))
MAY_BE_ZERO = {"temporary MB", "grown MB"}


@pytest.fixture
def smoke(tmp_path: Path) -> Any:
    """Run a script at its smallest size; its JSON and its output."""

    def call(script: str, *options: str, **env: str) -> tuple[dict[str, Any], str]:
        file = tmp_path / "report.json"
        command = [
            sys.executable,
            str(BENCHMARKS / f"{script}.py"),
            "--smoke",
            "--json",
            str(file),
            "--dir",
            str(tmp_path),
            *options,
        ]
        result = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=1200, check=False)
        assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        report: dict[str, Any] = json.loads(file.read_text())
        return report, result.stdout

    return call


@pytest.mark.peer
@pytest.mark.parametrize("script", SCRIPTS)
def test_figures_make_sense(script: str, smoke: Any) -> None:
    if script == "gateway":
        llama_server.program()  # nothing is measured without it: skips where the processor cannot run it
    elif os.environ.get("ADAPTERHUB_REQUIRE_PEERS"):
        {"convert": llama_cpp_scripts.downloaded, "merge": mergekit_env.create}.get(script, lambda: None)()
    report, output = smoke(script)
    lacking = set()
    for result in report["results"]:
        assert f"{result['job']}: {result['detail']}" in output
        assert all(result["claims"].values())
        ours = result["programs"]["adapterhub"].get("figures", {})
        for name, program in result["programs"].items():
            if "missing" in program:
                lacking.add(program["missing"])
                continue
            assert name in output
            for column, value in program["figures"].items():
                assert math.isfinite(value), (name, column)
                assert value > 0 or (value == 0 and column in MAY_BE_ZERO), (name, column)
            for column, ratio in program["ratios"].items():
                first, their_figure = ours[column], program["figures"][column]
                assert ratio == pytest.approx(first / their_figure if column.endswith("/s") else their_figure / first)
            assert name == "adapterhub" or not ours or program["ratios"]
    assert report["results"]
    if any(peer.startswith("llama_server") for peer in lacking):
        llama_server.program()  # skips where the processor cannot run it
    if lacking:
        missing(", ".join(sorted(lacking)))


def test_missing_peers_are_reported(smoke: Any) -> None:
    report, output = smoke("transfer", "--only", "registry", PATH="")
    programs = [program for result in report["results"] for program in result["programs"].values()]
    assert {program["missing"] for program in programs} == {
        "docker-registry",
        "docker-registry, oras",
        "docker-registry, oras, curl",
    }
    assert "missing: docker-registry, oras" in output


def test_a_plan_for_a_graphics_card_needs_none_and_no_weights(smoke: Any) -> None:
    card = ("--device", "cuda", "--plan", "--base", "Llama-3-8B", "--sequence", "2048", "--checkpointing")
    report, output = smoke("train", *card)
    (result,) = report["results"]
    figures = result["programs"]["adapterhub"]["figures"]
    assert 6_000 < figures["base MB"] + figures["activations MB"] < figures["planned MB"] < 12_000
    assert figures["TFLOP"] == pytest.approx(4 * 2048 * 7.5e9 / 1e12, rel=0.15)  # an output layer of its own, LoRA, attention
    assert "Llama-3-8B, 1 x 2048 tokens, planned" in output


@pytest.mark.peer
def test_hostile_clients_of_a_hub_stay_within_its_limits() -> None:
    command = [sys.executable, str(BENCHMARKS / "hub.py"), "--hostile", "--smoke"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "OVER" not in result.stdout
    assert len(result.stdout.splitlines()) > 12
