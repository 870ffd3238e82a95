"""The source's PEFT config inside a file of another format, so that the way back is exact and needs no base.

GGUF, MLX and the trainers' formats cannot express PEFT's names, patterns, rsLoRA or dtypes. These are stored as
`adapterhub.source.*` in the file's own metadata, which other readers ignore, with a digest of the payload they belong
to; never the source's tensors. Like the rest of the file they are untrusted: they are checked against what the file
computes.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, Source, StackedLowRank
from adapterhub_converters.architectures import names
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import byte_view, release
from adapterhub_converters.errors import FormatError

from . import peft
from .file_alpha import unfolded
from .peft import experts

_KEY = "adapterhub.source"
PAYLOAD = f"{_KEY}.payload"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Line:
    """How one pair was written, which is undone to recover the source's.

    Attributes:
        stem: The file's name of the module, `blk.0.attn_q`.
        target: The base's name of it.
        factor: The number that `lora_B` was multiplied by.
        dtype: The dtype of `lora_B` before that.
        order: The reordering of its rows.
        ulps: Whether the last places of `lora_B` are stored too.
        block: Set if the pair is a block of a larger one, or `lora_A` was stored as another type.
    """

    stem: str
    target: str
    factor: float
    dtype: str
    order: names.Order = 0
    ulps: bool = False
    block: Block | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """A pair that is a block of a larger one.

    Attributes:
        r: Its own rank.
        rows: Its number of rows.
        experts: The number of experts if it is a delta of all of them, else 0.
        dtype_A: The dtype that `lora_A` had.
        rank: The rank of the larger pair.
    """

    r: int
    rows: int
    experts: int
    dtype_A: str
    rank: int


def keys(adapter: Adapter, lines: Sequence[Line], digest: str, ulps: Sequence[np.ndarray] = ()) -> dict[str, str]:
    """The metadata for a file whose payload has `digest`; `ulps` of the lines that have them, in their order."""
    source = adapter.source if adapter.source and adapter.source.format == "peft" else None
    config = source.config if source else peft.config_text(adapter)
    metadata = dict(source.metadata) if source else {"format": "pt"}
    rows = [_row(line) for line in lines]
    return {
        f"{_KEY}.config": config,
        f"{_KEY}.metadata": json.dumps(metadata, separators=(",", ":")),
        f"{_KEY}.tensors": json.dumps(rows, separators=(",", ":")),
        PAYLOAD: digest,
        **({f"{_KEY}.ulps": _packed(ulps)} if ulps else {}),
        **_deviations(adapter, source),
    }


def _deviations(adapter: Adapter, source: Source | None) -> dict[str, str]:
    """Where a PEFT file deviates from what peft now writes: names of tensors, and stacks with swapped factors."""
    stacks = {target: delta for target, delta in adapter.deltas.items() if isinstance(delta, StackedLowRank)}
    turned = source.turned if source else [target for target, delta in stacks.items() if experts.written_turned(target, delta)]
    return {
        **({f"{_KEY}.names": json.dumps(dict(sorted(source.names.items())))} if source and source.names else {}),
        **({f"{_KEY}.turned": json.dumps(dict.fromkeys(sorted(turned), True))} if stacks else {}),
    }


def _row(line: Line) -> list[object]:
    row: list[object] = [line.stem, line.target, line.factor, line.dtype, line.order, line.ulps]
    if line.block:
        row.append([line.block.r, line.block.rows, line.block.experts, line.block.dtype_A, line.block.rank])
    return row


def _packed(ulps: Sequence[np.ndarray]) -> str:
    """Pack each of -1, 0, 1 into two bits, as base64. Not compressed: two builds of zlib give different bytes."""
    codes = np.concatenate([array.reshape(-1) for array in ulps]).astype(np.int8) + 1
    quads = np.append(codes, np.zeros(-len(codes) % 4, np.int8)).reshape(-1, 4).astype(np.uint8)
    packed = quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6
    return base64.b64encode(packed.tobytes()).decode()


def _unpacked(text: str, size: int, where: str) -> np.ndarray:
    """`size` numbers of -1, 0, 1 as int8: the inverse of `_packed`."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise FormatError(where, f"{_KEY}.ulps is not base64") from error
    if len(raw) != -(-size // 4):
        raise FormatError(where, f"{_KEY}.ulps is {len(raw)} bytes, not {-(-size // 4)}")
    packed = np.frombuffer(raw, np.uint8)
    codes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)[:size].astype(np.int8)
    return codes - np.int8(1)


