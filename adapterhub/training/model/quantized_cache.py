"""The cache of quantized bases, keyed by the digests of their files: each base is quantized once.

An entry is a folder as bitsandbytes serializes a model, with config and tokenizer, so that transformers can load it too. It is
written completely or not at all. Each tensor has a CRC-32 over the entry's name and its own, its dtype, shape and bytes, which
is verified when it is read; an entry that is damaged, or belongs to another base, is removed and written again. This protects
against disk errors and crashes only: anyone who can write to the folder can change a base as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adapterhub.training.layers import bitsandbytes_format
from adapterhub.training.train_config import BaseConfig, LoRAConfig
from adapterhub_converters.bases import weight_files
from adapterhub_converters.bases.bitsandbytes_state import QUANTIZATION
from adapterhub_converters.containers import atomic, json_file, safetensors_file, safetensors_header
from adapterhub_converters.errors import AdapterhubError, FormatError, OutputExistsError
from adapterhub_converters.lazy_dataclass import dataclass

from .base_files import BaseFiles
from .base_tensors import FolderWeights, Weights, stored_name

FORMAT = 2  # the format version of entries, which is part of their names
_CHECKSUMS = "checks.json"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = ("*.index.json", "config.json", _CHECKSUMS)
_MAX_AGE = 60 * 86400  # seconds since an entry was last used, after which it is removed
_MAX_COPIED_SIZE = 1 << 26  # bytes; a tokenizer with a vocabulary of 260,000 takes half of that


@dataclass(frozen=True)
class Entry:
    """The folder of one quantized base, which may not exist yet."""

    folder: Path

    @property
    def exists(self) -> bool:
        """Whether the entry has been written."""
        return (self.folder / _CHECKSUMS).is_file()

    def remove(self) -> None:
        """Remove the entry as far as possible, ignoring errors."""
        shutil.rmtree(self.folder, ignore_errors=True)


def entry_of(files: BaseFiles, base: BaseConfig, adapter: LoRAConfig) -> Entry | None:
    """Return the entry of a base, named by the digests of its weights and config, as `layers.nf4_matrix` quantizes them.

    None without a cache, for a base that is not quantized, and for one that is changed before quantization (`[lora] init`).
    """
    if files.cache is None or base.quantize != "nf4" or adapter.init != "default":
        return None
    config = hashlib.sha256(files.config_text.encode()).hexdigest()
    key = {"format": FORMAT, "weights": [item["digest"] for item in files.digests], "config": config}
    return Entry(files.cache / "bases" / f"nf4-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}")


class CachedWeights(FolderWeights):
    """The tensors of an entry; raises FormatError for any that differs from what was written."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.folder, weight_files(entry.folder))
        self._entry = entry.folder.name
        self._checksums = json_file.read_object(entry.folder / _CHECKSUMS)
        unmatched = sorted(set(self._checksums) ^ set(self._files))
        if unmatched:
            self._open.close()
            raise FormatError(self.location, f"{unmatched[0]!r} is not in both {_CHECKSUMS} and the weights")
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(entry.folder)  # the time of its last use

    @property
    def quantized(self) -> bool:
        """False: this program wrote the entry, so tensors that are not in NF4 yet may be quantized."""
        return False

    def raw(self, name: str) -> np.ndarray:
        """Read a tensor and verify its checksum."""
        array = super().raw(name)
        if _checksum(self._entry, name, array) != self._checksums[name]:
            raise FormatError(self.location, f"tensor {name!r} differs from what was written")
        return array


def _checksum(entry: str, name: str, array: np.ndarray) -> int:
    # The entry's name is part of the checksum, so that a tensor from another entry does not pass.
    start = zlib.crc32(f"{entry} {name} {stored_name(array)} {array.shape}".encode())
    return zlib.crc32(safetensors_file.byte_view(array), start)


def write(entry: Entry, files: BaseFiles, weights: Weights) -> str | None:
    """Write what `weights` quantized, and the tensors that stayed unchanged; return a note if that fails."""
    try:
        _remove_unused(entry.folder.parent)
        with atomic.pending_output(entry.folder) as folder:
            config = json_file.parse_object(files.config_text, f"{files.path}: config.json")
            config["quantization_config"] = {**QUANTIZATION, "bnb_4bit_compute_dtype": "bfloat16"}
            json_file.write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            _copy_texts(files.folder, folder)
            checksums = _write_weights(folder / "model.safetensors", entry.folder.name, weights)
            json_file.write_text(folder / _CHECKSUMS, json.dumps(checksums))
    except OutputExistsError:
        return None  # another process wrote the same bytes first
    except (AdapterhubError, OSError) as error:
        return f"the quantized base could not be cached: {error}"
    return None


def _remove_unused(folder: Path) -> None:
    """Remove the entries in `folder` that were last used too long ago, by their modification time."""
    # A reader updates the modification time of the entry: not every file system records access times.
    for entry in folder.glob("nf4-*"):
        if time.time() - entry.stat().st_mtime > _MAX_AGE:
            Entry(entry).remove()


def _copy_texts(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, and other small text files."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if (
                path.is_file()
                and path.stat().st_size <= _MAX_COPIED_SIZE
                and not any(path.match(excluded) for excluded in _NOT_COPIED)
            ):
                shutil.copyfile(path, folder / path.name)


def _write_weights(path: Path, entry: str, weights: Weights) -> Mapping[str, int]:
    """Write all tensors to one file and return their checksums; those that were not quantized are read one at a time."""
    fresh: dict[str, np.ndarray] = {}
    for name, (matrix, dtype) in (weights.fresh or {}).items():
        fresh |= bitsandbytes_format.tensors_of(name, matrix, dtype)
    dtypes_and_shapes = {name: (weights.dtype(name), weights.shape(name)) for name in weights.names}
    dtypes_and_shapes |= {name: (stored_name(array), array.shape) for name, array in fresh.items()}
    order = safetensors_header.sorted_entries((name, *dtype_and_shape) for name, dtype_and_shape in dtypes_and_shapes.items())
    checksums = {}
    with open(path, "wb") as file:
        file.write(safetensors_header.header_bytes(order, {"format": "pt"}))
        for name, _, _ in order:
            array = fresh[name] if name in fresh else weights.raw(name)
            file.write(safetensors_file.byte_view(array))
            checksums[name] = _checksum(entry, name, array)
    return checksums
