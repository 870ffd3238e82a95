"""Quantized bases, kept by the digest of what they were made from, so that a base is quantized once.

An entry is a folder as bitsandbytes serializes a model, with config and tokenizer, so that transformers loads it too. It is
written whole or not at all. Each tensor has a CRC-32 over the entry's name and its own, its dtype, shape and bytes, compared
when it is read; an entry that isn't what was written, or is another base's, is thrown away and made anew. That is against
what a disk or a crash does: who may write into the folder can change a base as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.train.layers import bitsandbytes
from adapterhub_converters.bases.bitsandbytes import QUANTIZATION
from adapterhub_converters.containers import atomic, json_file, safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, OutputExistsError

from .weights import FolderWeights, Weights, beside, stored_name

FORMAT = 2  # of an entry; another one is another entry
_CHECKS = "checks.json"
_UNUSED = 60 * 86400  # seconds after which an entry that nobody used gives way to a new one
_TEXTS = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_TEXTS = ("*.index.json", "config.json", _CHECKS)
_MAX_TEXT = 1 << 26  # bytes; a tokenizer with a vocabulary of 260,000 has half of that


@dataclass(frozen=True)
class Place:
    """Where the quantized form of one base lies, or would."""

    folder: Path

    @property
    def there(self) -> bool:
        """Whether there is something to be read."""
        return (self.folder / _CHECKS).is_file()

    def drop(self) -> None:
        """Remove what is there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def place(cache: Path, base: Path, weights: Sequence[Mapping[str, Any]]) -> Place:
    """The entry of a base whose files of weights have these digests, quantized as `layers.nf4` does."""
    with beside(base) as folder:
        config = (folder / "config.json").read_bytes()
    facts = {"format": FORMAT, "weights": [item["digest"] for item in weights], "config": hashlib.sha256(config).hexdigest()}
    return Place(cache / "bases" / f"nf4-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}")


class KeptWeights(FolderWeights):
    """An entry; FormatError as soon as something in it isn't what was written."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.folder)
        self._entry = place.folder.name
        self._checks = json_file.read_object(place.folder / _CHECKS)
        missing = sorted(set(self._checks) ^ set(self._files))
        if missing:
            self._open.close()
            raise FormatError(self.where, f"{missing[0]!r} is there without its checksum, or the other way round")
        with contextlib.suppress(OSError):  # of somebody else's, which may only be read
            os.utime(place.folder)  # when it was used last

    @property
    def quantized(self) -> bool:
        """Ours: what isn't in NF4 yet may become so."""
        return False

    def raw(self, name: str) -> np.ndarray:
        """Read, and compared with its checksum."""
        array = super().raw(name)
        if _check(self._entry, name, array) != self._checks[name]:
            raise FormatError(self.where, f"tensor {name!r} is not what was written")
        return array


def _check(entry: str, name: str, array: np.ndarray) -> int:
    start = zlib.crc32(f"{entry} {name} {stored_name(array)} {array.shape}".encode())
    return zlib.crc32(safetensors_file.byte_view(array), start)


def write(place: Place, base: Path, weights: Weights) -> str | None:
    """Keep what `weights` quantized, with the tensors that stayed as they are; why not, in a line, where that fails."""
    try:
        _sweep(place.folder.parent)
        with atomic.whole(place.folder) as folder, beside(base) as texts:
            _copy_texts(texts, folder, _quantized(json_file.read_object(texts / "config.json")))
            checks = _write_weights(folder / "model.safetensors", place.folder.name, weights)
            json_file.write_text(folder / _CHECKS, json.dumps(checks))
    except OutputExistsError:
        return None  # another process was first, with the same bytes
    except (AdapterhubError, OSError) as error:
        return f"the quantized base could not be kept: {error}"
    return None


def _sweep(folder: Path) -> None:
    """Remove the entries that nobody used for long."""
    for entry in folder.glob("nf4-*"):
        if time.time() - entry.stat().st_mtime > _UNUSED:
            shutil.rmtree(entry, ignore_errors=True)


def _quantized(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "quantization_config": {**QUANTIZATION, "bnb_4bit_compute_dtype": "bfloat16"}}


def _copy_texts(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    json_file.write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for pattern in _TEXTS:
        for path in source.glob(pattern):
            if path.stat().st_size <= _MAX_TEXT and not any(path.match(other) for other in _NOT_TEXTS):
                shutil.copyfile(path, folder / path.name)


def _write_weights(path: Path, entry: str, weights: Weights) -> dict[str, int]:
    """All tensors in one file; what was quantized is in memory anyway, the rest is read one at a time. Their checksums."""
    made: dict[str, np.ndarray] = {}
    for name, (matrix, dtype) in (weights.made or {}).items():
        made |= bitsandbytes.parts(name, matrix, dtype)
    kinds = {name: (weights.dtype(name), weights.shape(name)) for name in weights.names}
    kinds |= {name: (stored_name(array), array.shape) for name, array in made.items()}
    order = safetensors_file.layout((name, *kind) for name, kind in kinds.items())
    with open(path, "wb") as file:

        def put(name: str, array: np.ndarray) -> int:
            file.write(safetensors_file.byte_view(array))
            return _check(entry, name, array)

        file.write(safetensors_file.header_bytes(order, {"format": "pt"}))
        return {name: put(name, made[name] if name in made else weights.raw(name)) for name, _, _ in order}
