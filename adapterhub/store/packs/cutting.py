"""A file as runs of numbers of one width, and each beside the same numbers in a parent.

A tensor's place and type come from the header of its file, read by the bounded readers; a file of any other kind, or one
whose header is malformed, is one run of bytes. Whatever is said here of a file, its bytes come back as they were: a
wrong width would only compress worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from adapterhub_converters import dtypes
from adapterhub_converters.containers import gguf_file, safetensors_file
from adapterhub_converters.errors import FormatError

_NONE: Mapping[str, str] = MappingProxyType({})
ReadAt = Callable[[int, int], bytes]
"""Bytes at an offset; fewer only where the file ends."""

MAX_BLOCK = 1 << 20  # bytes; larger compresses no better and leaves the cache


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that are coded alike.

    Attributes:
        size: In bytes, a multiple of `width`.
        width: Bytes of a number; 1 where they are none.
        key: What the run is: a tensor's name, type and shape; empty for what lies between tensors.
        parent: Offset of the same tensor in the parent.
    """

    offset: int
    size: int
    width: int
    key: tuple[object, ...] = ()
    parent: int | None = None


def runs(read_at: ReadAt, size: int) -> list[Run]:
    """A file of `size` bytes from its first byte to its last."""
    try:
        found = tensors(read_at, size)
    except FormatError:
        found = []
    return list(_filled(found, size))


def tensors(read_at: ReadAt, size: int) -> list[Run]:
    """The tensors of a safetensors or GGUF file; FormatError for what is neither."""
    if read_at(0, 4) == gguf_file.MAGIC:
        found = gguf_file.read_header(read_at, size, "").tensors.values()
        return [_run(tensor.offset, tensor.size, tensor.type_name, tensor.name, tensor.shape) for tensor in found]
    infos = safetensors_file.read_header(read_at, size, "").tensors.values()
    return [_run(info.offset, info.size, info.dtype, info.name, info.shape) for info in infos]


def _run(offset: int, size: int, kind: str, name: str, shape: tuple[int, ...]) -> Run:
    # A complex number is two floats; a type that numpy lacks, or of less than a byte, is bytes.
    width = 4 if kind == "C64" else dtypes.NUMPY[kind].itemsize if kind in dtypes.NUMPY else 1
    return Run(offset, size, width, (name, kind, shape))


def _filled(found: list[Run], size: int) -> Iterator[Run]:
    """`found` in order, and what lies before, between and after them."""
    position = 0
    for run in sorted(found, key=lambda run: run.offset):
        if not run.size:
            continue
        if run.offset > position:
            yield Run(position, run.offset - position, 1)
        yield run
        position = run.offset + run.size
    if position < size:
        yield Run(position, size - position, 1)


def matched(child: list[Run], parent: list[Run], equal: Mapping[str, str] = _NONE) -> list[Run]:
    """`child` with the places of the same tensors in `parent`: the same name, type and shape.

    `equal`: What a tensor of the child is called in the parent whose bytes are known to be the same.
    """
    places = {run.key: run.offset for run in parent if run.key}
    named = {run.key[0]: run for run in parent if run.key}

    def place(run: Run) -> int | None:
        twin = named.get(equal.get(str(run.key[0]), "")) if run.key else None
        if twin is not None and twin.size == run.size:
            return twin.offset
        return places.get(run.key) if run.key else None

    return [Run(run.offset, run.size, run.width, run.key, place(run)) for run in child]


def blocks(found: list[Run], limit: int = MAX_BLOCK) -> Iterator[Run]:
    """Runs as blocks of at most `limit` bytes, a multiple of 8: large ones are cut, small ones of a kind joined."""
    at: Run | None = None
    for run in found:
        rest = run
        while rest.size:
            if at is not None and (at.size >= limit or not _follows(at, rest)):
                yield at
                at = None
            taken = min(rest.size, limit - (at.size if at else 0))
            at = Run(rest.offset, taken, rest.width, (), rest.parent) if at is None else _longer(at, taken)
            rest = _after(rest, taken)
    if at is not None:
        yield at


def _follows(at: Run, run: Run) -> bool:
    if at.parent is None or run.parent is None:
        return at.width == run.width and at.parent is run.parent
    return at.width == run.width and at.parent + at.size == run.parent


def _longer(at: Run, more: int) -> Run:
    return Run(at.offset, at.size + more, at.width, (), at.parent)


def _after(run: Run, taken: int) -> Run:
    return Run(run.offset + taken, run.size - taken, run.width, run.key, None if run.parent is None else run.parent + taken)