NO_DIGEST = f"sha256:{'0' * 64}"
"""Placeholder for a payload's digest until that is known."""


def payload_digest(tensors: Mapping[str, np.ndarray], *facts: str) -> str:
    """sha256 over the names, dtypes, shapes and bytes of `tensors` in their order, and over `facts` that give them meaning."""
    digest = hashlib.sha256("".join(f"{fact}\n" for fact in facts).encode())
    for name, array in tensors.items():
        digest.update(f"{name}\t{dtypes.name_of(array.dtype)}\t{','.join(map(str, array.shape))}\n".encode())
        digest.update(byte_view(np.ascontiguousarray(array)))
        release(array)
    return "sha256:" + digest.hexdigest()


def is_there(metadata: Mapping[str, Any]) -> bool:
    """Whether a file contains a source's config."""
    return PAYLOAD in metadata


def belongs(metadata: Mapping[str, Any], digest: str) -> bool:
    """Whether the source's config in a file belongs to a payload of this digest."""
    payload = metadata.get(PAYLOAD)
    return isinstance(payload, str) and payload == digest


AGAIN = "Convert the adapter from its source again"
"""The hint for a source's config that contradicts the file that it is in."""
IGNORED = "the tensors or their scale have changed since the conversion, so the source's config in the file was ignored"


def lines_of(metadata: Mapping[str, Any], where: str) -> list[Line]:
    """The record of how each pair of the file was written; FormatError for a malformed one."""
    text = _text(metadata, "tensors", where)
    rows = json_file.parse_object(f'{{"rows":{text}}}', f"{where}: {_KEY}.tensors").get("rows")
    lines: list[Line] = []
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            case [str(stem), str(target), int() | float() as factor, str(dtype), order, bool(ulps), *rest] if (
                dtype in _FLOATS and 1e-300 < abs(factor) < 1e300 and len(rest) <= 1
            ):
                block = _block(rest[0], where) if rest else None
                lines.append(Line(stem, target, float(factor), dtype, _order(order, where), ulps, block))
            case _:
                raise _malformed(row, where)
    if len({line.target for line in lines}) < len(lines):
        raise FormatError(where, f"{_KEY}.tensors has a module in two lines", AGAIN)
    return lines


def _malformed(row: object, where: str) -> FormatError:
    return FormatError(where, f"{_KEY}.tensors has the malformed line {str(row)[:80]}")


def _order(value: object, where: str) -> names.Order:
    match value:
        case bool():
            pass
        case int() if 0 <= value < _MANY:
            return value
        case [int(groups), int(queries)] if 0 < groups < _MANY and 0 < queries < _MANY:
            return groups, queries
        case [int(first), int(keys), int(values), int(size)] if (
            0 <= first < _MANY and 0 < keys < _MANY and 0 < values < _MANY and 0 < size < _MANY
        ):
            return first, keys, values, size
    raise _malformed(value, where)


def _block(value: object, where: str) -> Block:
    match value:
        case [int(r), int(rows), int(experts), str(dtype), int(rank)] if (
            0 < r < _MANY and 0 < rows < _MANY and 0 <= experts < _MANY and dtype in _FLOATS and 0 < rank < _MANY
        ):
            return Block(r, rows, experts, dtype, rank)
    raise _malformed(value, where)


_MANY = 1 << 31
Pair = Callable[[Line], tuple[np.ndarray, np.ndarray]]
"""A line to its canonical `lora_A`, and its `lora_B` that is still multiplied by the factor."""


