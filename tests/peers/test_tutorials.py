"""Every step of the tutorials that start servers or train works, and prints what they show."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run, _environment, need_program, need_smollm2
from tests.docs.test_tutorials import HEAVY, REAL, fill
from tests.support import pages
from tests.training.conftest import tiny_base

__all__ = ["tiny_base"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


CONFIG = """
[base]
path = "../demo/base"
name = "HuggingFaceTB/SmolLM2-135M-Instruct"
quantize = "nf4"
[data]
train = "../demo/data/train.jsonl"
heldout = "../demo/data/heldout.jsonl"
sequence = 16
[lora]
r = 16
targets = "all-linear"
[train]
steps = 4
"""


@pytest.mark.peer
def test_the_session_of_the_readme_works_and_prints_the_lines_that_it_shows(tiny_base: Path, tmp_path: Path) -> None:
    fill(tmp_path, tiny_base)
    shutil.rmtree(tmp_path / "demo/legal")
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/legal-smollm2.toml").write_text(CONFIG)
    need_program("curl")
    with pages.Session(tmp_path, _environment(tmp_path, None), {"8090": 0, "8000": free_port()}) as session:
        for step in pages.steps((ROOT / "README.md").read_text()):
            assert isinstance(step, pages.Command)
            between = [part for line in step.printed if line for part in ("…", line)]  # it is shortened
            session.perform(pages.Command(step.typed, (*between, "…")))


@pytest.mark.peer
@pytest.mark.parametrize("name", HEAVY)
def test_every_step_works_as_printed(name: str, tiny_base: Path, tmp_path: Path) -> None:
    need_program("curl")
    fill(tmp_path, tiny_base)
    with pages.Session(tmp_path, _environment(tmp_path, None), {"8090": free_port(), "8000": free_port()}) as session:
        for step in pages.steps(pages.page(f"tutorials/{name}.md")):
            session.perform(step)


@pytest.mark.peer
@pytest.mark.parametrize("name", REAL)
def test_every_step_works_as_printed_with_the_real_model(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/smollm2.gguf").symlink_to(need_smollm2())
    run("convert", "demo/smollm2.gguf", "demo/base", "--to", "hf")
    with pages.Session(tmp_path, _environment(tmp_path, None), {"8090": 0, "8000": free_port()}) as session:
        for step in pages.steps(pages.page(f"tutorials/{name}.md")):
            session.perform(step)
