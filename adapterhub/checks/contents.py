"""The contents of an adapter's files: its tensors by role, whose numbers are read only when a check asks for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterhub.digest import Digest, sha256_and_head, sha256_bytes
from adapterhub.manifest import card
from adapterhub.manifest.card import Card
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.folder_contents import Inspection
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import FULL, Adapter, Delta, TunedModule, tuner_of
from adapterhub_converters.adapter_files import ADAPTER_JSON, HEAD_SIZE
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile, byte_view
from adapterhub_converters.containers.safetensors_header import SafetensorsHeader, TensorInfo, TensorKind
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.adapter_claims import AdapterClaims
from adapterhub_converters.formats.peft.tensor_keys import identify
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.lazy_imports import np
from adapterhub_converters.peft_patterns import Patterns

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

Parts = Mapping[str, TensorKind]
"""The tensors of one module, by part: `A`, `B`, `embedding_A`, `embedding_B`, `magnitude`, `bias`."""

PART_NAMES = {
    "A": "lora_A", "B": "lora_B", "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias",
}  # fmt: skip


@dataclass
class Contents:
    """An adapter as its files describe it.

    Attributes:
        path: A folder or a file; `weights` is the file name of its tensors.
        config: PEFT's config, and `config_text` its text; empty for other formats.
        pairs: From module to the tensors of its low-rank pair, by part; modules that are alike share one mapping.
        replaced: From parameter of the base to the whole tensor that replaces it.
        rows: From embedding table to the rows that replace some of its own, those of `row_ids`.
        copies: From parameter of the base to a copy of its weight that the file contains as well.
        other_deltas: Deltas that are not a pair of matrices (experts, convolutions, AdaLoRA …), with shapes but no numbers.
        tuned: Changes by a tuner other than LoRA, likewise.
        added: From parameter of the base to what such a tuner adds to it.
        renamed: Names of tensors that peft would skip, and the names that it would load.
        adapter_named: Names of tensors with the usual name of an adapter inside, which peft loads.
        unknown: Names of tensors of unknown kind.
        adapter: Set for formats that are read as a whole.
        ordered: Whether the order of the rows is known (`convert.read_unordered`).
        unread: Set for an unknown kind of adapter; its tensors are in `other_tensors`, except for halves of pairs.
        files: PEFT's weights, open until `close`, so that headers, values and digests are read through one opening.
        heads: The first bytes of every file that was opened; `digests` those computed so far.
        manifest_text: The text of adapter.json, empty if there is none; None until it is needed. Likewise `readme`, its card.
    """

    path: Path
    format: str
    weights: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pairs: dict[str, Parts] = field(default_factory=dict)
    replaced: dict[str, TensorKind] = field(default_factory=dict)
    rows: dict[str, TensorKind] = field(default_factory=dict)
    row_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[str, TensorKind] = field(default_factory=dict)
    other_deltas: dict[str, Delta] = field(default_factory=dict)
    tuned: Mapping[str, TunedModule] = field(default_factory=dict)
    added: dict[str, TensorKind] = field(default_factory=dict)
    other_tensors: dict[str, TensorKind] = field(default_factory=dict)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    adapter_named: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    adapter: Adapter | None = None
    ordered: bool = True
    unread: AdapterClaims | None = None
    notes: tuple[str, ...] = ()
    config_text: str = ""
    files: dict[Path, SafetensorsFile] = field(default_factory=dict)
    heads: dict[Path, bytes] = field(default_factory=dict)
    digests: dict[Path, Digest] = field(default_factory=dict)
    manifest_text: str | None = None
    readme: Card | None = None
    _matching: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def names(self, option: str) -> list[str]:
        """Return the strings of a config option that is a string or a list of strings; an empty list for any other value."""
        value = self.config.get(option)
        if isinstance(value, str):
            return [value]
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    @property
    def is_tuned(self) -> bool:
        """Whether the adapter is by one of PEFT's tuners other than LoRA."""
        return self.unread is None and tuner_of(self.config.get("peft_type")) is not None

    @property
    def is_whole(self) -> bool:
        """Whether the adapter consists of whole parameters alone, of a model that was tuned without a delta."""
        return self.adapter is not None and self.adapter.meta.method == FULL

    @property
    def targets(self) -> list[str]:
        """Every module or parameter that has a delta."""
        tuned = [target for target, change in self.tuned.items() if change.acts_on_weight]
        return [*self.pairs, *self.other_deltas, *tuned, *(name.rpartition(".")[0] for name in self.added)]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module with a low-rank pair, by its tensors."""
        ranks = {}
        for parts, _ in self.distinct_parts:
            tensor = parts.get("A") or parts.get("embedding_A")
            if tensor is not None and len(tensor.shape) == 2 and 0 not in tensor.shape:
                ranks[id(parts)] = tensor.shape[0]
        return {target: ranks[id(parts)] for target, parts in self.pairs.items() if id(parts) in ranks}

    def matching(self, option: str) -> Mapping[str, list[str]]:
        """Return, for each target, the keys of `rank_pattern` or `alpha_pattern` that match it, in their order.

        Targets that match no key are left out.

        Raises:
            FormatError, RefusedError: A key cannot be matched.
        """
        if option not in self._matching:
            patterns = self.config.get(option)
            # AdaLoRA's rank_pattern is a mask by tensor name.
            compiled = Patterns(patterns, peft.CONFIG) if patterns and self.config["peft_type"] != "ADALORA" else None
            matches = ((target, compiled.matching(target)) for target in self.targets) if compiled else ()
            self._matching[option] = {target: keys for target, keys in matches if keys}
        return self._matching[option]

    @cached_property
    def distinct_parts(self) -> list[tuple[Parts, int]]:
        """The different mappings in `pairs`, of which there are few, and the number of modules of each."""
        counts = Counter(map(id, self.pairs.values()))
        return [(parts, counts[key]) for key, parts in {id(parts): parts for parts in self.pairs.values()}.items()]

    def kinds(self) -> Counter[TensorKind]:
        """Return the number of tensors of each kind, among those that `tensors` names."""
        counts = Counter[TensorKind]()
        for tensors in (self.other_tensors, self.added, self.replaced, self.copies, self.rows):
            counts.update(tensors.values())
        for parts, count in self.distinct_parts:
            for kind in parts.values():
                counts[kind] += count
        return counts

    def tensors(self) -> Iterator[tuple[str, TensorKind]]:
        """Yield every tensor of a known kind, named by module and part."""
        for target, parts in self.pairs.items():
            yield from ((f"{target}.{PART_NAMES.get(part, part)}", tensor) for part, tensor in parts.items())
        yield from self.other_tensors.items()
        yield from self.added.items()
        yield from self.replaced.items()
        yield from ((f"{name} (copy)", tensor) for name, tensor in self.copies.items())
        yield from ((f"{target} (rows)", tensor) for target, tensor in self.rows.items())

    def label(self, name: str) -> str:
        """Return the name in `tensors` of a tensor in `values`."""
        if self.adapter is not None or self.unread is not None:
            return name
        _, kind, parameter, part = identify(name)
        return (
            f"{parameter}.{PART_NAMES.get(part, part)}"
            if part
            else f"{parameter} ({kind})"
            if kind in ("copy", "rows")
            else parameter
        )

    def values(self) -> Iterator[Values]:
        """Yield the numbers of every tensor of floats, in file order."""
        if self.adapter is not None:
            for name, array in self.adapter.tensors():
                flat = np.ascontiguousarray(array).reshape(-1)
                # Pieces as of a file, so that a check needs the same memory for every format.
                step = _PIECE // flat.itemsize
                for start in range(0, flat.size, step):
                    yield _values_of(name, flat[start : start + step])
            return
        if self.unread is not None and self.unread.format == "gguf":
            yield from _gguf_values(self.path)
            return
        unknown = frozenset(self.unknown)
        # One buffer for all pieces: `Values` is valid only until the next one.
        buffer = memoryview(bytearray(_PIECE))
        for file in self.files.values():
            for run, tensors_by_array in _runs(file.header, unknown):
                for start in range(0, run.size, _PIECE):
                    piece = buffer[: min(_PIECE, run.size - start)]
                    file.read_into(run, piece, start)
                    for (dtype, shift), (names, starts, ends) in tensors_by_array.items():
                        count = (len(piece) - shift) // _WIDTHS[dtype]
                        numbers = piece[shift : shift + count * _WIDTHS[dtype]]
                        yield Values(names, starts, ends if run.size <= _PIECE else [count], dtype, numbers)

    def digest(self, path: Path) -> Digest:
        """Return the digest of one of the adapter's files, read once, through the open file if there is one."""
        # Reading the card records its digest, which saves opening it again.
        if path.name.lower() in card.NAMES:
            self.card()
        if path not in self.digests:
            if path in self.files:
                self.digests[path] = self.files[path].digest()
            else:
                self.digests[path], self.heads[path] = sha256_and_head(path, HEAD_SIZE)
        return self.digests[path]

    def record_text(self, path: Path, text: str) -> None:
        """Record the digest and the first bytes of a file, so that it need not be opened again for them."""
        self._record_bytes(path, text.encode())

    def _record_bytes(self, path: Path, raw: bytes) -> None:
        self.heads[path], self.digests[path] = raw[:HEAD_SIZE], sha256_bytes(raw)

    def card(self) -> Card:
        """Return the model card of the adapter, read once; empty if there is none."""
        if self.readme is None:
            readme_bytes = card.find(self.folder)
            if readme_bytes:
                self._record_bytes(*readme_bytes)
            self.readme = card.decode(readme_bytes[1]) if readme_bytes else Card()
        return self.readme

    @property
    def folder(self) -> Path:
        """The folder of the adapter."""
        return self.path if self.path.is_dir() else self.path.parent

    def manifest(self) -> AdapterManifest | None:
        """Return the adapter.json of the adapter, read once and checked against the schema; None if there is none."""
        path = self.folder / ADAPTER_JSON
        if self.manifest_text is None:
            try:
                self.manifest_text = json_file.read_text(path)
                self.record_text(path, self.manifest_text)
            except NotFoundError:
                self.manifest_text = ""
        return AdapterManifest.parse(self.manifest_text, str(path)) if self.manifest_text else None

    def inspected(self) -> Inspection:
        """Return the adapter as a manifest describes it, without opening a file again."""
        if self.unread is not None:
            return Inspection(self.format, self.unread)
        if self.adapter is not None:
            return Inspection(self.format, self.adapter, self.ordered)
        headers = {path: file.header for path, file in self.files.items()}
        return Inspection(self.format, peft.parse_shapes(self.config_text, headers, location=str(self.path)))

    def complete_adapter(self, base: BaseSpec | None) -> Adapter | None:
        """Return the adapter with its numbers, which may be views of its files; None if it has to be read again to tell."""
        if self.unread is not None or not self.ordered:
            return None
        return self.adapter or peft.parse_files(
            self.config_text, self.files.values(), location=str(self.path), base=base, mapped=True
        )

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


