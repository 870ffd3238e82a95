"""Output of GGUF files: headers and whole files as reproducible bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.errors import LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

from .gguf_types import ALIGNMENT, ARRAY, MAGIC, SCALARS, TYPES, VALUE_IDS, MetadataValue, align, tensor_size
from .safetensors_file import byte_view, release


def header_bytes(
    metadata: Mapping[str, MetadataValue], tensors: Iterable[tuple[str, str, tuple[int, ...]]], alignment: int = ALIGNMENT
) -> bytes:
    """Return the bytes before the data of a version 3 file with `tensors` (name, type, numpy shape) in the given order.

    An `alignment` other than the default must agree with `metadata`.
    """
    infos: list[bytes] = []
    offset = 0
    for name, type_name, shape in tensors:
        number, _, _ = TYPES[type_name]
        infos.append(_pack_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset))
        offset = align(offset + tensor_size(f"tensor {name!r}", type_name, shape, "gguf"), alignment)
    parts = [MAGIC, struct.pack("<IQQ", 3, len(infos), len(metadata))]
    parts += [_pack_string(key) + _pack_value(value) for key, value in metadata.items()]
    head = b"".join(parts + infos)
    return head + b"\0" * (-len(head) % alignment)


def _pack_string(text: str) -> bytes:
    """Return a string with its length before it."""
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def _pack_value(value: MetadataValue) -> bytes:
    if not value.kind.startswith("["):
        return VALUE_IDS[value.kind].to_bytes(4, "little") + _pack_items(value.kind, [value.value])
    kind = value.kind[1:-1]
    head = struct.pack("<IIQ", ARRAY, VALUE_IDS[kind], len(value.value))
    return head + _pack_items(kind, value.value)


def _pack_items(kind: str, items: Sequence[Any]) -> bytes:
    if kind == "STRING":
        return b"".join(map(_pack_string, items))
    return np.asarray(items, SCALARS[VALUE_IDS[kind]][1]).tobytes()


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """A quantized tensor: its type, its logical shape in numpy's order, and its blocks."""

    type_name: str
    shape: tuple[int, ...]
    blocks: np.ndarray


def write(
    path: Path,
    metadata: Mapping[str, MetadataValue],
    tensors: Mapping[str, np.ndarray | QuantizedTensor],
    final_values: Callable[[], Mapping[str, MetadataValue]] | None = None,
) -> None:
    """Write a version 3 file with just these keys and tensors, in the given order; incomplete if the process is killed.

    Tensors are floats or integers of a dtype that GGUF supports, or already quantized. `final_values` is called once the
    tensors are written: it returns the final values of keys in `metadata` that had placeholders of the same size.
    """
    entries = [
        (name, tensor.type_name if isinstance(tensor, QuantizedTensor) else dtypes.name_of(tensor.dtype), tensor.shape)
        for name, tensor in tensors.items()
    ]
    try:
        with open(path, "wb") as file:
            header = header_bytes(metadata, entries)
            file.write(header)
            for tensor in tensors.values():
                array = tensor.blocks if isinstance(tensor, QuantizedTensor) else tensor
                data = byte_view(np.ascontiguousarray(array))
                file.write(data)
                file.write(b"\0" * (-len(data) % ALIGNMENT))
                release(array)
            # The header has the same size, so only its bytes are replaced.
            complete = header_bytes({**metadata, **final_values()}, entries) if final_values else header
            if complete != header:
                if len(complete) != len(header):
                    raise ValueError("a late value differs in size from its placeholder")
                file.seek(0)
                file.write(complete)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
