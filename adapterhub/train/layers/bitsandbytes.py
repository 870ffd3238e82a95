"""A matrix in NF4 out of the tensors in which bitsandbytes stores it, and back (`adapterhub_converters.bases.bitsandbytes`).

Codes are taken as they are; whatever would make them mean something else is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from adapterhub_converters.bases.bitsandbytes import BESIDE, BLOCK, NESTED_BLOCK, NF4_STATE, STATE, nf4_state
from adapterhub_converters.errors import FormatError, RefusedError

from . import nf4
from .nf4 import NF4

_BESIDE = tuple(f".{part}" for part in BESIDE)

Array = np.ndarray
Read = Callable[[str], Array]


def is_beside(name: str) -> bool:
    """Whether a tensor of this name only says how to read another."""
    return STATE in name or (".weight." in name and name.endswith(_BESIDE))


def parts(name: str, matrix: NF4, stored: str) -> dict[str, Array]:
    """The tensors that hold `matrix` under the name of its weight, whose dtype in safetensors' words was `stored`."""
    state = nf4_state(matrix.shape, stored, None if matrix.offset is None else float(matrix.offset))
    found = {name: matrix.packed.view(-1, 1), f"{name}.absmax": matrix.absmax, f"{name}.quant_map": nf4.CODE}
    if matrix.offset is not None:
        found |= {f"{name}.nested_absmax": matrix.nested, f"{name}.nested_quant_map": nf4.dynamic_map()}
    arrays = {key: value.cpu().numpy() for key, value in found.items()}
    arrays[f"{name}{NF4_STATE}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return arrays


def read(name: str, tensor: Read, state: str, where: str) -> NF4:
    """The matrix whose weight is called `name`; `tensor` reads what lies beside it, `state` is the name of its JSON.

    Raises:
        RefusedError: It is FP4, or in blocks or with code books of another kind than QLoRA's.
        FormatError: Its parts don't fit together.
    """
    kind = state.rpartition(STATE)[2]
    if kind != "nf4":
        raise RefusedError(f"{where}: {name}", f"is stored in {kind.upper()}, and only NF4 is taken as it is")
    try:
        said = json.loads(tensor(state).tobytes())
        shape = tuple(int(size) for size in said["shape"])
        block, nested_block = said["blocksize"], said.get("nested_blocksize")
        offset = None if nested_block is None else float(said["nested_offset"])
        if offset is not None and not math.isfinite(offset):
            raise ValueError("an offset that is no number")
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: {state}", "isn't the JSON that bitsandbytes writes") from error
    if block != BLOCK or nested_block not in (None, NESTED_BLOCK):
        raise RefusedError(f"{where}: {name}", f"is in blocks of {block} and {nested_block}, not of {BLOCK} and {NESTED_BLOCK}")
    _check_map(f"{name}.quant_map", tensor, nf4.CODE, where)
    matrix = NF4(_bytes(name, tensor), torch.from_numpy(tensor(f"{name}.absmax")).view(-1), None, None, shape)
    if offset is not None:
        _check_map(f"{name}.nested_quant_map", tensor, nf4.dynamic_map(), where)
        nested = torch.from_numpy(tensor(f"{name}.nested_absmax")).view(-1)
        matrix = NF4(matrix.packed, matrix.absmax, nested, torch.tensor(offset), shape)
    _check_sizes(name, matrix, where)
    return matrix


def _bytes(name: str, tensor: Read) -> Any:
    # bnb_4bit_quant_storage may be any dtype of whole bytes: the codes are the same.
    return torch.from_numpy(np.ascontiguousarray(tensor(name)).reshape(-1).view(np.uint8))


def _check_map(name: str, tensor: Read, wanted: Any, where: str) -> None:
    if not np.array_equal(tensor(name).reshape(-1), wanted.numpy()):
        raise RefusedError(f"{where}: {name}", "is another code book than QLoRA's")


def _check_sizes(name: str, matrix: NF4, where: str) -> None:
    count = int(np.prod(matrix.shape, dtype=object))
    blocks = -(count // -BLOCK)
    fits = matrix.packed.numel() == (count + 1) // 2 and matrix.absmax.numel() == blocks
    if matrix.nested is None:
        fits = fits and matrix.absmax.dtype == torch.float32
    else:
        fits = fits and matrix.absmax.dtype == torch.uint8 and matrix.nested.dtype == torch.float32
        fits = fits and matrix.nested.numel() == -(blocks // -NESTED_BLOCK)
    if not fits or min(matrix.shape, default=0) < 0:
        raise FormatError(f"{where}: {name}", f"its parts aren't those of a matrix of shape {matrix.shape}")
