"""What all tests share: peers that are required in CI, and a way to run the command line as a process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import llama_cpp_scripts

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


def missing(peer: str) -> None:
    """Skip for want of a peer, or fail where CI requires them all."""
    if os.environ.get("ADAPTERHUB_REQUIRE_PEERS"):
        pytest.fail(f"{peer} is required here and isn't installed")
    pytest.skip(f"{peer} isn't installed")


def need_module(name: str) -> None:
    """Go on only if the Python package `name` can be imported."""
    if importlib.util.find_spec(name) is None:
        missing(f"the Python package {name}")


def need_program(name: str) -> str:
    """The path of a program of somebody else's."""
    path = shutil.which(name)
    if path is None:
        missing(f"the program {name}")
    return str(path)


@pytest.fixture(scope="session")
def converted() -> Iterator[llama_cpp_scripts.Converter]:
    """llama.cpp's own conversion of models; downloaded where CI requires the peers, else only used if it is there."""
    if os.environ.get("ADAPTERHUB_REQUIRE_PEERS"):
        llama_cpp_scripts.downloaded()
    scripts = llama_cpp_scripts.found()
    if scripts is None:
        missing("llama.cpp's conversion (python -m tests.llama_cpp_scripts fetches it)")
        raise AssertionError
    for module in ("torch", "transformers"):
        need_module(module)
    with llama_cpp_scripts.converter(scripts) as running:
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `adapterhub ARGS…` as its users do: a process, in an empty folder, with an environment of its own."""

    def call(
        *args: object, cwd: Path | None = None, env: dict[str, str] | None = None, code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("ADAPTERHUB_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")]),
            "XDG_DATA_HOME": str(tmp_path / "xdg"),
            "XDG_CONFIG_HOME": str(tmp_path / "xdg-config"),
            "XDG_CACHE_HOME": str(tmp_path / "xdg-cache"),
            "MPLCONFIGDIR": str(Path.home() / ".cache" / "matplotlib"),  # else it looks for fonts again in every process
            "COLUMNS": "80",
            **(env or {}),
        }
        done = subprocess.run(
            [sys.executable, "-m", "adapterhub", *map(str, args)],
            check=False,
            cwd=cwd or tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if code is not None:
            assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done

    return call
