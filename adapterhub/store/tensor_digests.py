"""Digests of the tensors in a file of weights: what two files have in common, whatever else differs.

A list is derived from the file alone. Hashing every tensor takes as long as hashing the file, so a list is not made by a push,
but when a search, a disk usage report or packing needs it, and kept in the store under the file's digest
(`tensors/sha256/<hex>`). It is JSON, one line per tensor, and ends with the digest of everything before it, which shows an
incomplete list, as after a power cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, copy_hashing, is_hex, parse_digest, sha256_bytes
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

from .store_files import StoreFiles, write_all

if TYPE_CHECKING:
    from adapterhub.store.packs.cutting import ReadAt, Run

_HEAD = b'{"version":1,"tensors":[\n'
_END = b'],"sha256":"'
_MAX_LIST = 256 << 20  # bytes of a list


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: `dtype` is as the file names it, `size` is in bytes, `digest` is that of these bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    digest: Digest


Tensors = tuple[Tensor, ...]
"""The tensors of one file, in file order."""


class Hashing:
    """Computes the digests of a file's tensors from its bytes, which are passed in order."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        """Read the header of a file of `size` bytes."""
        self._size = size
        self._pending_runs = _runs(read_at, size)
        self._tensors: list[Tensor] = []
        self._position = 0
        self._state = hashlib.sha256()

    @classmethod
    def for_file(cls, file: Any, size: int) -> Hashing:
        """Start on an unbuffered file, plain or packed, at its beginning; its position is unchanged afterwards."""
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
        """Hash the next bytes of the file."""
        end = self._position + len(piece)
        while self._pending_runs and (run := self._pending_runs[-1]).offset < end:
            start = max(run.offset, self._position)
            stop = min(run.offset + run.size, end)
            self._state.update(piece[start - self._position : stop - self._position])
            if stop < run.offset + run.size:
                break
            self._close()
        self._position = end

    def _close(self) -> None:
        run = self._pending_runs.pop()
        name, dtype, shape = run.key
        self._tensors.append(Tensor(str(name), str(dtype), _shape(shape), run.size, "sha256:" + self._state.hexdigest()))
        self._state = hashlib.sha256()

    def result(self) -> Tensors | None:
        """Return all tensors; None if the file was not as long as announced."""
        if self._position != self._size:
            return None
        while self._pending_runs and not self._pending_runs[-1].size:  # at the very end
            self._close()
        return None if self._pending_runs else tuple(self._tensors)


def _runs(read_at: ReadAt, size: int) -> list[Run]:
    """Return the positions of the tensors, last one first; empty for a file of another kind."""
    from adapterhub.store.packs.cutting import tensors  # needs numpy

    try:
        # `pop` takes the next one from the end of the list.
        return sorted(tensors(read_at, size), key=lambda run: (run.offset, run.size), reverse=True)
    except FormatError:
        return []


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in value)


def digests(file: Any, size: int, count_bytes: Callable[[int], object] | None = None) -> tuple[Digest, Tensors]:
    """Return the digest of an unbuffered file of `size` bytes, read from its beginning, and its tensors, if it has any."""
    hashing = Hashing.for_file(file, size)
    digest, _ = copy_hashing(file, None, consumer=hashing, on_bytes=count_bytes)
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


def parse(raw: bytes, location: str) -> Tensors:
    """Parse the bytes of a list; FormatError for anything that `dump` did not make."""
    text, checksum = raw[: -len('"}\n') - 64], raw[-len('"}\n') - 64 :]
    if not raw.startswith(_HEAD) or not text.endswith(_END) or checksum != f'{sha256_bytes(text)[7:]}"}}\n'.encode():
        raise FormatError(location, "incomplete list of tensors", "Delete it; it is made again when needed")
    try:
        return tuple(_parse_tensor(entry, location) for entry in json_file.parse_object(raw, location, memory=None)["tensors"])
    except (FormatError, ValueError, TypeError, KeyError) as error:
        raise FormatError(location, "invalid list of tensors") from error


def _parse_tensor(entry: Any, location: str) -> Tensor:
    name, dtype, shape, size, sha256 = entry
    if not (isinstance(name, str) and isinstance(dtype, str) and type(size) is int and 0 <= size < 2**63):
        raise ValueError(name)
    return Tensor(name, dtype, _shape(shape), size, parse_digest(f"sha256:{sha256}", location))


class TensorLists:
    """The lists below a folder, which is created with the first one."""

    def __init__(self, folder: Path, files: StoreFiles) -> None:
        self.folder = folder
        self._files = files
        self._unwritten: dict[Digest, Tensors] = {}

    def path(self, digest: Digest) -> Path:
        """Return the path of a blob's list; the caller has checked `digest`."""
        return self.folder / digest.removeprefix("sha256:")

    def read(self, digest: Digest) -> Tensors | None:
        """Return the tensors of a blob; None if its list is missing, incomplete or invalid."""
        path = self.path(digest)
        try:
            return parse(self._files.read(path, _MAX_LIST), str(path))
        except (OSError, AdapterhubError):  # an incomplete list is made again, as if it were missing
            return self._unwritten.get(digest)

    def keep(self, digest: Digest, tensors: Tensors) -> None:
        """Write the list of a blob; if the store cannot be written, keep it in memory.

        The list is not flushed: an incomplete one is recognized and made again.
        """
        final = self.path(digest)
        try:
            self._files.make_dir(final.parent)
            with self._files.temporary() as (path, file):
                write_all(file, dump(tensors))
                file.close()
                self._files.move(path, final)
        except (OSError, LocalIOError):
            self._unwritten[digest] = tensors

    def files(self) -> list[Path]:
        """Return every file in the folder, sorted."""
        try:
            return self._files.list_folder(self.folder)
        except FileNotFoundError:
            return []

    def digests(self) -> Iterator[Digest]:
        """Yield the digest of every blob that has a list."""
        return (f"sha256:{path.name}" for path in self.files() if is_hex(path.name))
