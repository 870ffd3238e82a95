"""The shapes a quantised checkpoint stands for, from its headers.

Each scheme packs a weight in its own way beside tensors of scales; an adapter sees the model before that. Sources:
bitsandbytes `functional.py` (`QuantState.as_dict`), transformers' and AutoGPTQ's and AutoAWQ's packings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapterhub_converters.errors import FormatError
from adapterhub_converters.files import json_file
from adapterhub_converters.files.safetensors_file import TensorInfo

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Parameter name to logical shape and dtype as stored."""

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE = 100_000  # bytes; a real one has about 200
# What lies beside a weight `name.weight`, by the end of its name.
_BESIDE = (
    ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", ".SCB", ".weight_format",
    ".weight_scale_inv", ".weight_scale", ".weight_scale_2", ".input_scale", ".activation_scale", ".qzeros", ".scales",
    ".g_idx",
)  # fmt: skip


def is_beside(name: str) -> bool:
    """Whether a tensor is no parameter but what a quantisation keeps beside one."""
    return _STATE in name or name.endswith(_BESIDE)


def states(tensors: Iterable[str]) -> list[str]:
    """The tensors whose bytes `logical` asks for."""
    return [name for name in tensors if _STATE in name]


def logical(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], read: Callable[[str], bytes], where: str) -> Shapes:
    """Names and shapes before quantisation; `read` gives the bytes of a small tensor.

    FormatError when a packed tensor contradicts its own description. A scheme that isn't known keeps what is stored.
    """
    method, bits = config.get("quant_method"), config.get("bits")
    found: Shapes = {}
    for name, info in tensors.items():
        if is_beside(name):
            continue
        if name.endswith(".qweight") and method in ("gptq", "awq") and bits in (2, 4, 8) and len(info.shape) == 2:
            rows, columns = info.shape
            pack = 32 // bits
            shape = (columns, rows * pack) if method == "gptq" else (columns * pack, rows)
            found[name.removesuffix(".qweight") + ".weight"] = (shape, method.upper())
        else:
            found[name] = (info.shape, info.dtype)
    for name in tensors:
        weight, state, kind = name.partition(_STATE)
        if state and weight in found:
            found[weight] = (_bnb_shape(tensors, weight, name, read, where), kind.upper())
    return found


def _bnb_shape(
    tensors: Mapping[str, TensorInfo], weight: str, state: str, read: Callable[[str], bytes], where: str
) -> tuple[int, ...]:
    if tensors[state].size > _MAX_STATE:
        raise FormatError(where, f"{state}: {tensors[state].size} bytes are no quantisation state")
    try:
        text = read(state).decode()
    except UnicodeDecodeError as error:
        raise FormatError(where, f"{state}: not UTF-8") from error
    shape = json_file.parse_object(text, f"{where}: {state}").get("shape")
    if not isinstance(shape, list) or not all(isinstance(dim, int) and not isinstance(dim, bool) and dim > 0 for dim in shape):
        raise FormatError(where, f"{state}: says no shape")
    count = 1
    for dim in shape:
        count *= dim
    # Two numbers a byte, the last byte perhaps half used.
    if (count + 1) // 2 != tensors[weight].size:
        raise FormatError(where, f"{weight}: {tensors[weight].size} bytes are not {shape} in four bits")
    return tuple(shape)
