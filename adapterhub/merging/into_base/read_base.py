"""A base on disk, a Hugging Face folder or a GGUF model: its headers, and its files, open while they are used.

The files stay open from reading the headers to the end of the first `with` that uses the base, and are opened again for a later
one. So a merge opens each of them twice: for the headers and the estimate, and for the output.

    base = read_base(path)
    adapters = [(convert.read(file, base=base.spec), 1.0)]
    prepare_merge(adapters, base).write(out)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

from adapterhub_converters import bases
from adapterhub_converters.bases import BaseSpec, LocalFiles, RangedFile
from adapterhub_converters.bases.gguf_base import part_paths
from adapterhub_converters.bases.quantized_shapes import quantization_settings
from adapterhub_converters.containers import gguf_file, json_file, safetensors_header
from adapterhub_converters.containers.gguf_file import GGUFHeader, GGUFTensor
from adapterhub_converters.containers.safetensors_header import TensorInfo
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .dequantize import logical_weights
from .stored_weights import StoredTensor
from .tensor_files import OpenFiles, StoredRows, TensorSource, read_at
from .tensor_types import floats

# Models whose modules transformers builds from Conv1D, with a weight of `(in, out)` (`pytorch_utils.py`).
CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONFIG, INDEX = "config.json", "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """A weights file of a folder; `tensors` in file order."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    data_start: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Weight:
    """A parameter of a folder.

    Attributes:
        shape: The shape, before quantization.
        dtype: The type of floats that is stored, or that a quantized weight is dequantized to.
        path: The file, in which the weight begins at byte `offset` and takes `size` bytes.
        dequantized: The numbers of a quantized weight; None for one stored as floats.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    size: int
    dequantized: TensorSource | None = None

    @property
    def rows(self) -> int:
        """The number of rows, seen as a matrix; a vector is a column."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def columns(self) -> int:
        """The numbers in a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def source(self) -> TensorSource:
        """Return the source of its numbers; RefusedError for a type that is not floats."""
        return self.dequantized or StoredRows(self.path, self.offset, self.rows, self.columns, floats(self.dtype, self.name))


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder; `config` is its config.json."""

    path: Path
    spec: BaseSpec
    config: Mapping[str, Any]
    shards: tuple[Shard, ...]
    opened: OpenFiles = field(compare=False, repr=False)

    @property
    def method(self) -> str | None:
        """The quantization of the weights; None for floats."""
        return self.spec.quantization

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """The parameters by name, in the order of the files, without the scales of quantized ones.

        Raises:
            RefusedError: The weights are quantized in a way that cannot be dequantized here.
        """
        if not self.method:
            return {
                info.name: Weight(info.name, info.shape, info.dtype, shard.path, info.offset, info.size)
                for shard in self.shards
                for info in shard.tensors.values()
            }
        if self.spec.model_type in CONV1D and quantization_settings(self.config).get("quant_method") == "bitsandbytes":
            reason = f"bitsandbytes stores the weights of {self.spec.model_type} transposed, unlike any model in floats"
            raise RefusedError(str(self.path), reason, "Name the full-precision model")
        places = {info.name: StoredTensor(shard.path, info) for shard in self.shards for info in shard.tensors.values()}
        return {
            name: Weight(
                name,
                weight.shape,
                weight.dtype,
                weight.place.path,
                weight.place.info.offset,
                weight.place.info.size,
                weight.source,
            )
            for name, weight in logical_weights(self.spec, places, self.config, self.opened).items()
        }

    def refuse_quantized(self) -> None:
        """Raise RefusedError if the weights are quantized."""
        if self.method:
            raise RefusedError(
                str(self.path),
                f"the weights are quantized ({self.method}); a sum rounded to that grid would lose most of the adapter",
                "Merge into the full-precision model, or dequantize this one",
                code="quantized-base",
            )

    def __enter__(self) -> Folder:
        self.opened.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.__exit__()


@dataclass(frozen=True)
class TensorInFile:
    """A tensor of a GGUF model and the file that contains it."""

    path: Path
    info: GGUFTensor

    @property
    def rows(self) -> int:
        """The number of rows, seen as a matrix; the experts of a stack follow one another."""
        return math.prod(self.info.shape[:-1])

    @property
    def columns(self) -> int:
        """The numbers in a row; a vector is one row."""
        return self.info.shape[-1] if self.info.shape else 1


@dataclass(frozen=True)
class GGUFBase:
    """A GGUF model in one file or several; `tensors` by name, in the order of the files."""

    path: Path
    spec: BaseSpec
    header: GGUFHeader
    tensors: Mapping[str, TensorInFile]
    opened: OpenFiles = field(compare=False, repr=False)

    def __enter__(self) -> GGUFBase:
        self.opened.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.__exit__()


