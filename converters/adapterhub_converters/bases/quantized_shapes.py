"""Logical shapes of the weights of a quantized checkpoint, from its headers.

Each scheme packs a weight in its own way, with tensors of scales, while an adapter applies to the model before that. A weight
in an unknown layout, or whose tensors contradict each other, is reported as packed, never guessed. Sources: bitsandbytes
`functional.py` (`quantize_4bit`, `QuantState.as_dict`), GPTQModel's and AutoAWQ's packings, compressed-tensors
`pack_quantized.py`, transformers `integrations/mxfp4.py`, mlx `mlx/nn/layers/quantized.py`, NVIDIA ModelOpt's export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from adapterhub_converters import dtypes
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_header import TensorInfo
from adapterhub_converters.errors import FormatError

from .bitsandbytes_state import COMPANION_SUFFIXES, STATE_INFIX

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Parameter name to logical shape and dtype as stored."""
Leaves = Mapping[str, TensorInfo]
"""The tensors of one module, by the last part of their names."""
Shape = tuple[int, ...] | None
ReadTensor = Callable[[str], bytes]

_MAX_STATE = 100_000  # bytes; a real one has about 200
# Suffixes of the tensors that accompany a weight, in any scheme.
_COMPANIONS = {
    *(f"weight.{part}" for part in COMPANION_SUFFIXES), "SCB", "weight_format",
    "weight_scale_inv", "weight_scale", "weight_scale_2", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_global_scale", "input_scale", "output_scale", "activation_scale", "k_scale", "v_scale",
    "qzeros", "scales", "g_idx", "qweight", "weight_packed",
}  # fmt: skip
_INTEGER_DTYPES = {"I8", "U8", "I16", "U16", "I32", "U32"}
# Group sizes of MLX's modes, if the config leaves them out (mlx/ops.cpp, `quantization_params_from_mode`).
_MLX_GROUPS = {"affine": 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}


def parameter_name(name: str) -> str | None:
    """Return the parameter of a stored tensor, by its name alone; None for a tensor that only accompanies one."""
    module, leaf = _split_name(name)
    if STATE_INFIX in name:
        return None
    if leaf in ("qweight", "weight_packed"):
        return _join_name(module, "weight")
    return None if leaf in _COMPANIONS else name


def small_tensors(tensors: Iterable[str]) -> list[str]:
    """Return the tensors whose bytes `logical_shapes` reads."""
    return [name for name in tensors if STATE_INFIX in name or name.endswith(".weight_shape")]


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantization settings in a `config.json`; empty if there are none."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "quantization", "compression_config"):
            if isinstance(value := section.get(key), dict):
                return value
    return {}


def logical_shapes(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], read: ReadTensor, location: str
) -> tuple[Shapes, dict[str, str]]:
    """Return names and shapes before quantization, and the names of unknown shape with the reason.

    `read` returns the bytes of a small tensor.

    Raises:
        FormatError: A packed tensor contradicts its own description.
    """
    known_shapes: Shapes = {}
    packed_reasons: dict[str, str] = {}
    for module, leaves in _by_module(tensors).items():
        if config or _is_packed(leaves):
            shapes, reasons = _module_shapes(module, leaves, config, read)
            known_shapes |= shapes
            packed_reasons |= reasons
        else:
            known_shapes.update(
                {_join_name(module, leaf): (info.shape, info.dtype) for leaf, info in leaves.items() if leaf not in _COMPANIONS}
            )
    # A state of bitsandbytes says the shape itself: it overrides any guess from the packed tensor.
    for name in tensors:
        weight, state, kind = name.partition(STATE_INFIX)
        if state and weight in tensors:
            known_shapes[weight] = (_bnb_shape(tensors, weight, name, read, location), kind.upper())
            packed_reasons.pop(weight, None)
    return known_shapes, packed_reasons


