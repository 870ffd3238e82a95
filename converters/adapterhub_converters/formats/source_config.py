"""The source's PEFT config embedded in a file of another format, for an exact way back that needs no base.

GGUF, MLX and the trainers' formats cannot express PEFT's names, patterns, rsLoRA or dtypes. These are stored as
`adapterhub.source.*` in the file's own metadata, which other readers ignore, with a digest of the payload they belong to;
the source's tensors are never stored. Like the rest of the file these values are untrusted: they are checked against what
the file computes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, Source, StackedLowRank
from adapterhub_converters.architectures.architecture import EMBEDDINGS, Order
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import byte_view, release
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from . import peft
from .file_alpha import unfold
from .peft import target_parameters

_KEY = "adapterhub.source"
PAYLOAD = f"{_KEY}.payload"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Line:
    """The record of how one pair was written, from which the source's pair is recovered.

    Attributes:
        stem: The file's name of the module, such as `blk.0.attn_q`.
        target: The base's name of the module.
        factor: The number that `lora_B` was multiplied by.
        dtype: The dtype of `lora_B` before the multiplication.
        order: The reordering of its rows.
        ulps: Whether the corrections to the last places of `lora_B` are stored too.
        block: Set if the pair is a block of a larger one, or `lora_A` was stored as another type.
    """

    stem: str
    target: str
    factor: float
    dtype: str
    order: Order = 0
    ulps: bool = False
    block: Block | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A pair stored as a block of a larger pair.

    Attributes:
        r: The rank of this pair.
        rows: The number of rows of its `lora_B`.
        experts: The number of experts if it is a delta of all of them, else 0.
        dtype_A: The original dtype of `lora_A`.
        rank: The rank of the larger pair.
    """

    r: int
    rows: int
    experts: int
    dtype_A: str
    rank: int


def keys(adapter: Adapter, lines: Sequence[Line], digest: str, ulps: Sequence[np.ndarray] = ()) -> dict[str, str]:
    """Return the metadata for a file whose payload has `digest`; `ulps` are the arrays of the lines that have them."""
    source = adapter.source if adapter.source and adapter.source.format == "peft" else None
    config = source.config if source else peft.config_text(adapter)
    metadata = dict(source.metadata) if source else {"format": "pt"}
    rows = [_row(line) for line in lines]
    return {
        f"{_KEY}.config": config,
        f"{_KEY}.metadata": json.dumps(metadata, separators=(",", ":")),
        f"{_KEY}.tensors": json.dumps(rows, separators=(",", ":")),
        PAYLOAD: digest,
        **({f"{_KEY}.ulps": _pack_ulps(ulps)} if ulps else {}),
        **_deviations(adapter, source),
    }


def _deviations(adapter: Adapter, source: Source | None) -> dict[str, str]:
    """Return where a PEFT file deviates from what peft writes now: tensor names, and stacks with swapped factors."""
    stacks = {target: delta for target, delta in adapter.deltas.items() if isinstance(delta, StackedLowRank)}
    swapped = (
        source.turned
        if source
        else [target for target, delta in stacks.items() if target_parameters.is_written_swapped(target, delta)]
    )
    return {
        **({f"{_KEY}.names": json.dumps(dict(sorted(source.names.items())))} if source and source.names else {}),
        **({f"{_KEY}.turned": json.dumps(dict.fromkeys(sorted(swapped), True))} if stacks else {}),
    }


def _row(line: Line) -> list[object]:
    row: list[object] = [line.stem, line.target, line.factor, line.dtype, line.order, line.ulps]
    if line.block:
        row.append([line.block.r, line.block.rows, line.block.experts, line.block.dtype_A, line.block.rank])
    return row


def _pack_ulps(ulps: Sequence[np.ndarray]) -> str:
    """Pack numbers from -1, 0 and 1 into two bits each, as base64.

    They are not compressed, because two builds of zlib give different bytes.
    """
    codes = np.concatenate([array.reshape(-1) for array in ulps]).astype(np.int8) + 1
    quads = np.append(codes, np.zeros(-len(codes) % 4, np.int8)).reshape(-1, 4).astype(np.uint8)
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    return base64.b64encode(packed.tobytes()).decode()


def _unpack_ulps(text: str, size: int, location: str) -> np.ndarray:
    """Return `size` numbers from -1, 0 and 1 as int8: the inverse of `_pack_ulps`."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FormatError(location, f"{_KEY}.ulps is not base64") from error
    if len(raw) != -(-size // 4):
        raise FormatError(location, f"{_KEY}.ulps is {len(raw)} bytes, not {-(-size // 4)}")
    packed = np.frombuffer(raw, np.uint8)
    codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)[:size].astype(np.int8)
    return codes - np.int8(1)


NO_DIGEST = f"sha256:{'0' * 64}"
"""Placeholder for a payload's digest until that is known."""


