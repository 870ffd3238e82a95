"""A file that is read at given offsets, and every way that can fail told in one line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError

_POINTER = b"version https://git-lfs"


class OpenFile:
    """An open file; a context manager. `where` is its name in errors, its path by default; `head` its first bytes."""

    def __init__(self, path: Path, *, where: str | None = None) -> None:
        self.where = where or str(path)
        try:
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by close()
        except FileNotFoundError as error:
            raise NotFoundError(self.where, "no such file") from error
        except IsADirectoryError as error:
            raise FormatError(self.where, "a folder, not a file") from error
        except OSError as error:
            raise LocalIOError(self.where, error.strerror or str(error)) from error
        try:
            self.head = self._read_at(0, len(_POINTER))
            if self.head == _POINTER:
                raise FormatError(self.where, "a Git LFS pointer, not the file it stands for", "Run `git lfs pull`")
            self._parse(os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self.close()
            raise

    def _parse(self, size: int) -> None:
        """Read what a file of `size` bytes says of itself; called once, when it is open."""

    def _read_at(self, offset: int, n: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(n)

    def _fill(self, buffer: memoryview, offset: int, name: str) -> None:
        """Fill `buffer` from byte `offset` on, with bytes of the tensor `name`."""
        self._file.seek(offset)
        if self._file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined] # a buffered file has it
            raise FormatError(self.where, f"truncated while tensor {name!r} was read")

    def digest(self) -> str:
        """The digest of the whole file, `sha256:<64 hex>`."""
        self._file.seek(0)
        return f"sha256:{hashlib.file_digest(self._file, 'sha256').hexdigest()}"  # type: ignore[arg-type] # it has readinto

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