def _by_module(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each module, without states of bitsandbytes."""
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if STATE_INFIX in name:
            continue
        module, leaf = _split_name(name)
        modules.setdefault(module, {})[leaf] = info
    return modules


def _split_name(name: str) -> tuple[str, str]:
    """Split the name of a tensor into its module and the rest, such as `weight` or `weight.absmax`."""
    module, separator, leaf = name.rpartition(".weight.")
    if separator:
        return module, f"weight.{leaf}"
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _join_name(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _is_packed(leaves: Leaves) -> bool:
    """Return whether a module has a packed weight."""
    weight = leaves.get("weight")
    return weight.dtype in _INTEGER_DTYPES if weight else any(leaf in leaves for leaf in ("qweight", "weight_packed"))


def _module_shapes(module: str, leaves: Leaves, config: Mapping[str, Any], read: ReadTensor) -> tuple[Shapes, dict[str, str]]:
    """Return the parameters of one module of a quantized checkpoint: those of known shape, and the others with the reason."""
    shapes: Shapes = {}
    packed_reasons: dict[str, str] = {}
    method, weight = str(config.get("quant_method") or config.get("mode") or "packed"), _join_name(module, "weight")
    companions = _COMPANIONS | ({"biases"} if _is_packed(leaves) else set())
    for leaf, info in leaves.items():
        stack = leaf.removesuffix("_blocks")
        if stack != leaf and f"{stack}_scales" in leaves:
            if (shape := _mxfp4_stack(info, leaves[f"{stack}_scales"])) is not None:
                shapes[_join_name(module, stack)] = (shape, "MXFP4")
            else:
                packed_reasons[_join_name(module, stack)] = f"stored as {method} {info.shape}"
        elif leaf in companions or leaf.startswith("weight.") or leaf.endswith(("_scales", "_scale_inv", "_scale")):
            continue
        elif leaf != "weight" or info.dtype not in _INTEGER_DTYPES:
            shapes[_join_name(module, leaf)] = (info.shape, info.dtype)
    # A module may have its weight in any of several packed forms.
    if weight not in shapes:
        shape, kind = _weight_shape(module, leaves, config, read)
        first = next((info for leaf, info in leaves.items() if _may_be_a_weight(leaf, info)), None)
        if shape is not None:
            shapes[weight] = (shape, kind)
        elif first:
            packed_reasons[weight] = f"stored as {method} {first.shape}"
    return shapes, packed_reasons


def _may_be_a_weight(leaf: str, info: TensorInfo) -> bool:
    is_narrow = info.dtype in _INTEGER_DTYPES or info.dtype.startswith("F8")
    return not leaf.endswith(("_scales", "_blocks")) and (is_narrow or "weight" in leaf or "qdata" in leaf)


def _weight_shape(module: str, leaves: Leaves, config: Mapping[str, Any], read: ReadTensor) -> tuple[Shape, str]:
    """Return the logical shape of a module's weight and its type; None for an unknown layout."""
    pairs, scales = leaves.get("weight", leaves.get("weight_packed")), leaves.get("weight_scale")
    if pairs and scales and pairs.dtype == "U8":
        return _fp4_shape(pairs, scales)
    if weight := leaves.get("weight"):
        if weight.dtype == "U32" and "scales" in leaves:
            return _mlx_shape(weight, leaves["scales"], _mlx_settings(module, config)), "MLX"
        # LLM.int8 and compressed-tensors' int-quantized store the weight unpacked, `(out, in)`.
        is_unpacked = "SCB" in leaves or (scales and config.get("quant_method") == "compressed-tensors")
        return (weight.shape if weight.dtype == "I8" and is_unpacked else None), weight.dtype
    if words := leaves.get("qweight"):
        return _words_shape(words, leaves, config)
    words = leaves.get("weight_packed")
    return (_compressed_shape(words, leaves.get("weight_shape"), read) if words else None), "PACKED"


def _words_shape(words: TensorInfo, leaves: Leaves, config: Mapping[str, Any]) -> tuple[Shape, str]:
    """Return the shape of a weight in 32-bit words: GPTQ packs the inputs of a transposed weight, AWQ the outputs."""
    method = str(config.get("quant_method", ""))
    method += str(config.get("packing_format", "")) if "round" in method else ""
    scales = leaves.get("scales")
    if words.dtype != "I32" or len(words.shape) != 2 or scales is None or len(scales.shape) != 2:
        return None, ""
    if "awq" in method:
        return _awq_shape(words, scales, config), "AWQ"
    return _gptq_shape(words, scales, leaves.get("g_idx"), {**config, "quant_method": method}), "GPTQ"


def _awq_shape(words: TensorInfo, scales: TensorInfo, config: Mapping[str, Any]) -> Shape:
    (rows, columns), bits = words.shape, config.get("bits", config.get("w_bit"))
    if bits not in (4, 8):
        return None
    if str(config.get("version", "gemm")).lower() == "gemv":
        return (rows, columns * 32 // bits) if scales.shape[0] == rows else None
    return (scales.shape[1], rows) if columns * 32 == scales.shape[1] * bits else None


def _gptq_shape(words: TensorInfo, scales: TensorInfo, order: TensorInfo | None, config: Mapping[str, Any]) -> Shape:
    (rows, columns), bits, group = words.shape, config.get("bits"), config.get("group_size")
    if str(config.get("checkpoint_format", "gptq")) not in ("gptq", "gptq_v2") or scales.shape[1] != columns:
        return None
    # The order of groups has one number per input, whatever the bits.
    if order is not None and len(order.shape) == 1 and order.shape[0]:
        return (columns, order.shape[0]) if rows * 32 / order.shape[0] in (2, 3, 4, 8) else None
    # GPTQModel's `dynamic` gives a module its own number of bits, which its tensors do not show.
    if "gptq" not in str(config["quant_method"]) or bits not in (2, 3, 4, 8) or config.get("dynamic") or rows * 32 % bits:
        return None
    in_features = rows * 32 // bits
    is_grouped = isinstance(group, int) and group > 0
    return (columns, in_features) if not is_grouped or -(-in_features // group) == scales.shape[0] else None


def _compressed_shape(words: TensorInfo, shape: TensorInfo | None, read: ReadTensor) -> Shape:
    """Return the shape in `weight_shape`, which padding hides; only if it fits the packed tensor exactly."""
    if shape is None or shape.shape != (2,) or shape.dtype not in ("I64", "I32") or len(words.shape) != 2:
        return None
    raw, width = read(shape.name), shape.size // 2
    out_features, in_features = (int.from_bytes(raw[start : start + width], "little", signed=True) for start in (0, width))
    fits = words.dtype == "I32" and words.shape[0] == out_features and in_features > 0
    return (
        (out_features, in_features)
        if fits and any(-(-in_features // (32 // bits)) == words.shape[1] for bits in range(1, 9))
        else None
    )


def _fp4_shape(pairs: TensorInfo, scales: TensorInfo) -> tuple[Shape, str]:
    """Return the shape of a weight with two numbers per byte; NVFP4 has a scale for every 16 of them, MXFP4 for every 32."""
    group, kind = (16, "NVFP4") if scales.dtype == "F8_E4M3" else (32, "MXFP4")
    if len(pairs.shape) < 2 or scales.dtype not in ("F8_E4M3", "U8", "F8_E8M0"):
        return None, kind
    shape = (*pairs.shape[:-1], 2 * pairs.shape[-1])
    return (shape if scales.shape == (*shape[:-1], -(-shape[-1] // group)) else None), kind


def _mxfp4_stack(blocks: TensorInfo, scales: TensorInfo) -> Shape:
    """Return the shape of gpt-oss's `(experts, out, in / 32, 16)`, which transformers unpacks to `(experts, in, out)`."""
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != 16 or scales.shape != blocks.shape[:3]:
        return None
    return blocks.shape[0], 32 * blocks.shape[2], blocks.shape[1]


def _mlx_settings(module: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of a module, which MLX may set apart."""
    module_settings = config.get(module)
    return module_settings if isinstance(module_settings, dict) else config


def _mlx_shape(words: TensorInfo, scales: TensorInfo, config: Mapping[str, Any]) -> Shape:
    group = config.get("group_size") or _MLX_GROUPS.get(str(config.get("mode", "affine")))
    if not isinstance(group, int) or len(words.shape) < 2 or scales.shape[:-1] != words.shape[:-1] or not scales.shape[-1]:
        return None
    # The number of groups gives the inputs, and so the bits of each number.
    in_features, bits = scales.shape[-1] * group, config.get("bits")
    stored_bits = words.shape[-1] * 32 / in_features
    return (*words.shape[:-1], in_features) if stored_bits in (2, 3, 4, 5, 6, 8) and bits in (None, stored_bits) else None


def _bnb_shape(tensors: Mapping[str, TensorInfo], weight: str, state: str, read: ReadTensor, location: str) -> tuple[int, ...]:
    """Return the shape in the state of a 4-bit matrix, if the matrix has that size."""
    if tensors[state].size > _MAX_STATE:
        raise FormatError(location, f"{state}: {tensors[state].size} bytes are not a quantization state")
    try:
        text = read(state).decode()
    except UnicodeDecodeError as error:
        raise FormatError(location, f"{state}: not UTF-8") from error
    shape = json_file.parse_object(text, f"{location}: {state}").get("shape")
    if not isinstance(shape, list) or not all(json_file.is_integer(dim) and dim > 0 for dim in shape):
        raise FormatError(location, f"{state}: has no valid shape")
    # The codes take half a byte each, in whole elements of the dtype in bnb_4bit_quant_storage.
    width, size = dtypes.BITS[tensors[weight].dtype] // 8, tensors[weight].size
    if abs(size - (math.prod(shape) + 1) // 2) >= max(width, 1):
        raise FormatError(location, f"{weight}: {size} bytes are not {shape} in four bits")
    return tuple(shape)
