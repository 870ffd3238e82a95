"""torchtune and litgpt themselves: the tests of their files that need them, in a process that has them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.conftest import ROOT, missing, need_module
from tests.support import peer_env

_FILES = ("tests/converters/test_torchtune.py", "tests/converters/test_litgpt.py")
_OLD = 7  # tests of litgpt before 0.5.7, whose module for q, k and v has another name


def test_what_torchtune_and_litgpt_compute_is_what_we_read() -> None:
    for module in ("torch", "transformers", "datasets"):
        need_module(module)
    folder = peer_env.downloaded() if os.environ.get("ADAPTERHUB_REQUIRE_PEERS") else peer_env.installed_folder()
    if folder is None:
        missing("torchtune and litgpt", install="python -m tests.support.peer_env")
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "peer", "-p", "no:cacheprovider", "-p", "no:xdist", *_FILES]
    result = subprocess.run(
        pytest,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": peer_env.path(folder)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    skipped = re.search(r"(\d+) skipped", result.stdout)
    assert (int(skipped[1]) if skipped else 0) == _OLD, result.stdout[-2000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[0]) >= 25