def restored(
    metadata: Mapping[str, Any], lines: Sequence[Line], pair: Pair, scale: Callable[[int], float], where: str
) -> Adapter:
    """The source's adapter.

    Args:
        metadata: The file's own.
        lines: How its pairs were written.
        pair: The factors of a line.
        scale: The number that the file's program multiplies a pair of rank r by.
        where: For errors.

    Raises:
        FormatError: The config is malformed, or does not compute what the file computes.
    """
    deltas: dict[str, Delta] = {}
    pairs = [(line, *pair(line)) for line in lines]
    size = sum(lora_B.size for line, _, lora_B in pairs if line.ulps)
    ulps = _unpacked(_text(metadata, "ulps", where), size, where) if size else np.empty(0, np.int8)
    for line, lora_A, folded_B in pairs:
        own: np.ndarray | None = None
        if line.ulps:
            own, ulps = ulps[: folded_B.size].reshape(folded_B.shape), ulps[folded_B.size :]
        kind = StackedLowRank if folded_B.ndim == 3 else LowRankEmbedding if _is_table(line.target) else LowRank
        deltas[line.target] = kind(lora_A, _source_b(line, folded_B, own, where), 1.0)
    header = json_file.parse_object(_text(metadata, "metadata", where), f"{where}: {_KEY}.metadata")
    if not all(isinstance(value, str) for value in header.values()):
        raise FormatError(where, f"{_KEY}.metadata is not a map of text to text")
    text = _text(metadata, "config", where)
    own_names, turned = (_map(metadata, key, where) for key in ("names", "turned"))
    source = Source("peft", text, header, turned=frozenset(turned))
    named = peft.state_dict(Adapter(deltas, source=source))
    state = {str(own_names.get(name, name)): tensor for name, tensor in named.items()}
    if len(state) < len(named):
        raise FormatError(where, "the source's config gives two tensors one name")
    adapter = peft.parse(text, state, header, where=where, turned=frozenset(turned))
    if set(adapter.deltas) != set(deltas):
        raise FormatError(where, "the source's config gives the tensors other names")
    for line in lines:
        delta = adapter.deltas[line.target]
        wanted, runs = delta.scaling, scale(line.block.rank if line.block else delta.r) * line.factor
        if not math.isclose(wanted, runs, rel_tol=1e-6, abs_tol=0.0 if wanted else 1e-25):
            raise FormatError(where, f"{line.target}: the scale is {runs:g} in the file and {wanted:g} in the source's config")
    return adapter


def with_magnitudes(adapter: Adapter, magnitudes: Mapping[str, np.ndarray]) -> Adapter:
    """The adapter with these magnitudes by target."""
    deltas = {
        target: dataclasses.replace(delta, magnitude=magnitudes[target])
        if target in magnitudes and isinstance(delta, LowRank)
        else delta
        for target, delta in adapter.deltas.items()
    }
    return dataclasses.replace(adapter, deltas=deltas)


def _is_table(target: str) -> bool:
    last = target.rpartition(".")[2]
    return any(last == name.rpartition(".")[2] for name in names.EMBEDDINGS)


def _source_b(line: Line, lora_B: np.ndarray, ulps: np.ndarray | None, where: str) -> np.ndarray:
    if line.factor == 1.0 and dtypes.name_of(lora_B.dtype) == line.dtype:
        return lora_B
    if ulps is not None and line.dtype != "F32":
        raise FormatError(where, f"{line.target}: {_KEY}.ulps are for a source in F32, and its own was {line.dtype}", AGAIN)
    return unfolded(lora_B, line.factor, dtypes.NUMPY[line.dtype], ulps)


def _map(metadata: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    if f"{_KEY}.{key}" not in metadata:
        return {}
    return json_file.parse_object(_text(metadata, key, where), f"{where}: {_KEY}.{key}")


def _text(metadata: Mapping[str, Any], key: str, where: str) -> str:
    value = metadata.get(f"{_KEY}.{key}")
    if not isinstance(value, str):
        raise FormatError(where, f"{_KEY}.{key} is not text")
    return value
