"""A Hugging Face folder written again: in the base's own files where nothing else is asked for, else in new ones."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapterhub_converters import dtypes
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import header_bytes
from adapterhub_converters.errors import RefusedError

from .edits import Edit
from .nf4_writer import Entry, IntoNF4, in_nf4, quantization_config
from .options import DTYPES, NF4, Options
from .output_files import Copy, Made, OutFile, Part, Text
from .read_folder import Folder, Shard, Weight
from .tensor_io import Source, kind

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
        packed: Those that are written in NF4.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    added: Mapping[str, Weight] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Tensor:
    """One weight of the output: made, or copied from places of the base (path and byte), of which there is one an entry."""

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
        """Laid out, given where in the file each entry is."""
        if self.made:
            packing = self.made.packing
            yield replace(
                self.made, at=at[self.name], packing=replace(packing, places=at) if isinstance(packing, IntoNF4) else None
            )
        for entry, (path, offset) in zip(self.entries if self.places else (), self.places, strict=True):
            yield Copy(path, offset, _bytes(entry), at[entry[0]], _bytes(entry))


def _bytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * dtypes.BITS[dtype] // 8


def folder_files(folder: Folder, what: Written, options: Options) -> tuple[tuple[OutFile, ...], dict[str, str | None]]:
    """The weight files, and the text of files beside them that differ from the base's; None for one that goes."""
    anew = options.dtype or options.requantize or options.shard_size or folder.method or what.added or what.shapes
    if not anew:
        files = tuple(OutFile(shard.path.name, list(_as_it_is(folder, shard, what))) for shard in folder.shards)
        return files, {**_config(folder, what.config)}
    tensors = list(_tensors(folder, what, options))
    groups = list(_groups(tensors, options.shard_size))
    names = _names(len(groups))
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
        raise RefusedError(weight.name, f"is {dtype}, not bfloat16, float16 or float32", "Dequantize it first")
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
    stepwise, stored = not options.dtype and not folder.method, in_nf4(folder)
    for weight in (*folder.weights.values(), *what.added.values()):
        name, shape = weight.name, what.shapes.get(weight.name, weight.shape)
        # What a model keeps in float32 beside 16-bit weights, it keeps for a reason.
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
    """A weight in NF4 with all that lies beside it, the codes as bytes whatever they are stored as."""
    found = [
        (shard.path, one)
        for shard in folder.shards
        for one in shard.tensors.values()
        if one.name == name or one.name.startswith(f"{name}.")
    ]
    entries = tuple((name, "U8", (one.size, 1)) if one.name == name else (one.name, one.dtype, one.shape) for _, one in found)
    return entries, None, tuple((path, one.offset) for path, one in found)


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


def _parts(tensors: Sequence[_Tensor], metadata: Mapping[str, str]) -> list[Part]:
    """Where there are bytes beside floats, the widest numbers first: readers map them, and want them aligned."""
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
    """What config.json has to say of types that are others now; None for a key that goes."""
    said: dict[str, Any] = {}
    if folder.method:
        said |= {"quantization_config": None, "quantization": None, "compression_config": None}
    if options.dtype or folder.method or options.requantize:
        counted = Counter[str]()
        for tensor in tensors:
            counted[tensor.dtype] += math.prod(tensor.shape) * dtypes.BITS[tensor.dtype]
        key = "torch_dtype" if "torch_dtype" in folder.config and "dtype" not in folder.config else "dtype"
        said[key] = _DTYPE_NAMES.get(counted.most_common(1)[0][0])
        if options.requantize == NF4:
            said["quantization_config"] = quantization_config(folder, set(what.packed), said[key])
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
