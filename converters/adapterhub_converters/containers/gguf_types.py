"""Types of values and tensors in GGUF files: their numbers, their sizes, and values of metadata that know their type.

The format is that of ggml's `docs/gguf.md`, and of llama.cpp's `gguf.cpp` for anything it leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes; the default of `general.alignment`

# Value types of metadata (gguf.md, `gguf_metadata_value_type`).
SCALARS: dict[int, tuple[str, np.dtype]] = {
    0: ("UINT8", np.dtype("u1")),
    1: ("INT8", np.dtype("i1")),
    2: ("UINT16", np.dtype("<u2")),
    3: ("INT16", np.dtype("<i2")),
    4: ("UINT32", np.dtype("<u4")),
    5: ("INT32", np.dtype("<i4")),
    6: ("FLOAT32", np.dtype("<f4")),
    7: ("BOOL", np.dtype("?")),
    10: ("UINT64", np.dtype("<u8")),
    11: ("INT64", np.dtype("<i8")),
    12: ("FLOAT64", np.dtype("<f8")),
}
STRING, ARRAY = 8, 9
VALUE_IDS = {name: number for number, (name, _) in SCALARS.items()} | {"STRING": STRING}

# Tensor types: id, then elements and bytes of a block (ggml.c, `type_traits`). Types that ggml uses only in computations (Q8_1,
# Q8_K) or has removed do not occur in files.
TYPES: dict[str, tuple[int, int, int]] = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ2_XXS": (16, 256, 66),
    "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98),
    "IQ1_S": (19, 256, 50),
    "IQ4_NL": (20, 32, 18),
    "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82),
    "IQ4_XS": (23, 256, 136),
    "I8": (24, 1, 1),
    "I16": (25, 1, 2),
    "I32": (26, 1, 4),
    "I64": (27, 1, 8),
    "F64": (28, 1, 8),
    "IQ1_M": (29, 256, 56),
    "BF16": (30, 1, 2),
    "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66),
    "MXFP4": (39, 32, 17),
    "NVFP4": (40, 64, 36),
}
TYPE_NAMES = {number: name for name, (number, _, _) in TYPES.items()}
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "BF16": 32,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17,
}  # fmt: skip
"""The type of most tensors in a file, or the name of a mixture, to its number (llama.cpp, include/llama.h, `llama_ftype`)."""


def tensor_size(item: str, type_name: str, shape: Sequence[int], location: str) -> int:
    """Return the size of a tensor in bytes."""
    _, block, width = TYPES[type_name]
    if block > 1 and (not shape or shape[-1] % block):
        raise FormatError(
            location, f"{item}: rows of {shape[-1] if shape else 1} are not whole blocks of {type_name} ({block})"
        )
    count = 1
    for dim in shape:
        count *= dim
    # ggml counts elements and bytes in signed 64 bits; a dim of 0 must not excuse the others.
    if count // block * width >= 2**63 or any(dim >= 2**63 for dim in shape):
        raise FormatError(location, f"{item} is too large for any file")
    return count // block * width


def align(position: int, alignment: int) -> int:
    """Return the next multiple of `alignment` from a position on."""
    return position + -position % alignment


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """A metadata value with its type in the file: readers abort on an integer where they expect a float."""

    kind: str
    value: Any


def string_value(value: str) -> MetadataValue:
    """Return a text as a metadata value."""
    return MetadataValue("STRING", value)


def strings_value(values: Sequence[str]) -> MetadataValue:
    """Return a list of texts as a metadata value."""
    return MetadataValue("[STRING]", list(values))


def u32_value(value: int) -> MetadataValue:
    """Return an unsigned 32-bit integer, the usual type of counts, as a metadata value."""
    return MetadataValue("UINT32", value)


def f32_value(value: float) -> MetadataValue:
    """Return a 32-bit float as a metadata value."""
    return MetadataValue("FLOAT32", value)


def bool_value(value: bool) -> MetadataValue:
    """Return a boolean as a metadata value."""
    return MetadataValue("BOOL", value)
