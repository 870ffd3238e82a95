"""The weight files of a merged Hugging Face folder: the base's own files if types and sizes stay, else new ones."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import header_bytes

from .edits import Edit
from .nf4_writer import Entry, IntoNF4, in_nf4, quantization_config
from .options import DTYPES, NF4, Options
from .output_files import Copy, Made, OutFile, Part, Text
from .read_base import INDEX, Folder, Shard, Weight
from .tensor_files import Buffer, Opened, TensorSource
from .tensor_types import floats

SINGLE = "model.safetensors"
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Written:
    """The changes of a folder, by tensor name.

    Attributes:
        edits: The edits of each changed tensor.
        added: Tensors that the base lacks, each initially a copy of one that it has.
        shapes: The new shapes of tensors whose shape changes.
        config: The keys of config.json that change.
        sources: The numbers of tensors that differ from the base's before the edits.
        packed: Tensors to store in NF4.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    added: Mapping[str, Weight] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, TensorSource] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Tensor:
    """A weight of the output: `made`, or copied from `places` in the base (path and byte), one for each entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: Weight
    entries: tuple[Entry, ...]
    made: Made | None
    places: tuple[tuple[Path, int], ...] = ()

    @property
    def size(self) -> int:
        return sum(_bytes(entry) for entry in self.entries)

    def parts(self, at: Mapping[str, int]) -> Iterator[Part]:
        """The parts that write it, given the byte of the file at which each entry begins."""
        if self.made:
            packing = self.made.packing
            placed = replace(packing, places=at) if isinstance(packing, IntoNF4) else None
            yield replace(self.made, at=at[self.name], packing=placed)
        for entry, (path, offset) in zip(self.entries if self.places else (), self.places, strict=True):
            yield Copy(path, offset, _bytes(entry), at[entry[0]], _bytes(entry))


def _bytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * dtypes.BITS[dtype] // 8


def folder_files(folder: Folder, what: Written, options: Options) -> tuple[tuple[OutFile, ...], dict[str, str | None]]:
    """The weight files, and by name the texts of the other files that differ from the base's; None for one to leave out."""
    rewritten = options.dtype or options.requantize or options.shard_size or folder.method or what.added or what.shapes
    if not rewritten:
        files = tuple(OutFile(shard.path.name, list(_as_it_is(folder, shard, what))) for shard in folder.shards)
        return files, {**_config(folder, what.config)}
    tensors = list(_tensors(folder, what, options))
    groups = list(_groups(tensors, options.shard_size))
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    metadata = next((shard.metadata for shard in folder.shards if shard.metadata), {"format": "pt"})
    files = tuple(OutFile(name, _parts(group, metadata)) for name, group in zip(names, groups, strict=True))
    texts: dict[str, str | None] = {INDEX: None, **_config(folder, {**what.config, **_types(folder, tensors, what, options)})}
    if len(groups) > 1:
        weight_map = {
            entry[0]: name for name, group in zip(names, groups, strict=True) for one in group for entry in one.entries
        }
        index = {"metadata": {"total_size": sum(one.size for one in tensors)}, "weight_map": dict(sorted(weight_map.items()))}
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return files, texts


def _as_it_is(folder: Folder, shard: Shard, what: Written) -> Iterator[Part]:
    """A file with its header unchanged: ranges of unchanged bytes, and the changed tensors, in file order."""
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
    name, kind = weight.name, floats(dtype, weight.name)
    edits = what.edits.get(name, ())
    if name in what.shapes:
        return Made(name, Blank(what.shapes[name]), kind, at, edits, stepwise)
    return Made(name, what.sources.get(name) or weight.source(), kind, at, edits, stepwise)


@dataclass(frozen=True)
class Blank:
    """Zeros, for a tensor that an edit replaces as a whole."""

    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the new tensor."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.shape[1] if len(self.shape) > 1 else 1

    def read(self, opened: Opened, start: int, stop: int, out: NDArray[np.float32], buffer: Buffer) -> None:
        """Fill `out` with zeros."""
        out[...] = 0


