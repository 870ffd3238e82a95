"""A Hugging Face folder written again: in the base's own files where nothing else is asked for, else in new ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.files import json_file
from adapterhub_converters.files.safetensors_file import header_bytes

from .edits import Edit
from .hf_base import Folder, Shard, Weight
from .options import DTYPES, Options
from .running import Copy, Made, OutFile, Part, Source, Text
from .stored import kind

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Written:
    """What is to be written of a folder.

    Attributes:
        edits: By tensor name.
        added: Tensors the base doesn't have, each a copy of one that it has to begin with.
        shapes: Tensors that are replaced by others of another shape.
        config: Keys of `config.json` that change.
        sources: Tensors whose numbers are others than the base's even before the edits.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    added: Mapping[str, Weight] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: Weight
    made: Made | None

    @property
    def size(self) -> int:
        return self.made.size if self.made else self.weight.size


def folder_files(folder: Folder, what: Written, options: Options) -> tuple[tuple[OutFile, ...], dict[str, str | None]]:
    """The weight files, and the text of files beside them that differ from the base's; None for one that goes."""
    anew = options.dtype or options.shard_size or folder.method or what.added or what.shapes
    if not anew:
        files = tuple(OutFile(shard.path.name, list(_as_it_is(folder, shard, what))) for shard in folder.shards)
        return files, {**_config(folder, what.config)}
    tensors = list(_tensors(folder, what, options))
    groups = list(_groups(tensors, options.shard_size))
    names = _names(len(groups))
    metadata = next((shard.metadata for shard in folder.shards if shard.metadata), {"format": "pt"})
    files = tuple(
        OutFile(name, _parts(group, metadata, stepwise=not options.dtype and not folder.method))
        for name, group in zip(names, groups, strict=True)
    )
    texts: dict[str, str | None] = {INDEX: None, **_config(folder, {**what.config, **_types(folder, tensors, options)})}
    if len(groups) > 1:
        weight_map = {one.name: name for name, group in zip(names, groups, strict=True) for one in group}
        index = {"metadata": {"total_size": sum(one.size for one in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return files, texts


def _names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _as_it_is(folder: Folder, shard: Shard, what: Written) -> Iterator[Part]:
    """A file with its header as it is: runs of untouched bytes, and the touched tensors, in file order."""
    start, end = 0, shard.data_start
    for info in shard.tensors.values():
        if info.name in what.edits or info.name in what.sources:
            yield _copy(shard, start, end)
            yield _made(folder.weights[info.name], what, info.dtype, info.offset, stepwise=True)
            start = info.offset + info.size
        end = info.offset + info.size
    yield _copy(shard, start, end)


def _copy(shard: Shard, start: int, end: int) -> Copy:
    return Copy(shard.path, start, end - start, start, end - max(start, min(shard.data_start, end)))


def _made(weight: Weight, what: Written, dtype: str, at: int, *, stepwise: bool) -> Made:
    form = kind(dtype)
    if form is None:
        raise RefusedError(weight.name, f"is {dtype}, not bfloat16, float16 or float32", "Dequantise it first")
    name = weight.name
    edits = what.edits.get(name, ())
    if name in what.shapes:
        return Made(name, Blank(what.shapes[name]), form, at, edits, stepwise)
    return Made(name, what.sources.get(name) or weight.source(), form, at, edits, stepwise)


@dataclass(frozen=True)
class Blank:
    """Zeros in the place of a tensor that an edit fills."""

    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """As many as the new tensor has."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.shape[1] if len(self.shape) > 1 else 1

    def read(self, opened: Any, start: int, stop: int, out: Any, buffer: Any) -> None:
        """Zeros."""
        out[...] = 0


def _tensors(folder: Folder, what: Written, options: Options) -> Iterator[_Tensor]:
    usual = Counter[str]()
    for weight in folder.weights.values():
        usual[weight.dtype] += weight.rows * weight.columns
    main = usual.most_common(1)[0][0]
    stepwise = not options.dtype and not folder.method
    for weight in (*folder.weights.values(), *what.added.values()):
        name, shape = weight.name, what.shapes.get(weight.name, weight.shape)
        # What a model keeps in float32 beside 16-bit weights, it keeps for a reason.
        dtype = DTYPES[options.dtype] if options.dtype and weight.dtype == main else weight.dtype
        untouched = name not in what.edits and name not in what.sources and name not in what.shapes
        if untouched and dtype == weight.dtype and not weight.unpacked:
            yield _Tensor(name, dtype, shape, weight, None)
        else:
            yield _Tensor(name, dtype, shape, weight, _made(weight, what, dtype, 0, stepwise=stepwise))


def _groups(tensors: list[_Tensor], shard_size: int | None) -> Iterator[list[_Tensor]]:
    """Tensors of one file each: as many as fit into the size asked for, or those that were in one file of the base."""
    group: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        full = (
            size + tensor.size > shard_size if shard_size else tensor.weight.path != group[-1].weight.path if group else False
        )
        if group and full:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.size
    yield group


def _parts(tensors: list[_Tensor], metadata: Mapping[str, str], *, stepwise: bool) -> list[Part]:
    head = header_bytes(((one.name, one.dtype, one.shape) for one in tensors), metadata)
    parts: list[Part] = [Text(head, 0)]
    at = len(head)
    for one in tensors:
        if one.made:
            parts.append(Made(one.name, one.made.source, one.made.kind, at, one.made.edits, stepwise))
        else:
            parts.append(Copy(one.weight.path, one.weight.offset, one.weight.size, at, one.weight.size))
        at += one.size
    return parts


def _types(folder: Folder, tensors: list[_Tensor], options: Options) -> dict[str, Any]:
    """What config.json has to say of types that are others now; None for a key that goes."""
    said: dict[str, Any] = {}
    if folder.method:
        said |= {"quantization_config": None, "quantization": None, "compression_config": None}
    if options.dtype or folder.method:
        counted = Counter[str]()
        for tensor in tensors:
            counted[tensor.dtype] += tensor.size
        key = "torch_dtype" if "torch_dtype" in folder.config and "dtype" not in folder.config else "dtype"
        said[key] = _DTYPE_NAMES.get(counted.most_common(1)[0][0])
    return said


def _config(folder: Folder, changes: Mapping[str, Any]) -> dict[str, str]:
    """The config with other values, wherever in it the keys are; a key that is nowhere comes at the top."""
    if not changes:
        return {}
    config = json.loads(json.dumps(folder.config))
    inner = [config, *(value for value in config.values() if isinstance(value, dict) and "hidden_size" in value)]
    for key, value in changes.items():
        there = [place for place in inner if key in place]
        for place in there or ([config] if value is not None else []):
            if value is None:
                del place[key]
            else:
                place[key] = value
    return {"config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def write_texts(folder: Path, texts: Mapping[str, str | None]) -> None:
    """Write the files beside the weights that aren't the base's own, and remove those that go."""
    for name, text in texts.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            json_file.write_text(folder / name, text)
