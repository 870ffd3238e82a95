"""The fuzz targets run with atheris, which takes seconds to instrument what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, need_module

TARGET = ROOT / "tests/fuzz/fuzz_parsers.py"


def test_the_target_runs_with_atheris(tmp_path: Path) -> None:
    need_module("atheris")
    # By a shell that forks: what this process has at its peak would count for a process that it starts itself (getrusage(2)).
    shell = ("sh", "-c", '"$@"; exit $?', "sh")
    result = subprocess.run(
        [*shell, sys.executable, str(TARGET), "-seed=1", "-runs=2000", str(tmp_path)],
        check=False, capture_output=True, text=True, timeout=300, env=dict(os.environ), cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Done 2000" in result.stderr + result.stdout