Base = Folder | GGUFBase


def read_base(path: Path) -> Base:
    """Read the headers of the model in a Hugging Face folder or a GGUF file.

    Raises:
        NotFoundError: The file or folder, or the weights in it, do not exist.
        RefusedError: The weights are pickles.
        FormatError: The files do not belong together, or a header is malformed.
    """
    return read_gguf(path) if path.is_file() else read_folder(path)


def read_folder(path: Path) -> Folder:
    """Read the headers of the model in a Hugging Face folder; raises as `read_base` does."""
    if path.is_file():
        raise RefusedError(str(path), "is a file, not a Hugging Face folder", "Name the folder of a model")
    if not path.is_dir():
        raise NotFoundError(str(path), "no such folder", code="no-such-file")
    files = _Files(path)
    # Through the same opened files, so that config and headers are read once.
    spec = bases.read_files(files, "") if (path / CONFIG).is_file() else bases.read_base(path)
    shards = []
    for name in _weight_files(files):
        ranged = files.weights.get(name)
        if ranged is None:
            raise NotFoundError(str(path / name), "no such file", code="no-such-file")
        header = safetensors_header.read_header(ranged.read_at, ranged.size, ranged.location)
        shards.append(Shard(path / name, header.tensors, header.data_start, header.metadata))
    if not shards:
        pickles = sorted(item.name for item in path.glob("*.bin"))
        reason = f"{pickles[0]} is a pickle, which can run code when loaded" if pickles else "no model.safetensors"
        raise (RefusedError if pickles else NotFoundError)(str(path), reason, "Save the base with safe_serialization=True")
    _check_index(path, shards, files.document(INDEX))
    return Folder(path, spec, files.document(CONFIG), tuple(shards), files.opened)


def read_gguf(path: Path) -> GGUFBase:
    """Read the headers of a GGUF model; `path` is its file, or any part of a split model. Raises as `read_base` does."""
    files = _Files(path.parent)
    spec = bases.read_files(files, path.name)
    headers = {}
    for part in part_paths(path):
        ranged = files.weights[part.name]
        headers[part] = gguf_file.read_header(ranged.read_at, ranged.size, ranged.location)
    tensors = {name: TensorInFile(part, info) for part, header in headers.items() for name, info in header.tensors.items()}
    return GGUFBase(path, spec, next(iter(headers.values())), tensors, files.opened)


class _Files(LocalFiles):
    """The files of a folder: each large one is opened once, each small one read once.

    Attributes:
        opened: The large files.
        weights: The large files by name.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened = OpenFiles()
        self.weights: dict[str, RangedFile] = {}
        self._texts: dict[str, bytes | None] = {}

    def read_whole(self, name: str, limit: int) -> bytes | None:
        """Return the bytes of a small file."""
        if name not in self._texts:
            self._texts[name] = super().read_whole(name, limit)
        return self._texts[name]

    def sha256(self, name: str) -> str | None:
        """Return the digest of a small file; None for the tokenizer, whose digest a merge does not need."""
        return None if name == "tokenizer.json" else super().sha256(name)

    def document(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a file that was read; empty if there is none."""
        text = self._texts.get(name)
        return json_file.parse_object(text.decode(), self.label(name)) if text else {}

    def open_ranged(self, name: str) -> RangedFile | None:
        """Return a file with weights, opened on first use."""
        path = Path(self.label(name))
        if name not in self.weights and path.exists():
            # The descriptor stays open for the merge that usually follows.
            fd = self.opened.fd(path)

            def read(offset: int, n: int) -> bytes:
                size = max(0, min(n, ranged.size - offset))
                buffer = bytearray(size)
                read_at(fd, memoryview(buffer), offset)
                return bytes(buffer)

            ranged = RangedFile(os.fstat(fd).st_size, read, str(path))
            self.weights[name] = ranged
        return self.weights.get(name)


def _weight_files(files: _Files) -> list[str]:
    """Return the names of a folder's weights files, as `bases.weight_files` lists them, from the files read so far."""
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors"):
        if index := files.document(f"{name}.index.json"):
            return list(dict.fromkeys(index["weight_map"].values()))
        if name in files.weights:
            return [name]
    return []


def _check_index(folder: Path, shards: Sequence[Shard], index: Mapping[str, Any]) -> None:
    """Refuse tensors that two files contain, and an index that disagrees with the files."""
    file_of_tensor: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if file_of_tensor.setdefault(name, shard.path.name) != shard.path.name:
                raise FormatError(str(folder), f"tensor {name!r} is in {file_of_tensor[name]} and in {shard.path.name}")
    for name, file in index.get("weight_map", {}).items():
        if file_of_tensor.get(name) != file:
            raise FormatError(str(folder / INDEX), f"maps tensor {name!r} to {file}, which does not contain it")
