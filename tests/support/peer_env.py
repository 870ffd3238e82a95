"""torchtune and litgpt themselves, in a folder beside the environment, for the tests that hold our files to theirs.

    python -m tests.support.peer_env        # installs them once: 61 MB, no compiler, without what they would pull along

Both are older than the torch that everything else is tested with, and torchao as torchtune imports it is older than peft
allows: so they run on the environment's own torch, in a process of their own that has the folder on its path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "adapterhub-benchmarks"
# With what they import to build a model; `datasets`, which torchtune imports too, comes with trl.
_PINS = (
    "torchtune==0.6.1", "torchao==0.9.0", "tiktoken==0.14.0", "omegaconf==2.4.0",
    "litgpt==0.5.13", "lightning==2.6.6", "lightning-utilities==0.15.3", "torchmetrics==1.9.0",
)  # fmt: skip
_FOLDER = CACHE / "trainers-torchtune-0.6.1-litgpt-0.5.13"


def installed_folder() -> Path | None:
    """The folder with both; None when it was never made."""
    return _FOLDER if _FOLDER.is_dir() else None


def downloaded() -> Path:
    """The folder with both, from PyPI if need be; whole or not there."""
    if folder := installed_folder():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="trainers-", dir=CACHE))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    try:
        subprocess.run([*pip, "--only-binary", ":all:", "--target", str(temporary), *_PINS], check=True)
        temporary.rename(_FOLDER)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _FOLDER


def path(folder: Path) -> str:
    """PYTHONPATH with the folder after what is on it."""
    return os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(folder)])


if __name__ == "__main__":
    print(downloaded())