def payload_digest(tensors: Mapping[str, np.ndarray], *facts: str) -> str:
    """Return the sha256 of the names, dtypes, shapes and bytes of `tensors`, and of `facts` that give them meaning."""
    digest = hashlib.sha256("".join(f"{fact}\n" for fact in facts).encode())
    for name, array in tensors.items():
        digest.update(f"{name}\t{dtypes.name_of(array.dtype)}\t{','.join(map(str, array.shape))}\n".encode())
        digest.update(byte_view(np.ascontiguousarray(array)))
        release(array)
    return "sha256:" + digest.hexdigest()


def has_source_config(metadata: Mapping[str, Any]) -> bool:
    """Return whether a file contains a source's config."""
    return PAYLOAD in metadata


def matches_payload(metadata: Mapping[str, Any], digest: str) -> bool:
    """Return whether the source's config in a file belongs to the payload with this digest."""
    payload = metadata.get(PAYLOAD)
    return isinstance(payload, str) and payload == digest


CONVERT_AGAIN = "Convert the adapter from its source again"
"""The hint for a source's config that contradicts the file that it is in."""
IGNORED = "the tensors or their scale have changed since the conversion, so the source's config in the file was ignored"


def parse_lines(metadata: Mapping[str, Any], location: str) -> list[Line]:
    """Return the record of how each pair of the file was written; FormatError if it is malformed."""
    text = _required_text(metadata, "tensors", location)
    # `parse_object` accepts nothing but an object, so the list is wrapped in one.
    rows = json_file.parse_object(f'{{"rows":{text}}}', f"{location}: {_KEY}.tensors").get("rows")
    lines: list[Line] = []
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            # The factor divides `lora_B` later, so it must be neither 0 nor infinite.
            case [str(stem), str(target), int() | float() as factor, str(dtype), order, bool(ulps), *block_fields] if (
                dtype in _FLOATS and 1e-300 < abs(factor) < 1e300 and len(block_fields) <= 1
            ):
                block = _block(block_fields[0], location) if block_fields else None
                lines.append(Line(stem, target, float(factor), dtype, _order(order, location), ulps, block))
            case _:
                raise _malformed_line(row, location)
    if len({line.target for line in lines}) < len(lines):
        raise FormatError(location, f"{_KEY}.tensors has a module in two lines", CONVERT_AGAIN)
    return lines


def _malformed_line(row: object, location: str) -> FormatError:
    return FormatError(location, f"{_KEY}.tensors has the malformed line {str(row)[:80]}")


def _order(value: object, location: str) -> Order:
    match value:
        case bool():
            pass
        case int() if 0 <= value < _COUNT_LIMIT:
            return value
        case [int(groups), int(queries)] if 0 < groups < _COUNT_LIMIT and 0 < queries < _COUNT_LIMIT:
            return groups, queries
        case [int(heads), int(size), int(rotated)] if (
            0 < heads < _COUNT_LIMIT and 0 < size < _COUNT_LIMIT and 0 < rotated < _COUNT_LIMIT
        ):
            return heads, size, rotated
        case [int(groups), int(q), int(k), int(v), int(z)] if all(0 < count < _COUNT_LIMIT for count in (groups, q, k, v, z)):
            return groups, q, k, v, z
        case [int(first), int(keys), int(values), int(size)] if (
            0 <= first < _COUNT_LIMIT and 0 < keys < _COUNT_LIMIT and 0 < values < _COUNT_LIMIT and 0 < size < _COUNT_LIMIT
        ):
            return first, keys, values, size
    raise _malformed_line(value, location)


def _block(value: object, location: str) -> Block:
    match value:
        case [int(r), int(rows), int(experts), str(dtype), int(rank)] if (
            0 < r < _COUNT_LIMIT
            and 0 < rows < _COUNT_LIMIT
            and 0 <= experts < _COUNT_LIMIT
            and dtype in _FLOATS
            and 0 < rank < _COUNT_LIMIT
        ):
            return Block(r, rows, experts, dtype, rank)
    raise _malformed_line(value, location)


# Counts from an untrusted file size arrays, so they must stay within int32.
_COUNT_LIMIT = 1 << 31
Pair = Callable[[Line], tuple[np.ndarray, np.ndarray]]
"""A line to its canonical `lora_A`, and its `lora_B` that is still multiplied by the factor."""


