"""The division of a file into runs of numbers of one width, each matched with the same numbers in a parent.

Offset and type of a tensor come from the header of its file, read by the bounded readers; a file of another kind, or with a
malformed header, is one run of bytes. The division does not affect the decoded bytes: a wrong width only compresses worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from adapterhub_converters import dtypes
from adapterhub_converters.containers import gguf_file, gguf_types, safetensors_header
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

_NO_MATCHES: Mapping[str, str] = MappingProxyType({})
ReadAt = Callable[[int, int], bytes]
"""Returns bytes at an offset; fewer only at the end of the file."""

MAX_BLOCK = 1 << 20  # bytes; larger blocks compress no better and exceed the CPU cache


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that are encoded alike.

    Attributes:
        size: In bytes, a multiple of `width`.
        width: Bytes per number; 1 for bytes that are not numbers.
        key: Name, type and shape of a tensor; empty for bytes between tensors.
        parent: Offset of the same tensor in the parent.
    """

    offset: int
    size: int
    width: int
    key: tuple[object, ...] = ()
    parent: int | None = None


def runs(read_at: ReadAt, size: int) -> list[Run]:
    """Divide a file of `size` bytes into runs, from its first byte to its last."""
    try:
        tensor_runs = tensors(read_at, size)
    except FormatError:
        tensor_runs = []
    return list(_with_gaps(tensor_runs, size))


def tensors(read_at: ReadAt, size: int) -> list[Run]:
    """Return the tensors of a safetensors or GGUF file as runs; FormatError for any other file."""
    if read_at(0, 4) == gguf_types.MAGIC:
        gguf_tensors = gguf_file.read_header(read_at, size, "").tensors.values()
        return [_run(tensor.offset, tensor.size, tensor.type_name, tensor.name, tensor.shape) for tensor in gguf_tensors]
    infos = safetensors_header.read_header(read_at, size, "").tensors.values()
    return [_run(info.offset, info.size, info.dtype, info.name, info.shape) for info in infos]


def _run(offset: int, size: int, kind: str, name: str, shape: tuple[int, ...]) -> Run:
    # A complex number is two floats; a type that numpy lacks, or that is smaller than a byte, is encoded as bytes.
    width = 4 if kind == "C64" else dtypes.BITS[kind] // 8 if kind in dtypes.NUMPY else 1
    return Run(offset, size, width, (name, kind, shape))


def _with_gaps(tensor_runs: list[Run], size: int) -> Iterator[Run]:
    """Yield the runs in order, with runs of bytes for the gaps before, between and after them."""
    position = 0
    for run in sorted(tensor_runs, key=lambda run: run.offset):
        # A tensor without numbers may have the offset of the next one.
        if not run.size:
            continue
        if run.offset > position:
            yield Run(position, run.offset - position, 1)
        yield run
        position = run.offset + run.size
    if position < size:
        yield Run(position, size - position, 1)


def match_to_parent(child: list[Run], parent: list[Run], equal: Mapping[str, str] = _NO_MATCHES) -> list[Run]:
    """Return `child` with the offsets of the same tensors in `parent`: those with the same name, type and shape.

    Args:
        child: The runs of a file.
        parent: The runs of another file.
        equal: Name of a tensor in the child to the name of one in the parent that is known to have the same bytes.
    """
    # By type and shape too: a difference of numbers that are not in the same places is larger than the numbers.
    places = {run.key: run.offset for run in parent if run.key}
    named = {run.key[0]: run for run in parent if run.key}

    def place(run: Run) -> int | None:
        # A tensor with the same bytes under another name is a better match than one with the same name.
        twin = named.get(equal.get(str(run.key[0]), "")) if run.key else None
        if twin is not None and twin.size == run.size:
            return twin.offset
        return places.get(run.key) if run.key else None

    return [Run(run.offset, run.size, run.width, run.key, place(run)) for run in child]


def blocks(file_runs: list[Run], limit: int = MAX_BLOCK) -> Iterator[Run]:
    """Yield runs as blocks of at most `limit` bytes, a multiple of 8: large runs are cut, small ones of one width joined."""
    block: Run | None = None
    for run in file_runs:
        remainder = run
        while remainder.size:
            if block is not None and (block.size >= limit or not _follows(block, remainder)):
                yield block
                block = None
            count = min(remainder.size, limit - (block.size if block else 0))
            block = (
                Run(remainder.offset, count, remainder.width, (), remainder.parent) if block is None else _longer(block, count)
            )
            remainder = _after(remainder, count)
    if block is not None:
        yield block


def _follows(block: Run, run: Run) -> bool:
    # A block has one offset in the parent, so its runs must follow each other there as well.
    if block.parent is None or run.parent is None:
        return block.width == run.width and block.parent is run.parent
    return block.width == run.width and block.parent + block.size == run.parent


def _longer(block: Run, count: int) -> Run:
    return Run(block.offset, block.size + count, block.width, (), block.parent)


def _after(run: Run, count: int) -> Run:
    return Run(run.offset + count, run.size - count, run.width, run.key, None if run.parent is None else run.parent + count)
