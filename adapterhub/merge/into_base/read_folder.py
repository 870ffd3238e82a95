"""A base in a Hugging Face folder, ready to be merged into: its files, and its weights by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_converters import bases as base_model
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.bases.quantized import settings
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile, TensorInfo
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError

from .dequantize import Place, unpacked
from .tensor_io import Source, Stored, kind

# Modules that transformers builds from Conv1D, whose weight is `(in, out)` (`pytorch_utils.py`).
CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}


@dataclass(frozen=True)
class Shard:
    """One weights file of the base; `tensors` in file order."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    data_start: int
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Weight:
    """A parameter of the base: its shape and the type it has, or gets when it is unpacked from a quantized one.

    `unpacked` is where its numbers come from then; else they are the bytes of the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    size: int
    unpacked: Source | None = None

    @property
    def rows(self) -> int:
        """Rows of it seen as a matrix; a vector is a column."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def source(self) -> Source:
        """Its numbers; RefusedError for a type that is none of weights."""
        if self.unpacked:
            return self.unpacked
        form = kind(self.dtype)
        if form is None:
            raise RefusedError(self.name, f"is {self.dtype}, not bfloat16, float16 or float32", "Dequantize it first")
        return Stored(self.path, self.offset, self.rows, self.columns, form)


@dataclass(frozen=True)
class Folder:
    """A model folder: `weights` by name in the order of its files, the scales of quantized ones not among them.

    `method`: how its weights are quantized; None for floats.
    """

    path: Path
    spec: BaseSpec
    shards: tuple[Shard, ...]
    weights: Mapping[str, Weight]
    config: Mapping[str, Any]
    method: str | None = None


def read_folder(base: Path, *, dequantize: bool = False) -> Folder:
    """The headers of a model folder; RefusedError for a quantized one, unless it is to be dequantized and can be."""
    if base.is_file():
        raise RefusedError(str(base), "is a file, not a Hugging Face folder", "Name the folder of a model")
    if not base.is_dir():
        raise NotFoundError(str(base), "no such folder")
    spec = base_model.read_hf(base)
    paths = base_model.weight_files(base)
    if not paths:
        pickles = sorted(item.name for item in base.glob("*.bin"))
        what = f"{pickles[0]} is a pickle, which can run code when loaded" if pickles else "no model.safetensors"
        raise (RefusedError if pickles else NotFoundError)(str(base), what, "Save the base with safe_serialization=True")
    shards = tuple(_read_shard(path) for path in paths)
    _check_index(base, shards)
    config = json_file.read_object(base / "config.json")
    if spec.quantization:
        if not dequantize:
            raise RefusedError(
                str(base),
                f"the weights are quantized ({spec.quantization}); a sum rounded to that grid would lose most of the adapter",
                "Merge into the full-precision model, or add --dequantize for a model in floats",
            )
        if spec.model_type in CONV1D and settings(config).get("quant_method") == "bitsandbytes":
            what = f"bitsandbytes has the weights of {spec.model_type} transposed, as no model in floats has them"
            raise RefusedError(str(base), what, "Name the full-precision model")
        return Folder(base, spec, shards, _unpacked(spec, shards, config), config, spec.quantization)
    weights = {
        info.name: Weight(info.name, info.shape, info.dtype, shard.path, info.offset, info.size)
        for shard in shards
        for info in shard.tensors.values()
    }
    return Folder(base, spec, shards, weights, config)


def _unpacked(spec: BaseSpec, shards: Sequence[Shard], config: Mapping[str, Any]) -> dict[str, Weight]:
    places = {info.name: Place(shard.path, info) for shard in shards for info in shard.tensors.values()}
    return {
        name: Weight(name, one.shape, one.dtype, one.place.path, one.place.info.offset, one.place.info.size, one.source)
        for name, one in unpacked(spec, places, config).items()
    }


def _read_shard(path: Path) -> Shard:
    with SafetensorsFile(path) as file:
        return Shard(path, file.tensors, file.header.data_start, file.header.metadata)


def _check_index(base: Path, shards: Sequence[Shard]) -> None:
    seen: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if seen.setdefault(name, shard.path.name) != shard.path.name:
                raise FormatError(str(base), f"tensor {name!r} is in {seen[name]} and in {shard.path.name}")
    index = base / "model.safetensors.index.json"
    if index.exists():
        for name, file in json_file.read_object(index)["weight_map"].items():
            if seen.get(name) != file:
                raise FormatError(str(index), f"says that tensor {name!r} is in {file}, which it is not")
