"""Read the weights of a quantized Hugging Face folder in floats, a tile of rows at a time.

Layouts: bitsandbytes 0.49 `functional.py` (`dequantize_4bit`, `int8_vectorwise_dequant`), GPTQModel and AutoGPTQ (`qlinear`; v1
stores each zero point minus one), AutoAWQ (`WQLinear_GEMM`, `unpack_awq`), transformers' `finegrained_fp8` and `mxfp4`, and
compressed-tensors' `pack-quantized`, `int-quantized` and `float-quantized`. Any other layout is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.bases.bitsandbytes_state import BLOCK, DTYPES, NESTED_BLOCK, STATE_INFIX
from adapterhub_converters.bases.quantized_shapes import quantization_settings
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .stored_weights import Experts, LogicalWeight, PackedWeight, Rows, StoredTensor
from .tensor_files import F32Array, OpenFiles

_FLOATS = {name: dtype for dtype, name in DTYPES.items()}
# AutoAWQ interleaves outputs for its kernels (`AWQ_ORDER` in awq/utils/packing_utils.py).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output, of eight, of each four bits of a word


Leaves = Mapping[str, StoredTensor]
"""The stored tensors of a module, by the last part of their names."""


def logical_weights(
    spec: BaseSpec, places: Mapping[str, StoredTensor], config: Mapping[str, Any], opened: OpenFiles
) -> dict[str, LogicalWeight]:
    """Return every parameter of a quantized folder, in the order of its files.

    Args:
        places: The stored tensors by name.
        opened: The folder's files; only descriptions of quantized weights are read.

    Raises:
        RefusedError: The folder has an unknown layout, or an unknown variant of a known one.
    """
    # Weights whose logical shape could not be told from their headers.
    for name, reason in spec.packed.items():
        raise RefusedError(name, f"{reason}, an unknown layout", "Dequantize it with the program that made it")
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, place in places.items():
        # bitsandbytes names the state of a weight `module.weight.absmax`, the others `module.scales`.
        stem, has_state, leaf = name.partition(".weight.")
        module, leaf = (stem, f"weight.{leaf}") if has_state else (name.rpartition(".")[0], name.rpartition(".")[2])
        modules.setdefault(module, {})[leaf] = place
    scheme = _Scheme(quantization_settings(config), _dtype(config), opened)
    weights: dict[str, LogicalWeight] = {}
    for name, tensor in spec.tensors.items():
        module, _, leaf = name.rpartition(".")
        leaves = modules.get(module, {})
        stored = places.get(name)
        if f"{leaf}_blocks" in leaves and tensor.dtype == "MXFP4":
            blocks, scales = leaves[f"{leaf}_blocks"], leaves[f"{leaf}_scales"]
            weights[name] = LogicalWeight(tensor.shape, scheme.dtype or "BF16", blocks, Experts(name, blocks, scales))
        elif leaf == "weight" and (packed := scheme.quantized_weight(name, tensor.shape, leaves)):
            weights[name] = packed
        elif stored and stored.info.dtype in dtypes.FLOATS and stored.info.shape == tensor.shape:
            weights[name] = LogicalWeight(tensor.shape, stored.info.dtype, stored, None)
        else:
            reason_text = f"stored as {tensor.dtype} by {spec.quantization}, an unknown layout"
            raise RefusedError(name, reason_text, "Dequantize it with the program that made it")
    return weights


def _dtype(config: Mapping[str, Any]) -> str | None:
    """Return the type of floats that a config names, in safetensors' spelling; None if it names none."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        name = place.get("dtype") or place.get("torch_dtype")
        if name in _FLOATS:
            return _FLOATS[name]
    return None


