"""The source's config inside a GGUF adapter, so that the way back needs no base and is exact.

GGUF has no word for PEFT's names, patterns, rsLoRA or dtypes. They ride under `adapterhub.source.*` keys, which
llama.cpp ignores, with a digest of the tensors, alpha and architecture they belong to; never the source's tensors. A
rider comes from a stranger like the rest of the file: what it says is checked against what llama.cpp would run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dtypes, gguf_file, json_file, names, peft
from .adapter import Adapter
from .errors import FormatError
from .gguf_file import Value
from .scales import unfolded

_KEY = "adapterhub.source"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Line:
    """How one pair was written; undone, it is the source's again.

    Attributes:
        stem: `blk.0.attn_q`.
        target: Its module in the base.
        factor: What `lora_B` was multiplied by.
        dtype: What `lora_B` was before.
        heads: How many heads its rows were reordered in, or 0.
    """

    stem: str
    target: str
    factor: float
    dtype: str
    heads: int


def payload_digest(architecture: str, alpha: float, tensors: Mapping[str, np.ndarray]) -> str:
    """Digest of all that decides what llama.cpp computes."""
    rows = ((name, dtypes.name_of(array.dtype), array.shape, array) for name, array in tensors.items())
    return gguf_file.payload_digest(rows, architecture, np.float32(alpha).tobytes().hex())


def keys(adapter: Adapter, lines: Sequence[Line], digest: str) -> dict[str, Value]:
    """The metadata that a file whose payload has `digest` carries."""
    source = adapter.source if adapter.source and adapter.source.format == "peft" else None
    config = source.config if source else peft.config_text(adapter)
    metadata = dict(source.metadata) if source else {"format": "pt"}
    rows = [[line.stem, line.target, line.factor, line.dtype, line.heads] for line in lines]
    return {
        f"{_KEY}.config": gguf_file.string(config),
        f"{_KEY}.metadata": gguf_file.string(json.dumps(metadata, separators=(",", ":"))),
        f"{_KEY}.tensors": gguf_file.string(json.dumps(rows, separators=(",", ":"))),
        f"{_KEY}.payload": gguf_file.string(digest),
    }


def there(metadata: Mapping[str, Any]) -> bool:
    """Whether a file carries a rider."""
    return f"{_KEY}.payload" in metadata


def belongs(metadata: Mapping[str, Any], digest: str) -> bool:
    """Whether the rider is that of a payload of this digest."""
    return bool(metadata.get(f"{_KEY}.payload") == digest)


def restored(metadata: Mapping[str, Any], alpha: float, tensors: Mapping[str, np.ndarray], where: str) -> Adapter:
    """The source's adapter, byte for byte, from a file whose payload the rider belongs to."""
    lines = _lines(_text(metadata, "tensors", where), where)
    if {f"{line.stem}.weight.lora_{half}" for line in lines for half in "ab"} != set(tensors):
        raise FormatError(where, "the source's list of tensors is not that of the file")
    architecture = names.by_gguf(str(metadata.get("general.architecture", "")), where)
    state: dict[str, np.ndarray] = {}
    for line in lines:
        _check_line(line, tensors[f"{line.stem}.weight.lora_b"], architecture, where)
        state |= _state(line, tensors[f"{line.stem}.weight.lora_a"], tensors[f"{line.stem}.weight.lora_b"])
    header = json_file.parse_object(_text(metadata, "metadata", where), f"{where}: {_KEY}.metadata")
    if not all(isinstance(value, str) for value in header.values()):
        raise FormatError(where, "the source's header is not a map of text to text")
    adapter = peft.parse(_text(metadata, "config", where), state, header, where=where)
    _check_scales(adapter, alpha, lines, where)
    return adapter


def _text(metadata: Mapping[str, Any], key: str, where: str) -> str:
    value = metadata.get(f"{_KEY}.{key}")
    if not isinstance(value, str):
        raise FormatError(where, f"{_KEY}.{key} is not text")
    return value


def _lines(text: str, where: str) -> list[Line]:
    rows = json_file.parse_object(f'{{"rows":{text}}}', f"{where}: {_KEY}.tensors").get("rows")
    lines: list[Line] = []
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            case [str(stem), str(target), int() | float() as factor, str(dtype), int(heads)] if (
                dtype in _FLOATS and heads >= 0 and 0 < abs(factor) < 1e300
            ):
                lines.append(Line(stem, target, float(factor), dtype, heads))
            case _:
                raise FormatError(where, f"the source's list of tensors has the malformed line {str(row)[:80]}")
    return lines


def _check_line(line: Line, lora_B: np.ndarray, architecture: names.Architecture, where: str) -> None:
    if architecture.stem(line.target) != line.stem:
        raise FormatError(where, f"{line.stem!r} is not what llama.cpp calls {line.target!r}")
    reordered = architecture.heads(line.target, {"num_attention_heads": 1}, where) > 0
    if lora_B.ndim != 2 or reordered != (line.heads > 0) or (reordered and lora_B.shape[0] % (2 * line.heads)):
        raise FormatError(where, f"{line.stem}: lora_b {lora_B.shape} does not have {line.heads} heads")


def _state(line: Line, lora_A: np.ndarray, lora_B: np.ndarray) -> dict[str, np.ndarray]:
    lora_B = names.unpermuted(lora_B, line.heads)
    if line.factor != 1.0 or dtypes.name_of(lora_B.dtype) != line.dtype:
        lora_B = unfolded(lora_B, line.factor, dtypes.NUMPY[line.dtype])
    prefix = f"base_model.model.{line.target}"
    if line.stem == "token_embd":
        return {f"{prefix}.lora_embedding_A": np.ascontiguousarray(lora_A.T), f"{prefix}.lora_embedding_B": lora_B}
    return {f"{prefix}.lora_A.weight": lora_A, f"{prefix}.lora_B.weight": lora_B}


def _check_scales(adapter: Adapter, alpha: float, lines: Sequence[Line], where: str) -> None:
    """What the file makes llama.cpp compute must be what the source's config says."""
    for line in lines:
        delta = adapter.deltas[line.target]
        wanted, runs = delta.scaling, (alpha / delta.r if alpha else 1.0) * line.factor
        if not math.isclose(wanted, runs, rel_tol=1e-6, abs_tol=0.0 if wanted else 1e-25):
            raise FormatError(where, f"{line.target}: the file scales by {runs:g}, the source's config by {wanted:g}")
