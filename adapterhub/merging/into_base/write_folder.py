"""The weight files of a merged Hugging Face folder: the base's own layout if types and sizes stay, else a new one."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import dtypes
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_header import header_bytes
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import Edit
from .merge_options import DTYPES, NF4, Options
from .nf4_writer import Entry, NF4Packing, quantization_config, weights_in_nf4
from .output_files import Copy, EditedTensor, LiteralBytes, OutFile, Part
from .read_base import INDEX, Folder, Shard, Weight
from .tensor_files import Buffer, OpenFiles, TensorSource
from .tensor_types import floats

SINGLE = "model.safetensors"
_GENERATION_CONFIG, _END = "generation_config.json", "eos_token_id"
_SPECIAL_IDS = ("bos_token_id", _END, "pad_token_id")
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class FolderContents:
    """The contents of a merged folder: its changes, by tensor name.

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
    """A weight of the output: `edited`, or copied from `places` in the base (path and byte), one for each entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: Weight
    entries: tuple[Entry, ...]
    edited: EditedTensor | None
    places: tuple[tuple[Path, int], ...] = ()

    @property
    def size(self) -> int:
        return sum(_bytes(entry) for entry in self.entries)

    def parts(self, at: Mapping[str, int]) -> Iterator[Part]:
        """Yield the parts that write it, given the byte of the file at which each entry begins."""
        if self.edited:
            packing = self.edited.packing
            placed = replace(packing, places=at) if isinstance(packing, NF4Packing) else None
            yield replace(self.edited, at=at[self.name], packing=placed)
        for entry, (path, offset) in zip(self.entries if self.places else (), self.places, strict=True):
            yield Copy(path, offset, _bytes(entry), at[entry[0]], _bytes(entry))


def _bytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * dtypes.BITS[dtype] // 8


def folder_files(
    folder: Folder, contents: FolderContents, options: Options
) -> tuple[tuple[OutFile, ...], dict[str, str | None]]:
    """Return the weight files, and by name the other texts that differ from the base's; None for a file to leave out."""
    # With the same types and sizes every byte keeps its place, so headers and untouched ranges are copied by the kernel.
    rewritten = options.dtype or options.requantize or options.shard_size or folder.method or contents.added or contents.shapes
    if not rewritten:
        files = tuple(OutFile(shard.path.name, list(_parts_in_place(folder, shard, contents))) for shard in folder.shards)
        return files, {**_config(folder, contents.config)}
    tensors = list(_tensors(folder, contents, options))
    groups = list(_groups(tensors, options.shard_size))
    count = len(groups)
    # The names that transformers gives shards; an index is needed from the second on.
    names = [SINGLE] if count == 1 else [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    metadata = next((shard.metadata for shard in folder.shards if shard.metadata), {"format": "pt"})
    files = tuple(OutFile(name, _parts(group, metadata)) for name, group in zip(names, groups, strict=True))
    texts: dict[str, str | None] = {
        INDEX: None,
        **_config(folder, {**contents.config, **_type_keys(folder, tensors, contents, options)}),
    }
    if len(groups) > 1:
        weight_map = {
            entry[0]: name for name, group in zip(names, groups, strict=True) for tensor in group for entry in tensor.entries
        }
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        texts[INDEX] = json.dumps(index, indent=2) + "\n"
    return files, texts


def _parts_in_place(folder: Folder, shard: Shard, contents: FolderContents) -> Iterator[Part]:
    """Yield a file with its header unchanged: ranges of unchanged bytes and the changed tensors, in file order."""
    start, end = 0, shard.data_start
    for info in shard.tensors.values():
        if info.name in contents.edits or info.name in contents.sources:
            yield _copy(shard, start, end)
            yield _edited_tensor(folder.weights[info.name], contents, info.dtype, info.offset, stepwise=True)
            start = info.offset + info.size
        end = info.offset + info.size
    yield _copy(shard, start, end)


def _copy(shard: Shard, start: int, end: int) -> Copy:
    """Return the copy of a range of bytes; those of the header do not count as tensors."""
    return Copy(shard.path, start, end - start, start, end - max(start, min(shard.data_start, end)))


def _edited_tensor(weight: Weight, contents: FolderContents, dtype: str, at: int, *, stepwise: bool) -> EditedTensor:
    """Return a tensor with its edits; one of a new shape starts from zeros, since an edit replaces it."""
    name, kind = weight.name, floats(dtype, weight.name)
    edits = contents.edits.get(name, ())
    if name in contents.shapes:
        return EditedTensor(name, Blank(contents.shapes[name]), kind, at, edits, stepwise)
    return EditedTensor(name, contents.sources.get(name) or weight.source(), kind, at, edits, stepwise)


@dataclass(frozen=True)
class Blank:
    """Zeros, for a tensor that an edit replaces as a whole."""

    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The number of rows of the new tensor."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """The numbers in a row."""
        return self.shape[1] if len(self.shape) > 1 else 1

    def read(self, opened: OpenFiles, start: int, stop: int, out: NDArray[np.float32], buffer: Buffer) -> None:
        """Fill `out` with zeros."""
        out[...] = 0


def _tensors(folder: Folder, contents: FolderContents, options: Options) -> Iterator[_Tensor]:
    """Yield all weights of the output, in the order of the base's files."""
    elements_by_dtype = Counter[str]()
    for weight in folder.weights.values():
        elements_by_dtype[weight.dtype] += weight.rows * weight.columns
    main_dtype = elements_by_dtype.most_common(1)[0][0]
    stepwise, stored = not options.dtype and not folder.method, weights_in_nf4(folder)
    for weight in (*folder.weights.values(), *contents.added.values()):
        name, shape = weight.name, contents.shapes.get(weight.name, weight.shape)
        # A model that stores some tensors in float32 next to 16-bit weights does so for a reason.
        dtype = DTYPES[options.dtype] if options.dtype and weight.dtype == main_dtype else weight.dtype
        untouched = name not in contents.edits and name not in contents.sources and name not in contents.shapes
        if untouched and name in contents.packed and name in stored:
            yield _Tensor(name, dtype, shape, weight, *_as_stored(folder, name))
        elif untouched and dtype == weight.dtype and not weight.dequantized and name not in contents.packed:
            yield _Tensor(name, dtype, shape, weight, ((name, dtype, shape),), None, ((weight.path, weight.offset),))
        else:
            edited = _edited_tensor(weight, contents, dtype, 0, stepwise=stepwise)
            packing = NF4Packing(name, (shape[0], shape[1]), dtype) if name in contents.packed else None
            entries = packing.entries if packing else ((name, dtype, shape),)
            yield _Tensor(name, dtype, shape, weight, entries, replace(edited, packing=packing))


def _as_stored(folder: Folder, name: str) -> tuple[tuple[Entry, ...], None, tuple[tuple[Path, int], ...]]:
    """Return the entries and places of a weight in NF4 and its other tensors; codes are bytes, whatever their stored type."""
    stored = [
        (shard.path, info)
        for shard in folder.shards
        for info in shard.tensors.values()
        if info.name == name or info.name.startswith(f"{name}.")
    ]
    entries = tuple(
        (name, "U8", (info.size, 1)) if info.name == name else (info.name, info.dtype, info.shape) for _, info in stored
    )
    return entries, None, tuple((path, info.offset) for path, info in stored)


def _groups(tensors: list[_Tensor], shard_size: int | None) -> Iterator[list[_Tensor]]:
    """Yield the tensors of each file: as many as fit into the shard size, or without one those of one file of the base."""
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
    """Return a header and the tensors.

    With bytes among the floats, the widest types come first: readers map them into memory and need alignment.
    """
    entries = [entry for tensor in tensors for entry in tensor.entries]
    if any(tensor.edited and tensor.edited.packing for tensor in tensors) or any(len(tensor.entries) > 1 for tensor in tensors):
        entries.sort(key=lambda entry: -dtypes.BITS[entry[1]])
    head = header_bytes(entries, metadata)
    places, end = {}, len(head)
    for entry in entries:
        places[entry[0]] = end
        end += _bytes(entry)
    return [LiteralBytes(head, 0), *(part for tensor in tensors for part in tensor.parts(places))]


def _type_keys(folder: Folder, tensors: list[_Tensor], contents: FolderContents, options: Options) -> dict[str, Any]:
    """Return the keys of config.json that describe types and change; None for a key to remove."""
    changes: dict[str, Any] = {}
    # The output is not quantized any more, or in another way: no stale quantization may stay in the config.
    if folder.method:
        changes |= {"quantization_config": None, "quantization": None, "compression_config": None}
    if options.dtype or folder.method or options.requantize:
        counted = Counter[str]()
        for tensor in tensors:
            counted[tensor.dtype] += math.prod(tensor.shape) * dtypes.BITS[tensor.dtype]
        # transformers 4 writes `torch_dtype`, transformers 5 `dtype`; keep the base's spelling.
        key = "torch_dtype" if "torch_dtype" in folder.config and "dtype" not in folder.config else "dtype"
        changes[key] = _DTYPE_NAMES.get(counted.most_common(1)[0][0])
        if options.requantize == NF4:
            changes["quantization_config"] = quantization_config(folder, set(contents.packed), changes[key])
    return changes


def _config(folder: Folder, changes: Mapping[str, Any]) -> dict[str, str]:
    """Return config.json with changed values, at every level that has the key; a new key is added at the top level."""
    if not changes:
        return {}
    config = copy.deepcopy(dict(folder.config))
    # Composite models keep the language model's config in an object such as `text_config`.
    inner = [config, *(value for value in config.values() if isinstance(value, dict) and "hidden_size" in value)]
    for key, value in changes.items():
        levels = [level for level in inner if key in level]
        for level in levels or ([config] if value is not None else []):
            if value is None:
                del level[key]
            else:
                level[key] = value
    return {"config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def generation_config(folder: Folder, end_token: int) -> dict[str, str]:
    """Return generation_config.json with one more token that ends answers.

    A base without that file stops where its config says, which transformers reads only then.
    """
    path = folder.path / _GENERATION_CONFIG
    config = {**folder.config, **(folder.config.get("text_config") or {})}
    special = {key: config[key] for key in _SPECIAL_IDS if config.get(key) is not None}
    document = json_file.read_object(path) if path.is_file() else special
    ends = document.get(_END, special.get(_END))
    ends = [*(ends if isinstance(ends, list) else [ends] if ends is not None else []), end_token]
    return {_GENERATION_CONFIG: json.dumps({**document, _END: ends}, indent=2, ensure_ascii=False) + "\n"}


def write_texts(folder: Path, texts: Mapping[str, str | None]) -> None:
    """Write the files that differ from the base's, and remove those to leave out."""
    for name, text in texts.items():
        # The base's own version may have been copied already.
        (folder / name).unlink(missing_ok=True)
        if text is not None:
            json_file.write_text(folder / name, text)
