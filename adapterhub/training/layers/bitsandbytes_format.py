"""Readers and writers of NF4 matrices as bitsandbytes stores them (`adapterhub_converters.bases.bitsandbytes_state`).

Codes are taken unchanged; anything that would change their meaning is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from adapterhub_converters.bases.bitsandbytes_state import (
    BLOCK,
    COMPANION_SUFFIXES,
    NESTED_BLOCK,
    NF4_STATE,
    STATE_INFIX,
    nf4_state,
)
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError

from . import nf4_matrix
from .nf4_matrix import NF4

_PART_SUFFIXES = tuple(f".{part}" for part in COMPANION_SUFFIXES)

Array = np.ndarray
ReadTensor = Callable[[str], Array]


def is_part(name: str) -> bool:
    """Return whether a tensor with this name only describes how to read another."""
    return STATE_INFIX in name or (".weight." in name and name.endswith(_PART_SUFFIXES))


def tensors_of(name: str, matrix: NF4, stored: str) -> dict[str, Array]:
    """Return the tensors of `matrix`, a weight called `name`; `stored` is safetensors' name of the dtype it had before."""
    state = nf4_state(matrix.shape, stored, None if matrix.offset is None else float(matrix.offset))
    tensors = {name: matrix.packed.view(-1, 1), f"{name}.absmax": matrix.absmax, f"{name}.quant_map": nf4_matrix.CODE}
    if matrix.offset is not None:
        tensors |= {f"{name}.nested_absmax": matrix.nested, f"{name}.nested_quant_map": nf4_matrix.dynamic_map()}
    arrays = {key: value.cpu().numpy() for key, value in tensors.items()}
    arrays[f"{name}{NF4_STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return arrays


def read(name: str, tensor: ReadTensor, state: str, location: str) -> NF4:
    """Read the matrix whose weight is called `name`.

    Args:
        tensor: Reads a tensor by name.
        state: The name of the tensor that contains its JSON.

    Raises:
        RefusedError: It is FP4, or its block sizes or code books are not QLoRA's.
        FormatError: Its parts do not fit together.
    """
    quantization = state.rpartition(STATE_INFIX)[2]
    if quantization != "nf4":
        raise RefusedError(f"{location}: {name}", f"is stored in {quantization.upper()}; only NF4 is supported")
    try:
        document = json_file.parse_object(tensor(state).tobytes(), f"{location}: {state}")
        shape = tuple(int(size) for size in document["shape"])
        block, nested_block = document["blocksize"], document.get("nested_blocksize")
        offset = None if nested_block is None else float(document["nested_offset"])
        # A number such as 1e999 is infinite in Python, which would spread to every weight.
        if offset is not None and not math.isfinite(offset):
            raise ValueError("the offset is not finite")
    except (FormatError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FormatError(f"{location}: {state}", "is not the JSON that bitsandbytes writes") from error
    if block != BLOCK or nested_block not in (None, NESTED_BLOCK):
        raise RefusedError(
            f"{location}: {name}", f"has block sizes {block} and {nested_block}; only {BLOCK} and {NESTED_BLOCK} are supported"
        )
    _check_code_book(f"{name}.quant_map", tensor, nf4_matrix.CODE, location)
    matrix = NF4(_packed_bytes(name, tensor), torch.from_numpy(tensor(f"{name}.absmax")).view(-1), None, None, shape)
    if offset is not None:
        _check_code_book(f"{name}.nested_quant_map", tensor, nf4_matrix.dynamic_map(), location)
        nested = torch.from_numpy(tensor(f"{name}.nested_absmax")).view(-1)
        matrix = NF4(matrix.packed, matrix.absmax, nested, torch.tensor(offset), shape)
    _check_sizes(name, matrix, location)
    return matrix


def _packed_bytes(name: str, tensor: ReadTensor) -> Any:
    # bnb_4bit_quant_storage may be any dtype of whole bytes; the bytes of the codes are the same.
    return torch.from_numpy(np.ascontiguousarray(tensor(name)).reshape(-1).view(np.uint8))


def _check_code_book(name: str, tensor: ReadTensor, code_book: Any, location: str) -> None:
    # With another code book, the same codes would be other weights.
    if not np.array_equal(tensor(name).reshape(-1), code_book.numpy()):
        raise RefusedError(f"{location}: {name}", "is not the NF4 code book")


def _check_sizes(name: str, matrix: NF4, location: str) -> None:
    # dtype=object counts with Python's integers: a hostile shape must not overflow.
    count = int(np.prod(matrix.shape, dtype=object))
    blocks = -(count // -BLOCK)
    fits = matrix.packed.numel() == (count + 1) // 2 and matrix.absmax.numel() == blocks
    if matrix.nested is None:
        fits = fits and matrix.absmax.dtype == torch.float32
    else:
        fits = fits and matrix.absmax.dtype == torch.uint8 and matrix.nested.dtype == torch.float32
        fits = fits and matrix.nested.numel() == -(blocks // -NESTED_BLOCK)
    if not fits or min(matrix.shape, default=0) < 0:
        raise FormatError(f"{location}: {name}", f"its parts do not fit a matrix of shape {matrix.shape}")
