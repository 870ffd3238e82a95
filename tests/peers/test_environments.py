"""Environments are made once however many want them, hold what was asked for, and say why they could not be made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import need_program
from tests.support.environments import environment, node_packages

pytestmark = pytest.mark.peer
SMALL = "idna==3.10"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERHUB_PEERS", str(tmp_path / "peers"))
    return tmp_path / "peers"


def importable(python: Path, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], check=False, capture_output=True).returncode == 0


def test_it_has_what_was_asked_for_and_nothing_of_ours(cache: Path) -> None:
    python = environment(SMALL)
    assert python.is_relative_to(cache)
    assert importable(python, "idna")
    assert not importable(python, "numpy")


def test_what_is_left_out_is_not_there_though_it_is_depended_on() -> None:
    python = environment("jinja2==3.1.6", without=("MarkupSafe",))
    assert not importable(python, "markupsafe")
    assert importable(environment("jinja2==3.1.6"), "markupsafe")


def test_racing_workers_make_it_once(cache: Path) -> None:
    script = f"from tests.support.environments import environment; print(environment({SMALL!r}))"
    racing = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    pythons = {Path(process.communicate()[0].strip()) for process in racing}
    assert pythons == {environment(SMALL)}
    (environment_folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert importable(environment_folder / "bin/python", "idna")


def test_one_that_was_interrupted_is_made_anew() -> None:
    python = environment(SMALL)
    (python.parents[1] / "complete").unlink()
    python.unlink()
    assert importable(environment(SMALL), "idna")


@pytest.mark.parametrize(("required", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_one_that_cannot_be_made_is_missing_with_the_installer_s_reason(
    required: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    need_program("npm")
    monkeypatch.setenv("ADAPTERHUB_REQUIRE_PEERS", required)
    with pytest.raises(outcome, match=r"^idna==0\.0\.404 .*isn't installed: .*idna==0\.0\.404"):
        environment("idna==0.0.404")
    with pytest.raises(outcome, match=r"^@huggingface/hub@0\.0\.404 .*isn't installed: .*@huggingface/hub@0\.0\.404"):
        node_packages("@huggingface/hub@0.0.404")
    assert not [path for path in cache.iterdir() if path.is_dir()]