def _tensors(folder: Folder, what: Written, options: Options) -> Iterator[_Tensor]:
    usual = Counter[str]()
    for weight in folder.weights.values():
        usual[weight.dtype] += weight.rows * weight.columns
    main = usual.most_common(1)[0][0]
    stepwise, stored = not options.dtype and not folder.method, in_nf4(folder)
    for weight in (*folder.weights.values(), *what.added.values()):
        name, shape = weight.name, what.shapes.get(weight.name, weight.shape)
        # A model that stores some tensors in float32 next to 16-bit weights does so for a reason.
        dtype = DTYPES[options.dtype] if options.dtype and weight.dtype == main else weight.dtype
        untouched = name not in what.edits and name not in what.sources and name not in what.shapes
        if untouched and name in what.packed and name in stored:
            yield _Tensor(name, dtype, shape, weight, *_as_stored(folder, name))
        elif untouched and dtype == weight.dtype and not weight.unpacked and name not in what.packed:
            yield _Tensor(name, dtype, shape, weight, ((name, dtype, shape),), None, ((weight.path, weight.offset),))
        else:
            made = _made(weight, what, dtype, 0, stepwise=stepwise)
            packing = IntoNF4(name, (shape[0], shape[1]), dtype) if name in what.packed else None
            entries = packing.entries if packing else ((name, dtype, shape),)
            yield _Tensor(name, dtype, shape, weight, entries, replace(made, packing=packing))


def _as_stored(folder: Folder, name: str) -> tuple[tuple[Entry, ...], None, tuple[tuple[Path, int], ...]]:
    """A weight in NF4 with its other tensors; the codes are bytes, whatever type they are stored as."""
    found = [
        (shard.path, one)
        for shard in folder.shards
        for one in shard.tensors.values()
        if one.name == name or one.name.startswith(f"{name}.")
    ]
    entries = tuple((name, "U8", (one.size, 1)) if one.name == name else (one.name, one.dtype, one.shape) for _, one in found)
    return entries, None, tuple((path, one.offset) for path, one in found)


def _groups(tensors: list[_Tensor], shard_size: int | None) -> Iterator[list[_Tensor]]:
    """The tensors of each file: as many as fit into the shard size, or without one those of one file of the base."""
    group: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        full = size + tensor.size > shard_size if shard_size else group and tensor.weight.path != group[-1].weight.path
        if group and full:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.size
    yield group


def _parts(tensors: Sequence[_Tensor], metadata: Mapping[str, str]) -> list[Part]:
    """A header and the tensors; with bytes among the floats, the widest types first: readers map them and need alignment."""
    entries = [entry for one in tensors for entry in one.entries]
    if any(one.made and one.made.packing for one in tensors) or any(len(one.entries) > 1 for one in tensors):
        entries.sort(key=lambda entry: -dtypes.BITS[entry[1]])
    head = header_bytes(entries, metadata)
    places, end = {}, len(head)
    for entry in entries:
        places[entry[0]] = end
        end += _bytes(entry)
    return [Text(head, 0), *(part for one in tensors for part in one.parts(places))]


def _types(folder: Folder, tensors: list[_Tensor], what: Written, options: Options) -> dict[str, Any]:
    """The keys of config.json that describe types and change; None for a key to remove."""
    found: dict[str, Any] = {}
    if folder.method:
        found |= {"quantization_config": None, "quantization": None, "compression_config": None}
    if options.dtype or folder.method or options.requantize:
        counted = Counter[str]()
        for tensor in tensors:
            counted[tensor.dtype] += math.prod(tensor.shape) * dtypes.BITS[tensor.dtype]
        key = "torch_dtype" if "torch_dtype" in folder.config and "dtype" not in folder.config else "dtype"
        found[key] = _DTYPE_NAMES.get(counted.most_common(1)[0][0])
        if options.requantize == NF4:
            found["quantization_config"] = quantization_config(folder, set(what.packed), found[key])
    return found


def _config(folder: Folder, changes: Mapping[str, Any]) -> dict[str, str]:
    """config.json with changed values, at every level that has the key; a new key is added at the top level."""
    if not changes:
        return {}
    config = copy.deepcopy(dict(folder.config))
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
    """Write the files that differ from the base's, and remove those to leave out."""
    for name, text in texts.items():
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            json_file.write_text(folder / name, text)
