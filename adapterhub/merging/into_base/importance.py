"""Importance matrices of llama-imatrix: how much each tensor's columns matter when it is quantized.

A GGUF file has for each tensor the sums of squared activations, `NAME.in_sum2`, and how often they were summed, `NAME.counts`
(llama.cpp, tools/imatrix); an older file has only names and numbers (common/imatrix-loader.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import MAGIC, MetadataValue, string_value, u32_value
from adapterhub_converters.containers.open_file import open_regular, read_bytes
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

_MAX = 4 << 30  # bytes; the matrix of a model with 235 billion parameters takes 0.3 GB
_SUMS, _COUNTS = ".in_sum2", ".counts"
_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_MAX_TEXT = 127  # bytes of a text that llama-quantize writes at most


@dataclass(frozen=True, eq=False, repr=False)
class Importance:
    """An importance matrix.

    Attributes:
        where: Its file.
        values: Tensor of the GGUF model to a number for each column, one expert after another.
        dataset: The text that it was computed from; None if it is unknown.
        chunks: The number of pieces of that text.
    """

    where: str
    values: Mapping[str, NDArray[np.float32]]
    dataset: str | None = None
    chunks: int = 0

    def __repr__(self) -> str:
        return f"<Importance {self.where}: {len(self.values)} tensors>"

    def metadata(self) -> dict[str, MetadataValue]:
        """Return the metadata of a model quantized with this matrix; of the file's path only the name is recorded."""
        metadata = {"quantize.imatrix.file": string_value(_shortened(Path(self.where).name))}
        if self.dataset is not None:
            metadata["quantize.imatrix.dataset"] = string_value(_shortened(self.dataset))
        metadata["quantize.imatrix.entries_count"] = u32_value(len(self.values))
        return metadata | ({"quantize.imatrix.chunks_count": u32_value(self.chunks)} if self.chunks > 0 else {})


def _shortened(text: str) -> str:
    return text.encode()[:_MAX_TEXT].decode(errors="ignore")


def read_importance(path: Path) -> Importance:
    """Read an importance matrix of llama-imatrix, in GGUF or in its older format; FormatError if it is neither."""
    if not path.is_file():
        raise NotFoundError(str(path), "no such file", code="no-such-file")
    try:
        if path.stat().st_size > _MAX:
            raise FormatError(str(path), f"more than {_MAX} bytes: not an importance matrix")
        with open_regular(path) as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        importance = _read_gguf(path) if is_gguf else _read_legacy(read_bytes(path), str(path))
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
    if nonfinite_name := next((name for name, values in importance.values.items() if not np.isfinite(values).all()), None):
        raise FormatError(str(path), f"{nonfinite_name[:80]}: NaN or Inf")
    return importance


def _read_gguf(path: Path) -> Importance:
    location = str(path)
    with GGUFFile(path) as file:
        metadata = file.header.metadata
        lacking = next((key for key in _KEYS if key not in metadata), None)
        if lacking:
            raise FormatError(location, f"no {lacking}: not an importance matrix")
        names = {name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)}
        if not names or names != {name.removesuffix(_COUNTS) for name in file.tensors if name.endswith(_COUNTS)}:
            raise FormatError(location, "no tensors of sums, or not for the same names as the counts")
        values = {name: _mean(file, name, location) for name in sorted(names)}
    datasets, chunks = metadata["imatrix.datasets"], metadata["imatrix.chunk_count"]
    if not isinstance(chunks, int):
        raise FormatError(location, "imatrix.chunk_count is not a number")
    dataset = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], str) else None
    return Importance(location, values, dataset, chunks)


def _mean(file: GGUFFile, name: str, location: str) -> NDArray[np.float32]:
    pair = [file.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS)]
    if any(info is None or info.type_name != "F32" for info in pair):
        raise FormatError(location, f"{name[:80]}: sums and counts must be two tensors in F32")
    sums, counts = (file.tensor(name + suffix).reshape(-1) for suffix in (_SUMS, _COUNTS))
    if not counts.size or sums.size % counts.size or not np.isfinite(counts).all():
        raise FormatError(location, f"{name[:80]}: {sums.size} sums for {counts.size} counts")
    rows = sums.reshape(counts.size, -1)
    times = np.floor(np.abs(counts) + np.float32(0.5)) * np.sign(counts)  # lround
    with np.errstate(all="ignore"):
        # An expert that was never used weighs all its columns alike.
        means = np.where(times[:, None] > 0, rows / times[:, None], np.float32(1))
    return means.astype(np.float32).reshape(-1)


def _read_legacy(raw: bytes, location: str) -> Importance:
    offset, values = 4, dict[str, NDArray[np.float32]]()
    try:
        (count,) = struct.unpack_from("<i", raw, 0)
        if count < 1 or count > len(raw) // 12:
            raise FormatError(location, "neither a GGUF nor an importance matrix")
        for _ in range(count):
            (length,) = struct.unpack_from("<i", raw, offset)
            if not 0 <= length <= len(raw) - offset:
                raise FormatError(location, "a name that ends outside of the file")
            name = raw[offset + 4 : offset + 4 + length].partition(b"\0")[0].decode(errors="replace")
            calls, size = struct.unpack_from("<ii", raw, offset + 4 + length)
            offset += 12 + length
            if size < 1 or size > (len(raw) - offset) // 4:
                raise FormatError(location, f"{name[:80]}: numbers that end outside of the file")
            sums = np.frombuffer(raw, "<f4", size, offset).astype(np.float32)
            values[name] = sums / np.float32(calls) if calls > 0 else sums
            offset += 4 * size
        chunks, dataset = 0, None
        if len(raw) >= offset + 8:
            chunks, length = struct.unpack_from("<ii", raw, offset)
            text = raw[offset + 8 : offset + 8 + max(0, length)]
            dataset = text.partition(b"\0")[0].decode(errors="replace") if 0 < length == len(text) else None
    except struct.error as error:
        raise FormatError(location, "truncated, or not an importance matrix") from error
    return Importance(location, values, dataset, chunks)
