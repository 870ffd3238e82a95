"""Small files that people own, changed: read, thought about, and replaced whole, one process after the other."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import LocalIOError, NotFoundError


def change(path: Path, new: Callable[[str], str | None], *, private: bool = False) -> bool:
    """Have `path` say what `new` makes of its text (empty when there is none; None: nothing is written); whether it did.

    `private`: only its owner may read it; one that others may read already is refused. A link stays one.
    """
    real = Path(os.path.realpath(path))
    with _errors(path):
        real.parent.mkdir(parents=True, exist_ok=True)
        with _alone(real.parent):
            text = new(read(path, private=private))
            if text is None:
                return False
            _replace(real, text.encode(), private=private)
    return True


def read(path: Path, *, private: bool = False) -> str:
    """The text of a file, empty when there is none."""
    try:
        if private:
            check_private(path)
        return json_file.read_text(path)
    except (FileNotFoundError, NotFoundError):
        return ""


def check_private(path: Path) -> None:
    """LocalIOError when others may read `path`, or it isn't the user's; FileNotFoundError when there is none."""
    if not hasattr(os, "geteuid"):
        return
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise LocalIOError(str(path), "belongs to another user, so nothing is read from it", "Remove it")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise LocalIOError(str(path), "others may read it, so nothing is read from it", f"chmod 600 {path}, or remove it")


def is_mine(path: Path) -> bool:
    """Whether a file is the user's own, as git asks of `.git`: what a stranger laid in a folder above is not to be believed."""
    with suppress(OSError):
        return not hasattr(os, "geteuid") or path.stat().st_uid == os.geteuid()
    return False


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
    """No other process changes a file of `folder` meanwhile, where folders can be locked."""
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
