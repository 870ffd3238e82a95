"""Small files of the user: read, changed and replaced atomically, by one process at a time."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.file_lock import try_lock
from adapterhub_converters.errors import LocalIOError, NotFoundError

_TRIES, _PAUSE = 600, 0.05  # attempts to lock a folder, and seconds between two: 30 seconds in all


def change(path: Path, new: Callable[[str], str | None], *, private: bool = False, follow: bool = True) -> bool:
    """Replace the text of a file; a link stays a link.

    Args:
        new: Returns the new text for the old one, which is empty for a missing file; None to write nothing.
        private: Only the owner may read the file; a file that others can read already raises LocalIOError.
        follow: False for a file of a project, which may be a clone of somebody else's: a link then raises RefusedError.

    Returns:
        Whether the file was written.
    """
    real = Path(os.path.realpath(path if follow else path.parent)) / ("" if follow else path.name)
    with _errors(path):
        real.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(real.parent):
            text = new(read(path, private=private, follow=follow))
            if text is None:
                return False
            _replace(real, text.encode(), private=private)
    return True


def read(path: Path, *, private: bool = False, follow: bool = True) -> str:
    """Return the text of a file, empty if it is missing; the arguments are those of `change`."""
    try:
        if private:
            check_private(path)
        return json_file.read_text(path, follow=follow)
    except (FileNotFoundError, NotFoundError):
        return ""


def check_private(path: Path) -> None:
    """Raise LocalIOError if others can read `path` or it belongs to another user, FileNotFoundError if it is missing."""
    if not hasattr(os, "geteuid"):
        return
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise LocalIOError(str(path), "belongs to another user and is not read", "Remove it")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise LocalIOError(str(path), "others can read it, so it is not used", f"Run `chmod 600 {path}`, or remove it")


def is_mine(path: Path) -> bool:
    """Return whether a file belongs to the user. As git requires of `.git`, a stranger's file in a folder above is not trusted.

    The owner of a link is the user who made the link: a stranger can link to a file of the user's.
    """
    with suppress(OSError):
        return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()
    return False


def is_only_mine(status: os.stat_result) -> bool:
    """Return whether a file or folder belongs to the user and nobody else can write to it."""
    return not hasattr(os, "geteuid") or (status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o022)


def _replace(path: Path, data: bytes, *, private: bool) -> None:
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() and not private else None
    name = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    # The kernel applies the umask: it cannot be asked for without changing it for all threads.
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private or mode is not None else 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            # The data must be on disk before the new name is: after a crash the file has the old text or the new one.
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            name.chmod(mode)
        name.replace(path)
    # After an interrupt too: the temporary file may contain a password.
    except BaseException:
        name.unlink(missing_ok=True)
        raise


@contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes from changing files in `folder`, where folders can be locked.

    A change takes milliseconds. Anyone who can read the folder can also lock it, for as long as they like, so waiting for the
    lock is limited.
    """
    # Windows opens no folders. Replacing a file is atomic there too; only concurrent changes can be lost.
    if os.name == "nt":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    for _ in range(_TRIES):
        if try_lock(handle):
            return
        time.sleep(_PAUSE)
    raise LocalIOError(
        str(folder), "another process keeps this folder locked", "Wait for that process, or end it", code="in-use"
    )


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
