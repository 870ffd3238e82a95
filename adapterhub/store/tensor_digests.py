"""Digests of the tensors in a file of weights: what two files have in common, whatever else differs.

A list is derived from the file alone. Hashing every tensor takes as long as hashing the file, so a list is made when a search,
a disk usage report or packing needs it, not by a push, and kept in the store under the file's digest
(`tensors/sha256/<hex>`): JSON, one line per tensor, and at the end the digest of everything before it, so that an incomplete
list, as after a power cut, is recognized.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, copy_hashing, is_hex, parse_digest, sha256_bytes
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError

from .atomic import Files, write_all

if TYPE_CHECKING:
    from adapterhub.store.packs.cutting import ReadAt, Run

_HEAD = b'{"version":1,"tensors":[\n'
_END = b'],"sha256":"'
_MAX = 256 << 20  # bytes of a list


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: `dtype` as the file names it, `size` in bytes, `digest` of these bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    digest: Digest


Tensors = tuple[Tensor, ...]
"""The tensors of one file, in file order."""


class Hashing:
    """Computes the digests of a file's tensors from its bytes, passed in order."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        """Read the header of a file of `size` bytes."""
        self._size = size
        self._todo = _runs(read_at, size)
        self._found: list[Tensor] = []
        self._position = 0
        self._state = hashlib.sha256()

    @classmethod
    def of(cls, file: Any, size: int) -> Hashing:
        """Start on an unbuffered file, plain or packed, at its start; its position is unchanged afterwards."""
        if hasattr(file, "read_at"):
            return cls(file.read_at, size)

        def read_at(offset: int, count: int) -> bytes:
            file.seek(offset)
            return bytes(file.read(count))

        try:
            return cls(read_at, size)
        finally:
            file.seek(0)

    def __call__(self, piece: memoryview) -> None:
        """Add the next bytes of the file."""
        end = self._position + len(piece)
        while self._todo and (run := self._todo[-1]).offset < end:
            start = max(run.offset, self._position)
            stop = min(run.offset + run.size, end)
            self._state.update(piece[start - self._position : stop - self._position])
            if stop < run.offset + run.size:
                break
            self._close()
        self._position = end

    def _close(self) -> None:
        run = self._todo.pop()
        name, dtype, shape = run.key
        self._found.append(Tensor(str(name), str(dtype), _shape(shape), run.size, "sha256:" + self._state.hexdigest()))
        self._state = hashlib.sha256()

    def result(self) -> Tensors | None:
        """Return all tensors; None if the file was not as long as announced."""
        if self._position != self._size:
            return None
        while self._todo and not self._todo[-1].size:  # at the very end
            self._close()
        return None if self._todo else tuple(self._found)


def _runs(read_at: ReadAt, size: int) -> list[Run]:
    """Return the places of the tensors, last one first; empty for a file of another kind."""
    from adapterhub.store.packs.cutting import tensors  # needs numpy

    try:
        return sorted(tensors(read_at, size), key=lambda run: (run.offset, run.size), reverse=True)
    except FormatError:
        return []


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in value)


def digests(file: Any, size: int, more: Callable[[int], object] | None = None) -> tuple[Digest, Tensors]:
    """Return the digest of an unbuffered file of `size` bytes, at its start, and its tensors (empty for a file without any)."""
    hashing = Hashing.of(file, size)
    digest, _ = copy_hashing(file, None, consumer=hashing, more=more)
    return digest, hashing.result() or ()


# ---- lists


def dump(tensors: Iterable[Tensor]) -> bytes:
    """Return the bytes of a list."""
    lines = (
        json.dumps([t.name, t.dtype, list(t.shape), t.size, t.digest.removeprefix("sha256:")], separators=(",", ":"))
        for t in tensors
    )
    text = _HEAD + ",\n".join(lines).encode() + b"\n" + _END
    return text + sha256_bytes(text).removeprefix("sha256:").encode() + b'"}\n'


def parse(raw: bytes, where: str) -> Tensors:
    """Parse the bytes of a list; FormatError for anything that `dump` did not make."""
    text, sums = raw[: -len('"}\n') - 64], raw[-len('"}\n') - 64 :]
    if not raw.startswith(_HEAD) or not text.endswith(_END) or sums != f'{sha256_bytes(text)[7:]}"}}\n'.encode():
        raise FormatError(where, "incomplete list of tensors", "Delete it; it is made again when needed")
    try:
        return tuple(_parsed(entry, where) for entry in json_file.parse_object(raw, where, memory=None)["tensors"])
    except (FormatError, ValueError, TypeError, KeyError) as error:
        raise FormatError(where, "invalid list of tensors") from error


def _parsed(entry: Any, where: str) -> Tensor:
    name, dtype, shape, size, sha256 = entry
    if not (isinstance(name, str) and isinstance(dtype, str) and type(size) is int and 0 <= size < 2**63):
        raise ValueError(name)
    return Tensor(name, dtype, _shape(shape), size, parse_digest(f"sha256:{sha256}", where))


class TensorLists:
    """The lists below a folder, which is created with the first one."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder = folder
        self._files = files
        self._unwritten: dict[Digest, Tensors] = {}

    def path(self, digest: Digest) -> Path:
        """Return the path of a blob's list; the caller has checked `digest`."""
        return self.folder / digest.removeprefix("sha256:")

    def read(self, digest: Digest) -> Tensors | None:
        """Read the tensors of a blob; None without a list, or with an incomplete or invalid one."""
        path = self.path(digest)
        try:
            return parse(self._files.read(path, _MAX), str(path))
        except (OSError, AdapterhubError):
            return self._unwritten.get(digest)

    def keep(self, digest: Digest, found: Tensors) -> None:
        """Write the list of a blob; in a store that cannot be written, hold it in memory.

        The list is not flushed: an incomplete one is recognized and made again.
        """
        final = self.path(digest)
        try:
            self._files.make_dir(final.parent)
            with self._files.temporary() as (path, file):
                write_all(file, dump(found))
                file.close()
                self._files.move(path, final)
        except (OSError, LocalIOError):
            self._unwritten[digest] = found

    def files(self) -> list[Path]:
        """List every file in the folder, sorted."""
        try:
            return self._files.listed(self.folder)
        except FileNotFoundError:
            return []

    def digests(self) -> Iterator[Digest]:
        """Yield the digest of every blob that has a list."""
        return (f"sha256:{path.name}" for path in self.files() if is_hex(path.name))
