"""Locks of open files against other processes, which last until the file is closed: flock(2), on systems that have it."""

from __future__ import annotations

from contextlib import suppress


def try_lock(handle: int) -> bool:
    """Lock an open file; return False if another process has the lock, True where there are no locks."""
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def wait_for_lock(handle: int) -> None:
    """Lock an open file, waiting for other holders; do nothing where there are no locks."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)
