"""The source's config inside a file of a format that cannot say it, so that the way back needs no base and is exact.

GGUF and MLX have no word for PEFT's names, patterns, rsLoRA or dtypes. They ride as `adapterhub.source.*` in the
file's own metadata, which other readers ignore, with a digest of everything they belong to; never the source's tensors.
A rider comes from a stranger like the rest of the file: what it says is checked against what the file would run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dtypes, json_file, peft
from .adapter import Adapter
from .errors import FormatError
from .safetensors_file import byte_view
from .scales import unfolded

_KEY = "adapterhub.source"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Line:
    """How one pair was written; undone, it is the source's again.

    Attributes:
        stem: What the file calls the module, `blk.0.attn_q`.
        target: What the base calls it.
        factor: What `lora_B` was multiplied by.
        dtype: What `lora_B` was before.
        heads: How many heads its rows were reordered in, or 0.
    """

    stem: str
    target: str
    factor: float
    dtype: str
    heads: int = 0


def keys(adapter: Adapter, lines: Sequence[Line], digest: str) -> dict[str, str]:
    """The metadata that a file whose payload has `digest` carries."""
    source = adapter.source if adapter.source and adapter.source.format == "peft" else None
    config = source.config if source else peft.config_text(adapter)
    metadata = dict(source.metadata) if source else {"format": "pt"}
    rows = [[line.stem, line.target, line.factor, line.dtype, line.heads] for line in lines]
    return {
        f"{_KEY}.config": config,
        f"{_KEY}.metadata": json.dumps(metadata, separators=(",", ":")),
        f"{_KEY}.tensors": json.dumps(rows, separators=(",", ":")),
        f"{_KEY}.payload": digest,
    }


def payload_digest(tensors: Mapping[str, np.ndarray], *facts: str) -> str:
    """sha256 of the names, dtypes, shapes and bytes of `tensors` in their order, and of `facts` that give them meaning."""
    digest = hashlib.sha256("".join(f"{fact}\n" for fact in facts).encode())
    for name, array in tensors.items():
        digest.update(f"{name}\t{dtypes.name_of(array.dtype)}\t{','.join(map(str, array.shape))}\n".encode())
        digest.update(byte_view(np.ascontiguousarray(array)))
    return "sha256:" + digest.hexdigest()


def there(metadata: Mapping[str, Any]) -> bool:
    """Whether a file carries a rider."""
    return f"{_KEY}.payload" in metadata


def belongs(metadata: Mapping[str, Any], digest: str) -> bool:
    """Whether the rider is that of a payload of this digest."""
    return bool(metadata.get(f"{_KEY}.payload") == digest)


IGNORED = "the tensors or their scale have changed since the conversion: the source's config was ignored"


def lines_of(metadata: Mapping[str, Any], where: str) -> list[Line]:
    """How each pair of the file was written."""
    text = _text(metadata, "tensors", where)
    rows = json_file.parse_object(f'{{"rows":{text}}}', f"{where}: {_KEY}.tensors").get("rows")
    lines: list[Line] = []
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            case [str(stem), str(target), int() | float() as factor, str(dtype), int(heads)] if (
                dtype in _FLOATS and heads >= 0 and 1e-300 < abs(factor) < 1e300
            ):
                lines.append(Line(stem, target, float(factor), dtype, heads))
            case _:
                raise FormatError(where, f"the source's list of tensors has the malformed line {str(row)[:80]}")
    if len({line.target for line in lines}) < len(lines):
        raise FormatError(where, "the source's list of tensors names a module twice")
    return lines


Pair = Callable[[Line], tuple[np.ndarray, np.ndarray]]
"""The canonical `lora_A` and, still multiplied by its factor, `lora_B` of a line."""


def restored(
    metadata: Mapping[str, Any], lines: Sequence[Line], pair: Pair, scale: Callable[[int], float], where: str
) -> Adapter:
    """The source's adapter, from a file that scales a pair of rank r by `scale(r)`."""
    state: dict[str, np.ndarray] = {}
    for line in lines:
        lora_A, lora_B = pair(line)
        if line.factor != 1.0 or dtypes.name_of(lora_B.dtype) != line.dtype:
            lora_B = unfolded(lora_B, line.factor, dtypes.NUMPY[line.dtype])
        a, b = ("embedding_A", "embedding_B") if line.target.endswith("embed_tokens") else ("A.weight", "B.weight")
        state[f"base_model.model.{line.target}.lora_{a}"] = lora_A
        state[f"base_model.model.{line.target}.lora_{b}"] = lora_B
    header = json_file.parse_object(_text(metadata, "metadata", where), f"{where}: {_KEY}.metadata")
    if not all(isinstance(value, str) for value in header.values()):
        raise FormatError(where, "the source's header is not a map of text to text")
    adapter = peft.parse(_text(metadata, "config", where), state, header, where=where)
    for line in lines:
        delta = adapter.deltas[line.target]
        wanted, runs = delta.scaling, scale(delta.r) * line.factor
        if not math.isclose(wanted, runs, rel_tol=1e-6, abs_tol=0.0 if wanted else 1e-25):
            raise FormatError(where, f"{line.target}: the file scales by {runs:g}, the source's config by {wanted:g}")
    return adapter


def _text(metadata: Mapping[str, Any], key: str, where: str) -> str:
    value = metadata.get(f"{_KEY}.{key}")
    if not isinstance(value, str):
        raise FormatError(where, f"{_KEY}.{key} is not text")
    return value
