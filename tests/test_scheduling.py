"""How the tests themselves are run: a process that crashes takes one test with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

CRASHES = """
import os, time
def test_before(): pass
def test_that_crashes(): time.sleep(0.5); os.abort()
def test_after(): pass
"""


def test_a_crash_fails_one_test_and_all_others_are_run(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"test_{number:02}.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    (tmp_path / "test_05.py").write_text(CRASHES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    result = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder",
            "-p", "tests.support.scheduling", "-p", "no:cacheprovider", str(tmp_path),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "test_05.py::test_that_crashes" in result.stdout
    assert "1 failed, 24 passed" in result.stdout, result.stdout
    assert result.returncode == 1
