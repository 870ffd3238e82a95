"""Safetensors files: tensors read on demand or as views of the file, and files with reproducible bytes."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub_converters import dtypes
from adapterhub_converters.errors import FormatError, LocalIOError
from adapterhub_converters.lazy_imports import np

from .open_file import OpenFile
from .safetensors_header import SafetensorsHeader, TensorInfo, header_bytes, read_header, sorted_entries


# The header check is not combined with the safetensors library (0.8): its writer orders `__metadata__` by hashes that differ
# per run, so its files are not reproducible, and takes twice as long (168 MB: 0.17 s); its reader takes as long as this one
# (0.12 s), by default twice the memory, and has no views of the file.
class SafetensorsFile(OpenFile):
    """An open file, whose header is checked at once and whose tensors are read on demand. A context manager."""

    header: SafetensorsHeader

    def _parse(self, size: int) -> None:
        self._map: np.ndarray | None = None  # the bytes of the file; they outlive close() while a tensor is a view of them
        self.header = read_header(self._read_at, size, self.location)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name to info, in file order."""
        return self.header.tensors

    def arrays(self, *, as_views: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the values of every tensor in file order: views of the file if `as_views`, else in new memory."""
        read, header = self._map_view if as_views else self._read_new, self.header
        for name, kind, offset in zip(header.names, header.kinds, header.offsets(), strict=False):
            yield name, read(TensorInfo(name, kind.dtype, kind.shape, offset, kind.size))

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor in its own dtype and shape into new memory."""
        return self._read_new(self.header.tensors[name])

    def _read_new(self, info: TensorInfo) -> np.ndarray:
        dtype = dtypes.NUMPY.get(info.dtype)
        if dtype is None:
            raise FormatError(self.location, f"tensor {info.name!r}: {info.dtype} is not supported in computations")
        array = np.empty(info.shape, dtype)
        self.read_into(info, byte_view(array))
        return array

    def map_tensor(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view of the file, which takes memory once it is read (`release`).

        Use it only for files that nobody changes meanwhile: truncation would crash the process.
        """
        return self._map_view(self.header.tensors[name])

    def _map_view(self, info: TensorInfo) -> np.ndarray:
        dtype = dtypes.NUMPY.get(info.dtype)
        # `mmap` cannot map an empty range.
        if dtype is None or not info.size:
            return self._read_new(info)
        if self._map is None:
            try:
                self._map = np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            except (OSError, ValueError):  # a file system without mmap
                return self._read_new(info)
        return np.ndarray(info.shape, dtype, self._map, info.offset)

    def read_into(self, info: TensorInfo, buffer: memoryview, start: int = 0) -> None:
        """Fill `buffer` with the bytes of a tensor, from its byte `start` on."""
        self._fill(buffer, info.offset + start, info.name)


def byte_view(array: np.ndarray) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def release(array: np.ndarray) -> None:
    """Free the memory of the mapped file that `array` is a view of, until it is read again; do nothing for other arrays."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    owner = owner.obj if isinstance(owner, memoryview) else owner
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file, byte for byte as the safetensors library would. If the process is killed, `path` is incomplete."""
    order = sorted_entries((name, dtypes.name_of(array.dtype), array.shape) for name, array in tensors.items())
    try:
        with open(path, "wb") as file:
            file.write(header_bytes(order, metadata or {}))
            for name, _, _ in order:
                file.write(byte_view(np.ascontiguousarray(tensors[name])))
                release(tensors[name])
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
