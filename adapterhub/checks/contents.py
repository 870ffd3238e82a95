"""Read what the files of an adapter contain, from their headers, and collect every problem on the way.

The readers in `adapterhub_converters` stop at the first error, because their result would be wrong. A check needs all errors,
and of a file with one bad tensor all the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapterhub.digest import Digest, sha256_and_head, sha256_bytes
from adapterhub.manifest import card
from adapterhub.manifest.card import Card
from adapterhub.manifest.document import AdapterManifest
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, plain_pairs
from adapterhub_converters.adapter_files import ADAPTER_JSON, HEAD, adapter_in, is_pickle_name, is_weights
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile, TensorInfo
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RefusedError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.formats.peft.keys import classify_native, native

from .report import Problem

Part = Mapping[str, TensorInfo]
"""The tensors of one module, by part: `A`, `B`, `embedding_A`, `embedding_B`, `magnitude`, `bias`."""


@dataclass
class Contents:
    """An adapter as its files describe it.

    Attributes:
        path: A folder or a file; `weights` is the file name of its tensors.
        config: PEFT's config, `config_text` as it was read; empty for other formats.
        pairs: Module to the tensors of its low-rank pair, by part.
        replaced: Parameter of the base to the whole tensor that replaces it.
        rows: Embedding table to the rows that replace some of its own, those of `row_ids`.
        copies: Parameter of the base to a copy of its weight that the file contains as well.
        others: Deltas that are not a pair of matrices (experts, convolutions, AdaLoRA …), with shapes but no numbers.
        renamed: Names of tensors that peft would skip, and the names that it would load.
        unknown: Names of tensors of unknown kind.
        adapter: Set for formats that are read as a whole.
        files: PEFT's weights, open until `close`, so that headers, values and digests are read through one opening.
        heads: The first bytes of every file that was opened; `digests` those computed so far.
        manifest_text: The text of adapter.json, empty without one; None until it is needed. Likewise `readme`, its card.
    """

    path: Path
    format: str
    weights: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pairs: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    rows: dict[str, TensorInfo] = field(default_factory=dict)
    row_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[str, TensorInfo] = field(default_factory=dict)
    others: dict[str, Delta] = field(default_factory=dict)
    other_tensors: dict[str, TensorInfo] = field(default_factory=dict)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    adapter: Adapter | None = None
    notes: tuple[str, ...] = ()
    config_text: str = ""
    files: dict[Path, SafetensorsFile] = field(default_factory=dict)
    heads: dict[Path, bytes] = field(default_factory=dict)
    digests: dict[Path, Digest] = field(default_factory=dict)
    manifest_text: str | None = None
    readme: Card | None = None

    def names(self, option: str) -> list[str]:
        """The strings of a config option that is a string or a list of strings; none for any other value."""
        value = self.config.get(option)
        if isinstance(value, str):
            return [value]
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    @property
    def targets(self) -> list[str]:
        """Every module or parameter that has a delta."""
        return [*self.pairs, *self.others]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The rank of each module with a low-rank pair, by its tensors."""
        found: dict[str, int] = {}
        for target, parts in self.pairs.items():
            tensor = parts.get("A") or parts.get("embedding_A")
            if tensor is not None and len(tensor.shape) == 2 and 0 not in tensor.shape:
                found[target] = tensor.shape[0]
        return found

    def infos(self) -> Iterator[TensorInfo]:
        """The tensors of `tensors`, without the names that it makes."""
        for parts in self.pairs.values():
            yield from parts.values()
        for others in (self.other_tensors, self.replaced, self.copies, self.rows):
            yield from others.values()

    def tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """Every tensor of a known kind, named by module and part."""
        for target, parts in self.pairs.items():
            yield from ((f"{target}.{PART_NAMES.get(part, part)}", tensor) for part, tensor in parts.items())
        yield from self.other_tensors.items()
        yield from self.replaced.items()
        yield from ((f"{name} (copy)", tensor) for name, tensor in self.copies.items())
        yield from ((f"{target} (rows)", tensor) for target, tensor in self.rows.items())

    def values(self) -> Iterator[Values]:
        """The numbers of every tensor that numpy can compute with, in file order."""
        if self.adapter is not None:
            for name, array in self.adapter.tensors():
                flat = np.ascontiguousarray(array).reshape(-1)
                step = _PIECE // flat.itemsize
                for start in range(0, flat.size, step):
                    yield Values([name], [0], flat[start : start + step])
            return
        known = {tensor.name for tensor in self.infos() if tensor.dtype in dtypes.NUMPY}
        buffer = memoryview(bytearray(_PIECE))
        for file in self.files.values():
            for run in _runs(info for info in file.tensors.values() if info.name in known):
                dtype, size = dtypes.NUMPY[run[0].dtype], run[-1].offset + run[-1].size - run[0].offset
                starts = [(info.offset - run[0].offset) // dtype.itemsize for info in run]
                for start in range(0, size, _PIECE):
                    piece = buffer[: min(_PIECE, size - start)]
                    file.read_into(run[0], piece, start)
                    yield Values([info.name for info in run], starts, np.frombuffer(piece, dtype))

    def digest(self, path: Path) -> Digest:
        """The digest of one of the adapter's files, read once, through the open file if there is one."""
        if path.name.lower() in card.NAMES:
            self.card()
        if path not in self.digests:
            if path in self.files:
                self.digests[path] = self.files[path].digest()
            else:
                self.digests[path], self.heads[path] = sha256_and_head(path, HEAD)
        return self.digests[path]

    def has_read(self, path: Path, text: str) -> None:
        """Keep the digest and the first bytes of a file, so that it need not be opened again for them."""
        self._has_bytes(path, text.encode())

    def _has_bytes(self, path: Path, raw: bytes) -> None:
        self.heads[path], self.digests[path] = raw[:HEAD], sha256_bytes(raw)

    def card(self) -> Card:
        """The model card of the adapter, read once; empty without one."""
        if self.readme is None:
            found = card.find(self.folder)
            if found:
                self._has_bytes(*found)
            self.readme = card.decode(found[1]) if found else Card()
        return self.readme

    @property
    def folder(self) -> Path:
        """The folder of the adapter."""
        return self.path if self.path.is_dir() else self.path.parent

    def manifest(self) -> AdapterManifest | None:
        """The adapter.json of the adapter, read once and checked against the schema; None without one."""
        path = self.folder / ADAPTER_JSON
        if self.manifest_text is None:
            try:
                self.manifest_text = json_file.read_text(path)
                self.has_read(path, self.manifest_text)
            except NotFoundError:
                self.manifest_text = ""
        return AdapterManifest.parse(self.manifest_text, str(path)) if self.manifest_text else None

    def seen(self) -> tuple[str, Adapter] | None:
        """The format and the adapter, without the numbers of its tensors; None for a format that must be read as a whole."""
        if self.files:
            headers = {path: file.header for path, file in self.files.items()}
            return self.format, peft.parse_shapes(self.config_text, headers, where=str(self.path))
        return None

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


_PIECE = 1 << 20  # bytes; a piece and its masked copy stay in the cache


class Values(NamedTuple):
    """Numbers of consecutive tensors of one dtype, or a piece of one tensor: valid until the next ones are read.

    Attributes:
        names: As in the file.
        starts: The index in `array` at which each of the tensors in `names` begins.
        array: Flat, at most 1 MiB.
    """

    names: list[str]
    starts: list[int]
    array: np.ndarray


def _runs(infos: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Group tensors that follow each other in the file, have one dtype and fit into a piece; a larger one is alone."""
    run: list[TensorInfo] = []
    for info in infos:
        if not info.size:
            continue
        end = run[-1].offset + run[-1].size if run else 0
        if run and (info.offset != end or info.dtype != run[0].dtype or end + info.size - run[0].offset > _PIECE):
            yield run
            run = []
        run.append(info)
    if run:
        yield run


PART_NAMES = {
    "A": "lora_A", "B": "lora_B", "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias",
}  # fmt: skip


def read_contents(path: Path, *, base: BaseSpec | None) -> tuple[Contents | None, list[Problem]]:
    """Read an adapter in any format.

    Returns:
        The contents, which the caller closes, or None where the files are not well-formed; and the problems found so far.

    Raises:
        NotFoundError: There is no adapter at `path`.
    """
    problems = list(_pickles(path))
    given, path = path, adapter_in(path)
    candidate = Candidate(path)
    try:
        if peft.sniff(candidate):
            return _peft(path, candidate.config, base), problems
        kind = _sniff(candidate, given, pickle=any(problem.code == "pickle" for problem in problems))
        if kind is None:
            return None, problems
        contents = _whole(path, kind, base)
    except AdapterhubError as error:
        if isinstance(error, NotFoundError) and error.where in (str(path), str(given)):
            raise
        problem = unreadable_file(path, error)
        if error.code == "alpha-or-rslora-required":
            problem = Problem("missing-file", peft.CONFIG, "", "is missing, and nothing else records its alpha", cause=error)
        elif isinstance(error, RefusedError) and not (path / peft.CONFIG).exists():
            code = "does-not-fit" if base else "needs-base" if error.code == "base-required" else problem.code
            problem = dataclasses.replace(problem, code=code)
        return None, [*problems, problem]
    return contents, problems


def _sniff(candidate: Candidate, given: Path, *, pickle: bool) -> str | None:
    """The format of an adapter that is not PEFT's; None where there are only pickles."""
    from adapterhub_converters.formats import convert  # late: all readers are a fifth of the time that a check takes

    try:
        return convert.sniff(candidate)
    except FormatError as error:
        if pickle:
            return None
        if error.code != "whole-model" and given.is_dir() and not (given / peft.CONFIG).exists():
            raise NotFoundError(str(given), error.what) from error
        raise


def unreadable_file(path: Path, error: AdapterhubError) -> Problem:
    """The problem of a file that cannot be used; raises `error` itself where it is not about the file."""
    codes: list[tuple[type[AdapterhubError], str]] = [
        (FormatError, "malformed"),
        (NotFoundError, "missing-file"),
        (RefusedError, "not-understood"),
    ]
    code = next((code for kind, code in codes if isinstance(error, kind)), None)
    if code is None:
        raise error
    code = error.code if error.code == "whole-model" else code
    # A folder named "adapter" is no part of "adapter_model.safetensors".
    folder, inside = error.where[: len(str(path))], error.where[len(str(path)) :]
    where = inside[1:] if folder == str(path) and inside[:1] in ("", "/", "\\") else error.where
    return Problem(code, where or path.name, "", error.what, error.hint, cause=error)


def _pickles(path: Path) -> Iterator[Problem]:
    if not path.is_dir():
        return
    safe = any(is_weights(item.name) for item in path.iterdir())
    for item in sorted(path.iterdir()):
        if is_pickle_name(item.name) and item.name.startswith(("adapter", "pytorch_model")):
            if safe:
                yield Problem("stray-pickle", item.name, "", "a pickle can run code when it is loaded", "Delete it")
            else:
                hint = "Save the adapter again with safe_serialization=True"
                yield Problem("pickle", item.name, "", "a pickle can run code when it is loaded", hint)


def _peft(path: Path, text: str, base: BaseSpec | None) -> Contents:
    contents = Contents(path, "peft", peft.WEIGHTS, json_file.parse_object(text, peft.CONFIG), config_text=text)
    contents.has_read(path / peft.CONFIG, text)
    if not any((path / name).is_file() for name in (peft.WEIGHTS, peft.INDEX)):
        raise NotFoundError(peft.WEIGHTS, "no such file")
    try:
        for shard in peft.weight_files(path):
            contents.files[shard] = file = SafetensorsFile(shard, where=shard.name)
            contents.heads[shard] = file.head
            for info in file.tensors.values():
                _sort(contents, info)
        if _has_others(contents):
            headers = {shard: file.header for shard, file in contents.files.items()}
            _set_others_apart(contents, peft.parse_shapes(text, headers, where=str(path), base=base))
    except BaseException:
        contents.close()
        raise
    return contents


def _has_others(contents: Contents) -> bool:
    convolution = any(
        all(part in parts and len(parts[part].shape) > 2 for part in ("A", "B")) for parts in contents.pairs.values()
    )
    other = contents.config.get("peft_type") in ("ADALORA", "LOHA", "LOKR", "VERA")
    return convolution or other or any(contents.config.get(key) for key in ("target_parameters", "use_qalora"))


def _set_others_apart(contents: Contents, adapter: Adapter) -> None:
    contents.notes = adapter.notes
    contents.others = {t: delta for t, delta in adapter.deltas.items() if not isinstance(delta, LowRank | LowRankEmbedding)}
    for target in [t for t in contents.pairs if t in contents.others or t not in adapter.deltas]:
        parts = contents.pairs.pop(target)
        contents.other_tensors |= {f"{target}.{PART_NAMES.get(part, part)}": tensor for part, tensor in parts.items()}


def _sort(contents: Contents, tensor: TensorInfo) -> None:
    full = native(tensor.name)
    kind, name, part = classify_native(full, tensor.name)
    if full != tensor.name and full != tensor.name.removesuffix(".weight"):
        contents.renamed.append((tensor.name, full))
    if kind == "pair" and part not in PART_NAMES and contents.config.get("peft_type") == "LORA":
        contents.unknown.append(tensor.name)
    elif kind == "pair":
        contents.pairs.setdefault(name, {})[part] = tensor
    elif kind == "rows":
        contents.rows[name] = tensor
        contents.row_ids[name] = _row_ids(contents.config.get("trainable_token_indices"), name)
    elif kind == "replaced":
        contents.replaced[name] = tensor
    elif kind == "copy":
        contents.copies[name] = tensor
    elif kind == "shared" and contents.config.get("peft_type") == "VERA":
        contents.other_tensors[name] = tensor
    else:
        contents.unknown.append(tensor.name)


def _row_ids(indices: object, target: str) -> tuple[int, ...]:
    if isinstance(indices, dict):
        last = target.rpartition(".")[2]
        indices = next((indices[key] for key in (target, last) if key in indices), None)
    return tuple(number for number in indices if isinstance(number, int)) if isinstance(indices, list) else ()


def _whole(path: Path, kind: str, base: BaseSpec | None) -> Contents:
    from adapterhub_converters.formats import convert, mlx

    adapter = convert.read(path, base=base)
    contents = Contents(path, kind, mlx.WEIGHTS if kind == "mlx" else path.name, adapter=adapter, notes=adapter.notes)
    pairs = {t: d for t, d in adapter.deltas.items() if isinstance(d, LowRank | LowRankEmbedding)}
    for target, delta in plain_pairs(dataclasses.replace(adapter, deltas=pairs)).items():
        contents.pairs[target] = dict(_parts(target, delta))
    contents.others = {target: delta for target, delta in adapter.deltas.items() if target not in pairs}
    for target, other in contents.others.items():
        contents.other_tensors |= {f"{target}.{part}": _tensor(f"{target}.{part}", array) for part, array in other.parts()}
    contents.replaced.update({name: _tensor(name, array) for name, array in adapter.replaced.items()})
    for target, rows in adapter.rows.items():
        contents.rows[target], contents.row_ids[target] = _tensor(target, rows.values), rows.ids
    return contents


def _parts(target: str, delta: LowRank | LowRankEmbedding) -> Iterator[tuple[str, TensorInfo]]:
    prefix = "embedding_" if isinstance(delta, LowRankEmbedding) else ""
    yield f"{prefix}A", _tensor(f"{target}.lora_A", delta.lora_A)
    yield f"{prefix}B", _tensor(f"{target}.lora_B", delta.lora_B)
    if isinstance(delta, LowRank) and delta.magnitude is not None:
        yield "magnitude", _tensor(f"{target}.magnitude", delta.magnitude)
    if isinstance(delta, LowRank) and delta.bias is not None:
        yield "bias", _tensor(f"{target}.lora_B.bias", delta.bias)


def _tensor(name: str, array: np.ndarray) -> TensorInfo:
    return TensorInfo(name, dtypes.name_of(array.dtype), array.shape, 0, array.nbytes)
