"""The files below a folder that somebody else may have filled: no link anywhere below it is followed.

A clone or a shared disk brings folders with links in them, and a program that writes to, or cleans up, such a folder would do
so wherever they point. Every operation therefore opens the folders on the path one by one, each in the one before, and refuses
a link by name (`openat`, `O_NOFOLLOW`), so that not even a link put there meanwhile is followed. On systems without `openat`
(Windows), each folder is checked first.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from adapterhub_converters.errors import RefusedError

from .open_file import FOLDER_FLAGS, NO_LINK_FLAG, check_regular, open_regular

_HAS_OPENAT = os.open in os.supports_dir_fd and bool(NO_LINK_FLAG)
_WRITE_FLAGS = os.O_CREAT | os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | NO_LINK_FLAG


class ConfinedFiles:
    """The files below `root`, named by paths that begin with it; `root` itself must be a folder, not a link.

    Every method raises RefusedError for a link on the path, and OSError as the functions of `os` do.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._prefix = os.path.join(root, "")
        self._kept_handles: dict[str, int] | None = None

    @contextmanager
    def folders_kept_open(self) -> Iterator[None]:
        """Open each folder only once until the context ends, for work on thousands of files in a few folders.

        A folder that is moved away meanwhile stays the one that is written to. Only for one thread at a time.
        """
        if self._kept_handles is not None or not _HAS_OPENAT:
            yield
            return
        self._kept_handles = {}
        try:
            yield
        finally:
            handles, self._kept_handles = self._kept_handles, None
            for handle in handles.values():
                os.close(handle)

    def open(self, path: Path) -> BinaryIO:
        """Open a regular file for reading, unbuffered; RefusedError for anything else."""
        with self._opened_folder(path.parent, path) as folder, _errors_name(path):
            return open_regular(path if folder is None else path.name, dir_fd=folder, follow=False)

    def read(self, path: Path, limit: int = -1) -> bytes:
        """Read a regular file, at most `limit` bytes."""
        with self.open(path) as file:
            return file.read(limit)

    def create(self, path: Path, mode: int = 0o644) -> BinaryIO:
        """Create a file that must not exist, and open it for reading and writing, unbuffered."""
        with self._opened_folder(path.parent, path) as folder:
            return os.fdopen(os.open(_name(path, folder), _WRITE_FLAGS | os.O_EXCL, mode, dir_fd=folder), "r+b", buffering=0)

    def resume(self, path: Path, mode: int = 0o644) -> BinaryIO:
        """Open a regular file for reading and writing, unbuffered; create it if it is missing."""
        with self._opened_folder(path.parent, path) as folder, _errors_name(path):
            try:
                # Without O_NONBLOCK, opening a pipe would wait for its other end.
                handle = os.open(_name(path, folder), _WRITE_FLAGS | getattr(os, "O_NONBLOCK", 0), mode, dir_fd=folder)
            except OSError as error:
                if path.is_symlink():
                    raise _link_error(path) from error
                raise
            try:
                check_regular(os.fstat(handle), path)
                return os.fdopen(handle, "r+b", buffering=0)
            except BaseException:
                os.close(handle)
                raise

    def still_has_name(self, file: BinaryIO, path: Path) -> bool:
        """Return whether an open file still has this name; another process may have taken the name of a locked file."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file.fileno()), self.status(path))
        return False

    def status(self, path: Path) -> os.stat_result:
        """Return the status of whatever has this name; of a link, its own."""
        with self._opened_folder(path.parent, path) as folder:
            return os.stat(_name(path, folder), dir_fd=folder, follow_symlinks=False)

    def is_file(self, path: Path) -> bool:
        """Return whether there is a regular file."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return stat.S_ISREG(self.status(path).st_mode)
        return False

    def exists(self, path: Path) -> bool:
        """Return whether the name is taken, even by a broken link."""
        with suppress(FileNotFoundError, NotADirectoryError):
            self.status(path)
            return True
        return False

    def list_folder(self, folder: Path) -> list[Path]:
        """List a folder, sorted."""
        with self._opened_folder(folder, folder) as handle:
            return [folder / name for name in sorted(os.listdir(folder if handle is None else handle))]

    def list_subfolders(self, folder: Path) -> list[Path]:
        """List the folders in a folder, sorted; RefusedError for a link in it."""
        subfolders = []
        with self._opened_folder(folder, folder) as handle, os.scandir(folder if handle is None else handle) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise _link_error(folder / entry.name)
                if entry.is_dir():
                    subfolders.append(folder / entry.name)
        return sorted(subfolders)

    def make_dir(self, folder: Path) -> None:
        """Create a folder and its missing parents, flushed to disk."""
        missing = []
        while folder != self.root and not self.exists(folder):
            missing.append(folder)
            folder = folder.parent
        for created in reversed(missing):
            with self._opened_folder(created.parent, created) as parent:
                with suppress(FileExistsError):
                    os.mkdir(_name(created, parent), dir_fd=parent)
                _sync(parent)

    def sync(self, folder: Path) -> None:
        """Flush the names in a folder to disk."""
        with self._opened_folder(folder, folder) as handle:
            _sync(handle)

    def touch(self, path: Path) -> None:
        """Set the times of a file to now."""
        with self._opened_folder(path.parent, path) as folder:
            os.utime(_name(path, folder), dir_fd=folder, follow_symlinks=os.utime not in os.supports_follow_symlinks)

    def move(self, path: Path, final: Path) -> None:
        """Rename a file or folder, replacing an existing file."""
        with self._opened_folder(path.parent, path) as source, self._opened_folder(final.parent, final) as target:
            os.replace(_name(path, source), _name(final, target), src_dir_fd=source, dst_dir_fd=target)

    def link(self, path: Path, final: Path) -> None:
        """Give a file a second name, which must be free."""
        with self._opened_folder(path.parent, path) as source, self._opened_folder(final.parent, final) as target:
            follow = os.link not in os.supports_follow_symlinks
            names = _name(path, source), _name(final, target)
            os.link(*names, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=follow)

    def remove(self, path: Path) -> None:
        """Remove a file, or a link itself; also a read-only one, which Windows requires to be writable."""
        with self._opened_folder(path.parent, path) as folder:
            try:
                os.unlink(_name(path, folder), dir_fd=folder)
            except PermissionError:
                if folder is not None:
                    raise
                path.chmod(0o644)
                path.unlink()

    def remove_tree(self, folder: Path) -> None:
        """Remove a folder and everything in it, without following links; a link or a file in its place is itself removed."""
        if not stat.S_ISDIR(self.status(folder).st_mode):
            self.remove(folder)
            return
        with self._opened_folder(folder.parent, folder) as parent:
            # `shutil.rmtree` with `dir_fd` follows no links either.
            shutil.rmtree(_name(folder, parent), dir_fd=parent)

    @contextmanager
    def _opened_folder(self, folder: Path, path: Path) -> Iterator[int | None]:
        """Open a folder at or below `root`; None where paths are used instead. `path` is the name in the system's errors."""
        handle, kept = None, self._kept_handles
        try:
            name = os.fspath(folder)
            if kept is None:
                handle = self._open_path(name)
            elif (handle := kept.get(name)) is None and (handle := self._open_path(name)) is not None:
                kept[name] = handle
            yield handle
        except OSError as error:
            # With `dir_fd`, the system names only the last part of the path.
            error.filename, error.filename2 = str(path), None
            raise
        finally:
            if handle is not None and kept is None:
                os.close(handle)

    def _open_path(self, folder: str) -> int | None:
        """Open a folder by walking down to it from `root`."""
        relative_path = folder[len(self._prefix) :]
        if relative_path and not folder.startswith(self._prefix):
            raise ValueError(f"{folder} is not below {self.root}")
        path_so_far = os.fspath(self.root)
        handle = _open_folder(path_so_far, path_so_far, None)
        for part in relative_path.split(os.sep) if relative_path else ():
            path_so_far = os.path.join(path_so_far, part)
            try:
                child = _open_folder(part, path_so_far, handle)
            finally:
                if handle is not None:
                    os.close(handle)
            handle = child
        return handle


def _open_folder(name: str, path: str, parent: int | None) -> int | None:
    """Open a folder by its name in an open one; on systems without `openat`, only check it."""
    if _HAS_OPENAT:
        try:
            return os.open(name, FOLDER_FLAGS, dir_fd=parent)
        except OSError as error:
            # Linux reports ENOTDIR for a link, others ELOOP or EMLINK.
            if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EMLINK) or not os.path.islink(path):
                raise
            # The system reports that it is not a folder: say that it is a link.
            raise _link_error(Path(path)) from error
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode) or getattr(os.path, "isjunction", lambda _: False)(path):
        raise _link_error(Path(path))
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return None


def _link_error(path: Path) -> RefusedError:
    return RefusedError(str(path), "a link, which is not followed out of this folder", "Remove it", code="not-a-regular-file")


def _name(path: Path, folder: int | None) -> Path | str:
    return path if folder is None else path.name


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Name the complete path in an error about a file."""
    try:
        yield
    except RefusedError as error:
        error.where = str(path)
        raise


def _sync(handle: int | None) -> None:
    if handle is not None:
        os.fsync(handle)
