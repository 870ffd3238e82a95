"""Small files that belong to people: read, changed and replaced atomically, by one process at a time."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import LocalIOError, NotFoundError


def change(path: Path, new: Callable[[str], str | None], *, private: bool = False, follow: bool = True) -> bool:
    """Replace the text of a file; a link stays a link.

    Args:
        new: Returns the new text for the old one, which is empty for a missing file; None to write nothing.
        private: Only the owner may read the file; one that others can read already is a LocalIOError.
        follow: False for a file of a project, which may be a clone of somebody else's: a link is then a RefusedError.

    Returns:
        True if the file was written.
    """
    real = Path(os.path.realpath(path if follow else path.parent)) / ("" if follow else path.name)
    with _errors(path):
        real.parent.mkdir(parents=True, exist_ok=True)
        with _alone(real.parent):
            text = new(read(path, private=private, follow=follow))
            if text is None:
                return False
            _replace(real, text.encode(), private=private)
    return True


def read(path: Path, *, private: bool = False, follow: bool = True) -> str:
    """The text of a file, empty if it is missing; the arguments are those of `change`."""
    try:
        if private:
            check_private(path)
        return json_file.read_text(path, follow=follow)
    except (FileNotFoundError, NotFoundError):
        return ""


def check_private(path: Path) -> None:
    """LocalIOError if others can read `path`, or it belongs to another user; FileNotFoundError if it is missing."""
    if not hasattr(os, "geteuid"):
        return
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise LocalIOError(str(path), "belongs to another user and is not read", "Remove it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise LocalIOError(str(path), "others can read it, so it is not used", f"chmod 600 {path}, or remove it")


def is_mine(path: Path) -> bool:
    """True if a file belongs to the user, as git requires of `.git`: one from a stranger in a folder above is not trusted.

    Of a link, the owner is whoever made the link: a stranger can link to a file of the user's.
    """
    with suppress(OSError):
        return not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid()
    return False


def is_only_mine(found: os.stat_result) -> bool:
    """True for a file or folder that belongs to the user and that nobody else can write to."""
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o022)


def _replace(path: Path, data: bytes, *, private: bool) -> None:
    import tempfile

    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not private:
            os.chmod(name, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from changing files in `folder`, where folders can be locked."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not on every network file system
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
