"""torchrun itself starts the two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.training.conftest import tiny_base
from tests.training.test_distributed import two_learn_what_one_does

__all__ = ["tiny_base"]


def by_torchrun(path: Path) -> str:
    joined = os.pathsep.join(str(ROOT / name) for name in (".", "converters", "schemas"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "adapterhub"]
    result = subprocess.run(
        [*command, "train", str(path), "-o", "two", "--json"],
        cwd=path.parent, env={**os.environ, "PYTHONPATH": joined, "XDG_CACHE_HOME": str(path.parent)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_two_ranks_of_torchrun_have_the_losses_of_one(tmp_path: Path, tiny_base: Path) -> None:
    two_learn_what_one_does(by_torchrun, tmp_path, tiny_base, rows=3)