_PIECE = 1 << 20  # bytes; a piece and its masked copy stay in the cache
_WIDTHS = {dtype: dtypes.BITS[dtype] // 8 for dtype in dtypes.FLOATS}


def _gguf_values(path: Path) -> Iterator[Values]:
    """Yield the numbers of the tensors of a GGUF file that are not quantized."""
    from adapterhub_converters.containers.gguf_file import GGUFFile  # late, like other readers

    with GGUFFile(path) as file:
        for name, info in file.tensors.items():
            if info.type_name in _WIDTHS and info.size:
                yield _values_of(name, file.tensor(name).reshape(-1))


def _values_of(name: str, array: np.ndarray) -> Values:
    """Return the numbers of one tensor, or of a flat piece of it."""
    return Values([name], [0], [array.size], dtypes.name_of(array.dtype), byte_view(array))


class Values(NamedTuple):
    """Numbers of tensors of one dtype, or a piece of one tensor; valid until the next ones are read.

    Attributes:
        names: As in the file.
        starts: The index in `array` at which each of the tensors in `names` begins.
        ends: The index behind each; numbers between two tensors belong to one of another dtype.
        dtype: Their name in safetensors.
        data: Their bytes, at most 1 MiB.
    """

    names: list[str]
    starts: list[int]
    ends: list[int]
    dtype: str
    data: memoryview

    @property
    def array(self) -> np.ndarray:
        """The numbers, flat."""
        return np.frombuffer(self.data, dtypes.NUMPY[self.dtype])


_ArrayTensors = dict[tuple[str, int], tuple[list[str], list[int], list[int]]]
"""Names, starts and ends of the tensors that one array has, by its dtype and the byte at which it begins."""


def _runs(header: SafetensorsHeader, skipped: Collection[str]) -> Iterator[tuple[TensorInfo, _ArrayTensors]]:
    """Group tensors of floats that follow each other and fit into a piece, to read them at once; a larger one is alone.

    Yields:
        A group as if it were one tensor, with the name of its first, and the tensors in it.
    """
    first, begin, end, tensors_by_array = "", 0, 0, _ArrayTensors()
    for name, kind, offset in zip(header.names, header.kinds, header.offsets(), strict=False):
        if not kind.size or kind.dtype not in _WIDTHS or name in skipped:
            continue
        # A gap, or a piece that would grow too large: close this run and start another.
        if offset != end or end + kind.size - begin > _PIECE:
            if tensors_by_array:
                yield TensorInfo(first, "", (), begin, end - begin), tensors_by_array
            first, begin, tensors_by_array = name, offset, {}
        end, width = offset + kind.size, _WIDTHS[kind.dtype]
        # Tensors of one dtype share an array only if they are aligned to each other.
        group = kind.dtype, (offset - begin) % width
        if group not in tensors_by_array:
            tensors_by_array[group] = [], [], []
        names, starts, ends = tensors_by_array[group]
        names.append(name)
        starts.append((offset - begin) // width)
        ends.append((end - begin) // width)
    if tensors_by_array:
        yield TensorInfo(first, "", (), begin, end - begin), tensors_by_array
