"""mergekit in an environment of its own, as the oracle of merges. It is LGPL: it is run here, and nothing of it is copied.

    python -m tests.support.mergekit_env        # makes it once: a second, 3 MB

The environment borrows torch, transformers and peft from the one that makes it, and gets only what that lacks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.llama_cpp_scripts import CACHE

_PACKAGES = ("mergekit==0.1.5", "immutables==0.21")
# Makes the merges of its standard input, [{"out": folder, "config": what mergekit-yaml reads}, …], one after the other.
_CHILD = """
import json, sys, tempfile
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
with tempfile.TemporaryDirectory() as cache:
    options = MergeOptions(
        lora_merge_cache=cache, copy_tokenizer=False, write_model_card=False, num_threads=1, quiet=True, random_seed=0)
    for job in json.load(sys.stdin):
        run_merge(MergeConfiguration.model_validate(job["config"]), out_path=job["out"], options=options)
"""


def folder() -> Path:
    """Where the environment is or will be: one for each environment that it borrows from."""
    borrowed = hashlib.sha256(f"{_PACKAGES} {sys.prefix}".encode()).hexdigest()[:12]
    return CACHE / f"mergekit-{borrowed}"


def installed_python() -> Path | None:
    """Its Python; None when it was never made."""
    python = folder() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return python if python.exists() else None


def create() -> Path:
    """Its Python, made if need be."""
    if python := installed_python():
        return python
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        _make(Path(temporary) / "venv")
        with contextlib.suppress(OSError):  # somebody else's is there, made meanwhile
            (Path(temporary) / "venv").rename(folder())
    python = installed_python()
    assert python
    return python


def _make(place: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(place)}))
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *_PACKAGES]
    subprocess.run(pip, check=True)


def merge(python: Path, jobs: Sequence[dict[str, Any]]) -> None:
    """Run every job, `{"out": folder, "config": what mergekit-yaml reads}`, in one process of that Python."""
    result = subprocess.run(
        [python, "-c", _CHILD],
        input=json.dumps(jobs),
        text=True,
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    if result.returncode:
        raise RuntimeError(f"mergekit: exit {result.returncode}\n{result.stderr[-3000:]}")


if __name__ == "__main__":
    print(create())
