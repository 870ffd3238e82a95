"""The tensors of a file of weights, each by the digest of its own bytes: what two files share, whatever else differs.

Such a list is derived from the file alone. In a store it lies under the file's digest (`tensors/sha256/<hex>`): JSON, one line
a tensor, and at last the digest of all above it, so that half a list, as a power cut may leave one, is none.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, copy_hashing, is_hex, parse_digest, sha256_bytes
from adapterhub_converters.errors import AdapterhubError, FormatError

if TYPE_CHECKING:
    from adapterhub.store.packs.cutting import ReadAt, Run

_HEAD = b'{"version":1,"tensors":[\n'
_END = b'],"sha256":"'
_MAX = 256 << 20  # bytes of a list


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file: `dtype` in the file's own words, `size` in bytes, `digest` of these."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    digest: Digest


Tensors = tuple[Tensor, ...]
"""Of one file, as they lie in it."""


class Hashing:
    """The digests of a file's tensors, made as its bytes pass, from the first to the last."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        """Of a file of `size` bytes."""
        self._size = size
        self._todo = _runs(read_at, size)
        self._found: list[Tensor] = []
        self._position = 0
        self._state = hashlib.sha256()

    @classmethod
    def of(cls, file: Any, size: int) -> Hashing:
        """Of an unbuffered file, plain or packed, that is at its start and still is afterwards."""
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
        """Take the bytes that come next."""
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
        """All tensors; None where the file turned out not to be as long as it was said to be."""
        if self._position != self._size:
            return None
        while self._todo and not self._todo[-1].size:  # at the very end
            self._close()
        return None if self._todo else tuple(self._found)


def _runs(read_at: ReadAt, size: int) -> list[Run]:
    """Where the tensors are, the last one first; none in what is no file of tensors."""
    from adapterhub.store.packs.cutting import tensors

    try:
        return sorted(tensors(read_at, size), key=lambda run: (run.offset, run.size), reverse=True)
    except FormatError:
        return []


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(length) for length in value)


def digests(file: Any, size: int, more: Callable[[int], object] | None = None) -> tuple[Digest, Tensors]:
    """The digest of an unbuffered file of `size` bytes that is at its start, and its tensors; none in what has none."""
    hashing = Hashing.of(file, size)
    digest, _ = copy_hashing(file, None, consumer=hashing, more=more)
    return digest, hashing.result() or ()


# ---- lists


def dump(tensors: Iterable[Tensor]) -> bytes:
    """The bytes of a list."""
    lines = (
        json.dumps([t.name, t.dtype, list(t.shape), t.size, t.digest.removeprefix("sha256:")], separators=(",", ":"))
        for t in tensors
    )
    text = _HEAD + ",\n".join(lines).encode() + b"\n" + _END
    return text + sha256_bytes(text).removeprefix("sha256:").encode() + b'"}\n'


def parse(raw: bytes, where: str) -> Tensors:
    """The tensors in the bytes of a list; FormatError for what `dump` did not make."""
    text, sums = raw[: -len('"}\n') - 64], raw[-len('"}\n') - 64 :]
    if not raw.startswith(_HEAD) or not text.endswith(_END) or sums != f'{sha256_bytes(text)[7:]}"}}\n'.encode():
        raise FormatError(where, "not a whole list of tensors", "Run `adapterhub fsck --rebuild-index`")
    try:
        return tuple(_parsed(entry, where) for entry in json.loads(raw)["tensors"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(where, "a list of tensors that makes no sense") from error


def _parsed(entry: Any, where: str) -> Tensor:
    name, dtype, shape, size, sha256 = entry
    if not (isinstance(name, str) and isinstance(dtype, str) and type(size) is int and 0 <= size < 2**63):
        raise ValueError(name)
    return Tensor(name, dtype, _shape(shape), size, parse_digest(f"sha256:{sha256}", where))


class Lists:
    """The lists below a folder, which need not be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: Digest) -> Path:
        """Where the list of a blob lies, or would; `digest` has been checked."""
        return self.folder / digest.removeprefix("sha256:")

    def read(self, digest: Digest) -> Tensors | None:
        """The tensors of a blob; None where there is no list, or none that can be believed."""
        path = self.path(digest)
        try:
            with open(path, "rb") as file:
                return parse(file.read(_MAX), str(path))
        except (OSError, AdapterhubError):
            return None

    def files(self) -> list[Path]:
        """Every file where lists lie, sorted."""
        try:
            return sorted(self.folder.iterdir())
        except FileNotFoundError:
            return []

    def digests(self) -> Iterator[Digest]:
        """Of every blob that has a list."""
        return (f"sha256:{path.name}" for path in self.files() if is_hex(path.name))


# ---- in the index


def key(digest: Digest) -> int:
    """The first 64 bits of a digest as SQLite's INTEGER, in the order of the digests."""
    return int(digest.removeprefix("sha256:")[:16], 16) - 2**63


def keys(prefix: str) -> tuple[int, int]:
    """The least and the greatest key of the digests that begin so."""
    digits = re.sub("^sha256:", "", prefix)[:16]
    return key(digits.ljust(16, "0")), key(digits.ljust(16, "f"))


def shared(tensors: Sequence[Tensor], others: Iterable[Tensor]) -> list[Tensor]:
    """Those of `tensors`, but empty ones, whose bytes are among the others', under whatever name."""
    there = {(other.digest, other.size) for other in others}
    return [tensor for tensor in tensors if tensor.size and (tensor.digest, tensor.size) in there]
