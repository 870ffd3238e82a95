"""Programs that tests write."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def write_program(path: Path, *words: str) -> None:
    """Write a program that runs this Python with words, then with its own; a path after `#!` could have no space."""
    path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *words])} "$@"\n')
    path.chmod(0o755)