@dataclass(frozen=True)
class _Scheme:
    """How a folder is quantized: its quantization config, and the type of floats before quantization."""

    config: Mapping[str, Any]
    dtype: str | None
    opened: OpenFiles

    def quantized_weight(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight | None:
        """Return a quantized weight; None for one that is stored as floats.

        Raises:
            RefusedError: The layout is unknown.
        """
        dtype = leaves["weight"].info.dtype if "weight" in leaves else ""
        if any(STATE_INFIX in f".{leaf}" for leaf in leaves):
            read = self._bnb4
        elif "qweight" in leaves:
            read = self._words
        elif "weight_packed" in leaves:
            read = self._packed_integers
        elif dtype == "I8":
            read = self._int8
        elif dtype in ("F8_E4M3", "F8_E5M2"):
            read = self._fp8
        else:
            return None
        return read(name, shape, leaves)

    def packed_weight(
        self, name: str, shape: tuple[int, ...], place: StoredTensor, scale: StoredTensor, make: Callable[[OpenFiles], Rows]
    ) -> LogicalWeight:
        """Return a weight with the dtype of the config, else of its scales, else bfloat16."""
        dtype = self.dtype or (scale.info.dtype if scale.info.dtype in ("BF16", "F16") else "BF16")
        return LogicalWeight(shape, dtype, place, PackedWeight(name, shape[0], shape[1], make))

    def _int8(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight:
        """Return int8 rows with a scale each: bitsandbytes' `SCB` or compressed-tensors' `weight_scale`."""
        weight, bitsandbytes_scale, compressed_scale = leaves["weight"], leaves.get("SCB"), leaves.get("weight_scale")
        scale = bitsandbytes_scale or compressed_scale
        _refuse_leaves(name, leaves, "weight_zero_point", "weight_g_idx")
        if scale is None or scale.info.size // (dtypes.BITS[scale.info.dtype] // 8) not in (1, shape[0]):
            raise RefusedError(name, "8-bit integers whose scales are not one for each row or one for all")

        def make(opened: OpenFiles) -> Rows:
            scales = np.broadcast_to(scale.load(opened).astype(np.float32).reshape(-1, 1), (shape[0], 1))
            if bitsandbytes_scale:
                # bitsandbytes stores the largest magnitude of a row, not the step (`int8_vectorwise_dequant`).
                scales = scales * np.float32(1 / 127)
            return lambda start, stop: weight.rows(opened, start, stop).astype(np.float32) * scales[start:stop]

        return self.packed_weight(name, shape, weight, scale, make)

    def _fp8(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight:
        """Return 8-bit floats with one scale, one for each row, or one for each block (`weight_scale_inv`)."""
        weight, block = leaves["weight"], leaves.get("weight_scale_inv")
        scale = block or leaves.get("weight_scale")
        if scale is None:
            raise RefusedError(name, "8-bit floats without a scale")
        scale_shape = scale.info.shape
        block_rows, block_columns = self._fp8_block(name, shape, scale_shape)

        def make(opened: OpenFiles) -> Rows:
            scales = scale.load(opened).astype(np.float32)
            scales = scales.reshape(scale_shape if len(scale_shape) == 2 else (-1, 1))

            def rows(start: int, stop: int) -> F32Array:
                wide = weight.rows(opened, start, stop).astype(np.float32)
                row_scales = scales[np.arange(start, stop) // block_rows]
                wide *= np.repeat(row_scales, block_columns, axis=1)[:, : shape[1]]
                return wide

            return rows

        return self.packed_weight(name, shape, weight, scale, make)

    def _fp8_block(self, name: str, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the numbers of rows and of columns that share a scale."""
        count = math.prod(scale_shape)
        if count == 1:
            return shape[0], shape[1]
        if count == shape[0] and (len(scale_shape) == 1 or scale_shape == (shape[0], 1)):
            return 1, shape[1]
        block = self.config.get("weight_block_size")
        if isinstance(block, list) and len(block) == 2 and len(scale_shape) == 2:
            block_rows, block_columns = block
            if scale_shape == (-(-shape[0] // block_rows), -(-shape[1] // block_columns)):
                return int(block_rows), int(block_columns)
        raise RefusedError(name, f"8-bit floats {shape} with scales {scale_shape}, an unknown layout")

    def _words(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight:
        """Return words of packed integers, by AutoAWQ or GPTQ."""
        # Both call their words `qweight`, so only the config tells them apart.
        method = str(self.config.get("quant_method", "")) + str(self.config.get("packing_format", ""))
        return self._awq(name, shape, leaves) if "awq" in method else self._gptq(name, shape, leaves)

    def _gptq(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight:
        """Return a GPTQ weight: words along the inputs, zero points by group, and maybe an order of groups (`g_idx`)."""
        words, zeros, scale, order = (leaves.get(leaf) for leaf in ("qweight", "qzeros", "scales", "g_idx"))
        if words is None or zeros is None or scale is None:
            raise RefusedError(name, "GPTQ without its scales or zero points")
        outputs, inputs = shape
        bits = words.info.shape[0] * 32 // inputs
        if bits not in (2, 4, 8) or words.info.shape[0] * 32 != inputs * bits:
            raise RefusedError(name, f"GPTQ in {words.info.shape[0] * 32 / inputs:g} bits, an unknown layout")
        _require_int32(name, words, zeros, *([order] if order else []))
        # Version 1 stores each zero point minus one.
        zero_offset = 0 if str(self.config.get("checkpoint_format", "gptq")) == "gptq_v2" else 1
        groups, per_word = scale.info.shape[0] if scale.info.shape else 0, 32 // bits
        if (
            not groups
            or outputs % per_word
            or scale.info.shape != (groups, outputs)
            or zeros.info.shape != (groups, outputs // per_word)
        ):
            raise RefusedError(
                name, f"GPTQ with scales {scale.info.shape} and zero points {zeros.info.shape}, an unknown layout"
            )
        size = -(-inputs // groups)  # the last group may be shorter

        def make(opened: OpenFiles) -> Rows:
            packed, scales = words.load(opened).view(np.uint32), scale.load(opened).astype(np.float32)
            offsets = _fields(zeros.load(opened).view(np.uint32), bits).reshape(groups, outputs) + zero_offset
            index = order.load(opened) if order and order.info.size else np.arange(inputs) // size
            # numpy would take a negative number from the end, and the weights would be wrong without an error.
            if index.shape != (inputs,) or index.min() < 0 or index.max() >= groups:
                raise FormatError(name, "g_idx names groups that do not exist")

            def rows(start: int, stop: int) -> F32Array:
                columns = packed[:, start:stop]  # (in / per, rows), the inputs in the bits of a word
                shifts = np.arange(per_word, dtype=np.uint32)[None, :, None] * np.uint32(bits)
                codes = ((columns[:, None] >> shifts) & np.uint32(2**bits - 1)).reshape(inputs, stop - start)
                wide = (codes.astype(np.float32) - offsets[index, start:stop]) * scales[index, start:stop]
                return np.ascontiguousarray(wide.T)

            return rows

        return self.packed_weight(name, shape, words, scale, make)

    def _awq(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight:
        """Return an AWQ weight (`WQLinear_GEMM`): words along the outputs, each with eight outputs in `_AWQ_ORDER`."""
        words, zeros, scale = (leaves.get(leaf) for leaf in ("qweight", "qzeros", "scales"))
        outputs, inputs = shape
        version, bits = str(self.config.get("version", "gemm")).lower(), self.config.get("bits", self.config.get("w_bit"))
        if words is None or zeros is None or scale is None or version != "gemm" or bits != 4:
            raise RefusedError(name, f"AWQ ({version}, {bits} bits); only gemm in 4 bits is supported")
        _require_int32(name, words, zeros)
        groups = scale.info.shape[0] if scale.info.shape else 0
        fits = (
            groups > 0
            and outputs % 8 == 0
            and words.info.shape == (inputs, outputs // 8)
            and zeros.info.shape == (groups, outputs // 8)
        )
        if not fits or scale.info.shape != (groups, outputs) or inputs % groups:
            shapes = f"words {words.info.shape}, scales {scale.info.shape} and zero points {zeros.info.shape}"
            raise RefusedError(name, f"AWQ with {shapes}, an unknown layout")

        def make(opened: OpenFiles) -> Rows:
            packed, scales = words.load(opened).view(np.uint32), scale.load(opened).astype(np.float32)
            offsets = _awq_fields(zeros.load(opened).view(np.uint32)).astype(np.float32)
            index = np.arange(inputs) // (inputs // groups)

            def rows(start: int, stop: int) -> F32Array:
                # Words hold eight outputs each, so rows are unpacked from the word with the first to the word with the last.
                first, last = start // 8, -(-stop // 8)
                codes = _awq_fields(packed[:, first:last])[:, start - 8 * first : stop - 8 * first]
                wide = (codes.astype(np.float32) - offsets[index, start:stop]) * scales[index, start:stop]
                return np.ascontiguousarray(wide.T)

            return rows

        return self.packed_weight(name, shape, words, scale, make)

    def _packed_integers(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight:
        """Return compressed-tensors' symmetric integers: 32-bit words along the inputs, stored plus half the range."""
        words, scale = leaves["weight_packed"], leaves.get("weight_scale")
        _refuse_leaves(name, leaves, "weight_zero_point", "weight_g_idx", "weight_global_scale")
        bits = self._compressed_bits()
        per_word = 32 // bits if bits else 0
        if words.info.dtype != "I32" or scale is None or not bits or -(-shape[1] // per_word) != words.info.shape[1]:
            raise RefusedError(name, f"packed {words.info.dtype} {words.info.shape}, an unknown layout")
        if len(scale.info.shape) != 2 or scale.info.shape[0] not in (1, shape[0]) or shape[1] % scale.info.shape[1]:
            raise RefusedError(name, f"packed integers with scales {scale.info.shape}, an unknown layout")

        def make(opened: OpenFiles) -> Rows:
            scales = np.broadcast_to(scale.load(opened).astype(np.float32), (shape[0], scale.info.shape[1]))
            size = shape[1] // scale.info.shape[1]

            def rows(start: int, stop: int) -> F32Array:
                codes = _fields(words.rows(opened, start, stop).view(np.uint32), bits)[:, : shape[1]]
                wide = codes.astype(np.float32) - np.float32(2 ** (bits - 1))
                return wide * np.repeat(scales[start:stop], size, axis=1)

            return rows

        return self.packed_weight(name, shape, words, scale, make)

    def _bnb4(self, name: str, shape: tuple[int, ...], leaves: Leaves) -> LogicalWeight:
        """Return a weight in bitsandbytes' 4-bit codes, NF4 or FP4, whose magnitudes may be quantized themselves."""
        state = next(leaf for leaf in leaves if STATE_INFIX in f".{leaf}")
        weight, code, absmax = leaves["weight"], leaves.get("weight.quant_map"), leaves.get("weight.absmax")
        nested, nested_code = leaves.get("weight.nested_absmax"), leaves.get("weight.nested_quant_map")
        if code is None or absmax is None or code.info.shape != (16,) or (nested is None) != (nested_code is None):
            raise RefusedError(name, "bitsandbytes in 4 bits without its map or magnitudes")
        document = json_file.parse_object(leaves[state].load(self.opened).tobytes(), f"{name}: {state}")
        block, inner = document.get("blocksize", BLOCK), document.get("nested_blocksize", NESTED_BLOCK)
        offset, dtype = document.get("nested_offset", 0.0), _FLOATS.get(str(document.get("dtype")))
        count = math.prod(shape)
        valid_blocks = all(isinstance(number, int) and number > 0 for number in (block, inner))
        valid_numbers = valid_blocks and isinstance(offset, int | float)
        blocks = -(-count // block) if valid_numbers else 0
        fits = absmax.info.shape == (blocks,) and (nested is None or nested.info.shape == (-(-blocks // inner),))
        if not valid_numbers or not fits or dtype is None or len(shape) != 2:
            raise RefusedError(name, f"bitsandbytes in 4 bits with an unknown state: {str(document)[:80]}")

        def make(opened: OpenFiles) -> Rows:
            codes, largest = code.load(opened).astype(np.float32), absmax.load(opened)
            if nested is not None and nested_code is not None:
                scales = np.repeat(nested.load(opened).astype(np.float32), inner)[: largest.size]
                largest = nested_code.load(opened).astype(np.float32)[largest.reshape(-1)] * scales + np.float32(offset)
            magnitudes = largest.astype(np.float32).reshape(-1)

            def rows(start: int, stop: int) -> F32Array:
                first, last = start * shape[1], stop * shape[1]
                # Two codes a byte: a range of rows may begin or end in the middle of one.
                raw = np.empty(-(-last // 2) - first // 2, np.uint8)
                opened.read(weight.path, raw, weight.info.offset + first // 2)
                pairs = np.stack([raw >> 4, raw & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
                wide = codes[pairs] * magnitudes[np.arange(first, last) // block]
                numbers: F32Array = wide.reshape(stop - start, shape[1])
                return numbers

            return rows

        return LogicalWeight(shape, dtype, weight, PackedWeight(name, shape[0], shape[1], make))

    def _compressed_bits(self) -> int | None:
        """Return the bits of the integer weights in the config; None if it has several types of weights, or another type."""
        groups = self.config.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        weights = [
            settings for group in groups if isinstance(group, dict) and isinstance(settings := group.get("weights"), dict)
        ]
        kinds = {
            (settings.get("num_bits"), settings.get("type"), bool(settings.get("symmetric", True))) for settings in weights
        }
        (bits, kind, symmetric), *other_kinds = kinds or {(None, None, False)}
        return bits if not other_kinds and kind == "int" and symmetric and bits in (4, 8) else None


def _refuse_leaves(name: str, leaves: Leaves, *unsupported: str) -> None:
    """Refuse a weight that comes with any of these leaves."""
    for leaf in unsupported:
        if leaf in leaves:
            raise RefusedError(name, f"comes with a {leaf}, which is not supported", "Dequantize it elsewhere")


def _require_int32(name: str, *places: StoredTensor) -> None:
    """Refuse packed tensors that are not 32-bit integers."""
    for place in places:
        if place.info.dtype != "I32":
            raise RefusedError(name, f"its {place.info.name.rpartition('.')[2]} is {place.info.dtype}, not integers of 32 bits")


def _fields(words: NDArray[np.uint32], bits: int) -> NDArray[np.int32]:
    """Unpack the numbers in words, lowest bits first: `(rows, words)` to `(rows, words * 32 / bits)`."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    fields: NDArray[np.int32] = ((words[..., None] >> shifts) & np.uint32(2**bits - 1)).astype(np.int32)
    return fields.reshape(*words.shape[:-1], -1)


def _awq_fields(words: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Unpack the eight 4-bit numbers of each word and put them in the order of the outputs."""
    fields = _fields(words, 4).reshape(*words.shape, 8)
    ordered = np.empty_like(fields)
    ordered[..., _AWQ_ORDER] = fields
    return ordered.reshape(*words.shape[:-1], -1)