def restore_adapter(
    metadata: Mapping[str, Any], lines: Sequence[Line], pair: Pair, scale: Callable[[int], float], location: str
) -> Adapter:
    """Return the source's adapter.

    Args:
        metadata: The metadata of the file.
        lines: The records of how its pairs were written.
        pair: A function that returns the factors of a line.
        scale: A function that returns the number by which the file's program multiplies a pair of rank r.
        location: The file's name, for errors.

    Raises:
        FormatError: The config is malformed, or does not compute what the file computes.
    """
    deltas: dict[str, Delta] = {}
    pairs = [(line, *pair(line)) for line in lines]
    size = sum(lora_B.size for line, _, lora_B in pairs if line.ulps)
    ulps = _unpack_ulps(_required_text(metadata, "ulps", location), size, location) if size else np.empty(0, np.int8)
    for line, lora_A, folded_B in pairs:
        line_ulps: np.ndarray | None = None
        if line.ulps:
            line_ulps, ulps = ulps[: folded_B.size].reshape(folded_B.shape), ulps[folded_B.size :]
        # The scale of 1 is a placeholder: these deltas only provide names and shapes until the config is parsed.
        kind = StackedLowRank if folded_B.ndim == 3 else LowRankEmbedding if _is_table(line.target) else LowRank
        deltas[line.target] = kind(lora_A, _recovered_b(line, folded_B, line_ulps, location), 1.0)
    header = json_file.parse_object(_required_text(metadata, "metadata", location), f"{location}: {_KEY}.metadata")
    if not all(isinstance(value, str) for value in header.values()):
        raise FormatError(location, f"{_KEY}.metadata is not a map of text to text")
    text = _required_text(metadata, "config", location)
    file_names, swapped = (_optional_map(metadata, key, location) for key in ("names", "turned"))
    source = Source("peft", text, header, turned=frozenset(swapped))
    peft_tensors = peft.state_dict(Adapter(deltas, source=source))
    state = {str(file_names.get(name, name)): tensor for name, tensor in peft_tensors.items()}
    if len(state) < len(peft_tensors):
        raise FormatError(location, "the source's config gives two tensors one name")
    adapter = peft.parse(text, state, header, location=location, swapped_stacks=frozenset(swapped))
    if set(adapter.deltas) != set(deltas):
        raise FormatError(location, "the source's config gives the tensors other names")
    for line in lines:
        delta = adapter.deltas[line.target]
        source_scale, file_scale = delta.scaling, scale(line.block.rank if line.block else delta.r) * line.factor
        # The config is untrusted: it must not change the function that other readers of the file see.
        if not math.isclose(source_scale, file_scale, rel_tol=1e-6, abs_tol=0.0 if source_scale else 1e-25):
            raise FormatError(
                location, f"{line.target}: the scale is {file_scale:g} in the file and {source_scale:g} in the source's config"
            )
    return adapter


def with_magnitudes(adapter: Adapter, magnitudes: Mapping[str, np.ndarray]) -> Adapter:
    """Return the adapter with the magnitude of each target replaced, where `magnitudes` has one."""
    deltas = {
        target: dataclasses.replace(delta, magnitude=magnitudes[target])
        if target in magnitudes and isinstance(delta, LowRank)
        else delta
        for target, delta in adapter.deltas.items()
    }
    return dataclasses.replace(adapter, deltas=deltas)


def _is_table(target: str) -> bool:
    last = target.rpartition(".")[2]
    return any(last == name.rpartition(".")[2] for name in EMBEDDINGS)


def _recovered_b(line: Line, lora_B: np.ndarray, ulps: np.ndarray | None, location: str) -> np.ndarray:
    if line.factor == 1.0 and dtypes.name_of(lora_B.dtype) == line.dtype:
        return lora_B
    if ulps is not None and line.dtype != "F32":
        raise FormatError(
            location, f"{line.target}: {_KEY}.ulps are for a source in F32, but its source was {line.dtype}", CONVERT_AGAIN
        )
    return unfold(lora_B, line.factor, dtypes.NUMPY[line.dtype], ulps)


def _optional_map(metadata: Mapping[str, Any], key: str, location: str) -> dict[str, Any]:
    if f"{_KEY}.{key}" not in metadata:
        return {}
    return json_file.parse_object(_required_text(metadata, key, location), f"{location}: {_KEY}.{key}")


def _required_text(metadata: Mapping[str, Any], key: str, location: str) -> str:
    value = metadata.get(f"{_KEY}.{key}")
    if not isinstance(value, str):
        raise FormatError(location, f"{_KEY}.{key} is not text")
    return value
