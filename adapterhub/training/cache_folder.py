"""Entries of the user's cache: folders that are removed when nobody has used them for two months."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

_UNUSED = 60 * 86400  # seconds


def remove_unused(folder: Path, pattern: str = "*") -> None:
    """Remove the entries in `folder` whose names match and whose time, that of their last use, is too long ago."""
    for entry in folder.glob(pattern):
        if time.time() - entry.stat().st_mtime > _UNUSED:
            remove(entry)


def remove(entry: Path) -> None:
    """Remove an entry, as far as that is possible."""
    shutil.rmtree(entry, ignore_errors=True)
