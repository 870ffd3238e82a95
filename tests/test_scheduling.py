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
CRASH_TOGETHER = """
import os, pathlib, time
waiting = pathlib.Path(__file__).with_suffix(".waiting")
def test_that_crashes():
    waiting.touch()
    while len([*waiting.parent.glob("*.waiting")]) < 2:
        time.sleep(0.01)
    os.abort()
def test_after(): pass
"""
# Of the two that take their place, the first has not collected its tests when the second runs one.
COLLECT_LATE = """
import os, pathlib, time
running, worker = pathlib.Path(__file__).with_suffix(".running"), os.environ.get("PYTEST_XDIST_WORKER")
def pytest_collection_modifyitems():
    end = time.monotonic() + 60
    while worker == "gw2" and not running.exists() and time.monotonic() < end:
        time.sleep(0.01)
def pytest_runtest_setup():
    if worker == "gw3":
        running.touch()
"""


def _run(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests of a folder by two workers."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder",
            "-p", "tests.support.scheduling", "-p", "no:cacheprovider", str(folder),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_two_workers_that_crash_together_fail_two_tests_and_all_others_are_run(tmp_path: Path) -> None:
    for number in range(2, 12):
        (tmp_path / f"test_{number:02}.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    for number in range(2):
        (tmp_path / f"test_{number:02}.py").write_text(CRASH_TOGETHER)
    (tmp_path / "conftest.py").write_text(COLLECT_LATE)
    result = _run(tmp_path)
    assert "INTERNALERROR" not in result.stdout + result.stderr
    assert "2 failed, 22 passed" in result.stdout, result.stdout


def test_a_crash_fails_one_test_and_all_others_are_run(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"test_{number:02}.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    (tmp_path / "test_05.py").write_text(CRASHES)
    result = _run(tmp_path)
    assert "test_05.py::test_that_crashes" in result.stdout
    assert "1 failed, 24 passed" in result.stdout, result.stdout
    assert result.returncode == 1
