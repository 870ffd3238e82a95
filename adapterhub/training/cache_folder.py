"""The user's cache: folders that are removed when they have not been used for two months."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

_MAX_AGE = 60 * 86400  # seconds


def remove_unused(folder: Path, pattern: str = "*") -> None:
    """Remove the entries in `folder` that match `pattern` and were last used too long ago, by their modification time."""
    # A reader updates the modification time of the entry: not every file system records access times.
    for entry in folder.glob(pattern):
        if time.time() - entry.stat().st_mtime > _MAX_AGE:
            remove(entry)


def remove(entry: Path) -> None:
    """Remove an entry as far as possible, ignoring errors."""
    shutil.rmtree(entry, ignore_errors=True)
