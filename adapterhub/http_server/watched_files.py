"""Files that are read again once they have changed, by looks at them, which works on every file system."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path


class WatchedFiles:
    """Some files, as they were when they were last read.

    Args:
        paths: Returns the files, which may differ from look to look; None is skipped.
    """

    def __init__(self, paths: Callable[[], Iterable[Path | None]]) -> None:
        self._paths = paths
        self._read = self._before = self._stamps()

    def mark_read(self) -> None:
        """Take the files as they are now for those that were read."""
        self._read = self._stamps()

    def have_changed(self) -> bool:
        """Return whether a file differs from what was read, but not from the last look, so that nobody is still writing it."""
        before, self._before = self._before, self._stamps()
        return self._read != self._before == before

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(map(_stamp, self._paths()))


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """Return the inode, size and time of a file, through links as Kubernetes makes them; None for a missing one."""
    with suppress(OSError):
        if path is not None:
            status = path.stat()
            return status.st_ino, status.st_size, status.st_mtime_ns
    return None
