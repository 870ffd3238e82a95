"""The only way to open a file that a stranger may have made: a regular file, or an error that does not wait.

Opening a pipe waits for its writer, and opening a device may do anything. A path is therefore checked before it is opened, and
the open file is checked again, since the name may have been given to another file in between.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError

_PIECE = 1 << 20  # bytes that are hashed at once
_LFS_POINTER = b"version https://git-lfs"
READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
NO_LINK_FLAG: int = getattr(os, "O_NOFOLLOW", 0)
FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0) | NO_LINK_FLAG
MAX_PATH = 1024  # characters of a path below a folder that is walked
_STDIN, _DESCRIPTOR = "/dev/stdin", "/dev/fd/"  # of this process, as a shell names them: `<(command)`

BytesConsumer = Callable[[memoryview], object]
"""Called with the bytes of a file, piece by piece."""


def open_regular(
    path: Path | str, *, dir_fd: int | None = None, follow: bool = True, pipe: bool = False, buffering: int = 0
) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: The file.
        dir_fd: The open folder that `path` is relative to.
        follow: Whether the file may be reached by a link. False for files in a folder that somebody else filled.
        pipe: Whether a descriptor of this process (`/dev/stdin`, `/dev/fd/63`) may be a pipe.
        buffering: As for `open`; unbuffered by default.

    Raises:
        RefusedError: It is a pipe, a device or a socket; with `follow=False` also a link.
        OSError: It cannot be opened; IsADirectoryError for a folder.
    """
    info = os.stat(path, dir_fd=dir_fd, follow_symlinks=follow)
    if pipe and not stat.S_ISREG(info.st_mode) and _is_own_descriptor(str(path)):
        return open(path, "rb", buffering=buffering)
    check_regular(info, path)
    # Without waiting (O_NONBLOCK), in case the name was given to a pipe after the check.
    handle = os.open(path, READ_FLAGS if follow else READ_FLAGS | NO_LINK_FLAG, dir_fd=dir_fd)
    try:
        check_regular(os.fstat(handle), path)
        return os.fdopen(handle, "rb", buffering=buffering)
    except BaseException:
        os.close(handle)
        raise


def _is_own_descriptor(path: str) -> bool:
    return path == _STDIN or (path.startswith(_DESCRIPTOR) and path[len(_DESCRIPTOR) :].isdecimal())


def check_regular(info: os.stat_result, path: Path | str) -> None:
    """Raise a RefusedError unless a file is a regular one, an IsADirectoryError for a folder."""
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISLNK(info.st_mode):
        raise RefusedError(
            str(path), "a link, which is not followed", "Replace it with the file itself", code="not-a-regular-file"
        )
    if not stat.S_ISREG(info.st_mode):
        raise RefusedError(
            str(path), "a pipe or a device, not a regular file", "Replace it with a file", code="not-a-regular-file"
        )


def read_bytes(path: Path, *, pipe: bool = False) -> bytes:
    """Read a complete regular file; arguments and errors are those of `open_regular`."""
    with open_regular(path, pipe=pipe) as file:
        return file.read()


def walk(folder: Path, enters: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything below a folder: its relative path with forward slashes, and its status; of a link, its own.

    This is a loop rather than a recursion, so that any depth works; folders with a path longer than `MAX_PATH` are not entered.
    Entries that are removed meanwhile are left out.

    Args:
        folder: The folder; OSError unless it can be listed.
        enters: Returns, by the relative path of a folder, whether to list it too.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(folder / prefix) as entries:
                listing = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            if not prefix:
                raise
            continue
        for entry in listing:
            path = prefix + entry.name
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield path, status
            if stat.S_ISDIR(status.st_mode) and len(path) <= MAX_PATH and enters(path):
                # Links are not followed: `status` is that of the link itself.
                pending.append(path + "/")


class OpenFile:
    """An open file; a context manager. `location` is its name in errors, by default its path; `head` its first bytes.

    Its bytes are those of `file`, which it closes, if that is open already.
    """

    def __init__(self, path: Path, *, location: str | None = None, file: BinaryIO | None = None) -> None:
        self.location = location or str(path)
        try:
            self._file: BinaryIO = file or open_regular(path, buffering=-1)
        except RefusedError as error:
            raise RefusedError(self.location, error.what, error.hint, code=error.code) from error
        except FileNotFoundError as error:
            raise NotFoundError(self.location, "no such file", code="no-such-file") from error
        except IsADirectoryError as error:
            raise FormatError(self.location, "a folder, not a file", "Name a file in it", code="not-a-regular-file") from error
        except OSError as error:
            raise LocalIOError(self.location, error.strerror or str(error)) from error
        try:
            self.head = self._read_at(0, len(_LFS_POINTER))
            # A clone without git-lfs has these small text files in place of the weights.
            if self.head == _LFS_POINTER:
                raise FormatError(self.location, "a Git LFS pointer, not the file itself", "Run `git lfs pull`")
            self._parse(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self.close()
            raise

    def _parse(self, size: int) -> None:
        """Parse the header of a file of `size` bytes; called once, when the file is open."""

    def _read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)

    def _fill(self, buffer: memoryview, offset: int, name: str) -> None:
        """Fill `buffer` from byte `offset` on, with bytes of the tensor `name`."""
        self._file.seek(offset)
        if self._file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined] # a buffered file has this method
            raise FormatError(self.location, f"truncated while tensor {name!r} was read")

    def digest(
        self,
        on_bytes: Callable[[int], object] | None = None,
        consumer_of: Callable[[BinaryIO], BytesConsumer] | None = None,
    ) -> str:
        """Return the digest of the complete file, `sha256:<64 hex>`.

        Args:
            on_bytes: Called with the size of each piece.
            consumer_of: May read in the open file, and returns what is called with each piece.
        """
        consumer = consumer_of(self._file) if consumer_of else None
        self._file.seek(0)
        state, buffer = hashlib.sha256(), memoryview(bytearray(_PIECE))
        while size := self._file.readinto(buffer):  # type: ignore[attr-defined] # a buffered file has this method
            state.update(buffer[:size])
            if consumer:
                consumer(buffer[:size])
            if on_bytes:
                on_bytes(size)
        return f"sha256:{state.hexdigest()}"

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def detach(self) -> BinaryIO:
        """Return the file for another to read and close; this one is done."""
        return self._file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
