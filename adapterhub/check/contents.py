"""What an adapter's files hold, seen from their headers, with every problem on the way collected.

The readers in `adapterhub_converters` stop at the first thing that is wrong, because a result would be; a check wants
all of it, and of a file with one bad tensor wants the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.digest import Digest, sha256_and_head, sha256_bytes
from adapterhub.manifest.document import AdapterManifest
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, plain_pairs
from adapterhub_converters.adapter_files import ADAPTER_JSON, HEAD, adapter_in, is_pickle_name, is_weights
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RefusedError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.keys import native

from .report import Problem


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape and dtype of a tensor, and what the file calls it."""

    key: str
    shape: tuple[int, ...]
    dtype: str


Part = Mapping[str, Tensor]
"""Of one module: `A`, `B`, `embedding_A`, `embedding_B`, `magnitude`, `bias`."""


@dataclass
class Contents:
    """An adapter as its files describe it. `config` is PEFT's, empty for a format that has another."""

    path: Path
    format: str
    weights: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    row_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the base's weights that ride along."""
    others: dict[str, Delta] = field(default_factory=dict)
    """Deltas that are no pair of matrices (experts, convolutions, AdaLoRA …), seen from their shapes."""
    other_tensors: dict[str, Tensor] = field(default_factory=dict)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    """Names of tensors that peft would skip, and what it would call them."""
    unknown: list[str] = field(default_factory=list)
    adapter: Adapter | None = None
    """Set for formats that are read as a whole."""
    notes: tuple[str, ...] = ()
    config_text: str = ""
    """Of PEFT's config, as it was read."""
    files: dict[Path, SafetensorsFile] = field(default_factory=dict)
    """PEFT's weights, open until `close`, so that headers, values and digests are read through one opening."""
    heads: dict[Path, bytes] = field(default_factory=dict)
    """The first bytes of the files that were opened, so that whoever looks at them next need not open them again."""
    digests: dict[Path, Digest] = field(default_factory=dict)
    manifest_text: str | None = None
    """The text of adapter.json, empty where there is none; None as long as nobody asked."""

    def names(self, option: str) -> list[str]:
        """The strings of a config option that is a string or a list of them; whatever else it is counts as none."""
        value = self.config.get(option)
        if isinstance(value, str):
            return [value]
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    @property
    def targets(self) -> list[str]:
        """Every module or parameter that has a delta."""
        return [*self.pairs, *self.others]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is understood, named by module and part."""
        for target, parts in self.pairs.items():
            yield from ((f"{target}.{LABELS.get(part, part)}", tensor) for part, tensor in parts.items())
        yield from self.other_tensors.items()
        yield from self.replaced.items()
        yield from ((f"{name} (copy)", tensor) for name, tensor in self.copies.items())
        yield from ((f"{target} (rows)", tensor) for target, tensor in self.rows.items())

    def values(self) -> Iterator[tuple[str, Iterator[np.ndarray]]]:
        """Every tensor's name and numbers, in flat pieces that are good until the next is asked for."""
        if self.adapter is not None:
            yield from ((name, _pieces(array)) for name, array in self.adapter.tensors())
            return
        buffer = bytearray(_PIECE)
        for file in self.files.values():
            for name, tensor in self.tensors():
                if tensor.key in file.tensors and tensor.dtype in dtypes.NUMPY:
                    yield name, _read(file, tensor, memoryview(buffer))

    def digest(self, path: Path) -> Digest:
        """The digest of one of the adapter's files, read once; through its opening where it has one."""
        if path not in self.digests:
            if path in self.files:
                self.digests[path] = self.files[path].digest()
            else:
                self.digests[path], self.heads[path] = sha256_and_head(path, HEAD)
        return self.digests[path]

    def has_read(self, path: Path, text: str) -> None:
        """Note the text of a file, so that it need not be opened again for its first bytes or its digest."""
        raw = text.encode()
        self.heads[path], self.digests[path] = raw[:HEAD], sha256_bytes(raw)

    @property
    def folder(self) -> Path:
        """The folder that the adapter is in."""
        return self.path if self.path.is_dir() else self.path.parent

    def manifest(self) -> AdapterManifest | None:
        """The adapter.json next to the adapter, read once and checked against the schema; None where there is none."""
        path = self.folder / ADAPTER_JSON
        if self.manifest_text is None:
            try:
                self.manifest_text = json_file.read_text(path)
                self.has_read(path, self.manifest_text)
            except NotFoundError:
                self.manifest_text = ""
        return AdapterManifest.parse(self.manifest_text, str(path)) if self.manifest_text else None

    def seen(self) -> tuple[str, Adapter] | None:
        """The format and the adapter, its tensors perhaps without their numbers; None for what `describe.look` must settle."""
        if self.files:
            headers = {path: file.header for path, file in self.files.items()}
            return self.format, peft.parse_shapes(self.config_text, headers, where=str(self.path))
        return None

    def close(self) -> None:
        """Close the files."""
        for file in self.files.values():
            file.close()


_PIECE = 1 << 20  # bytes; a piece and its masked copy stay in the cache


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(array).reshape(-1)
    step = _PIECE // flat.itemsize
    yield from (flat[start : start + step] for start in range(0, flat.size, step))


def _read(file: SafetensorsFile, tensor: Tensor, buffer: memoryview) -> Iterator[np.ndarray]:
    info, dtype = file.tensors[tensor.key], dtypes.NUMPY[tensor.dtype]
    for start in range(0, info.size, len(buffer)):
        piece = buffer[: min(len(buffer), info.size - start)]
        file.read_into(info, piece, start)
        yield np.frombuffer(piece, dtype)


LABELS = {
    "A": "lora_A", "B": "lora_B", "embedding_A": "lora_embedding_A", "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias",
}  # fmt: skip


def read(path: Path, *, base: BaseSpec | None) -> tuple[Contents | None, list[Problem]]:
    """The contents of `path`, to be closed, or None when its files cannot be trusted; NotFoundError when it is no adapter."""
    problems = list(_pickles(path))
    given, path = path, adapter_in(path)
    try:
        if (text := peft.config_of(path)) is not None:
            return _peft(path, text, base), problems
        kind = _sniff(path, given, pickle=any(problem.code == "pickle" for problem in problems))
        if kind is None:
            return None, problems
        contents = _whole(path, kind, base)
    except AdapterhubError as error:
        if isinstance(error, NotFoundError) and error.where in (str(path), str(given)):
            raise
        problem = unreadable(path, error)
        if isinstance(error, RefusedError) and not (path / peft.CONFIG).exists():
            code = "does-not-fit" if base else "needs-base" if error.code == "base-required" else problem.code
            problem = dataclasses.replace(problem, code=code)
        return None, [*problems, problem]
    return contents, problems


def _sniff(path: Path, given: Path, *, pickle: bool) -> str | None:
    """The format of an adapter that is not PEFT's; None if all that is known of it are pickles."""
    from adapterhub_converters.formats import convert  # late: all readers are a fifth of the time that a check takes

    try:
        return convert.sniff(path)
    except FormatError as error:
        if pickle:
            return None
        if given.is_dir() and not (given / peft.CONFIG).exists():
            raise NotFoundError(str(given), error.what) from error
        raise


def unreadable(path: Path, error: AdapterhubError) -> Problem:
    """The problem that a file which cannot be used is; an error of the machine goes on as itself."""
    codes: list[tuple[type[AdapterhubError], str]] = [
        (FormatError, "malformed"),
        (NotFoundError, "missing-file"),
        (RefusedError, "not-understood"),
    ]
    code = next((code for kind, code in codes if isinstance(error, kind)), None)
    if code is None:
        raise error
    where = error.where.removeprefix(str(path)).lstrip("/\\")
    return Problem(code, where or path.name, "", error.what, error.hint)


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
                _sort(contents, Tensor(info.name, info.shape, info.dtype))
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
        contents.other_tensors |= {f"{target}.{LABELS.get(part, part)}": tensor for part, tensor in parts.items()}


def _sort(contents: Contents, tensor: Tensor) -> None:
    kind, name, part = peft.classify(tensor.key)
    if native(tensor.key) not in (tensor.key, tensor.key.removesuffix(".weight")):
        contents.renamed.append((tensor.key, native(tensor.key)))
    if kind == "pair" and part not in LABELS and contents.config.get("peft_type") == "LORA":
        contents.unknown.append(tensor.key)
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
        contents.unknown.append(tensor.key)


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


def _parts(target: str, delta: LowRank | LowRankEmbedding) -> Iterator[tuple[str, Tensor]]:
    prefix = "embedding_" if isinstance(delta, LowRankEmbedding) else ""
    yield f"{prefix}A", _tensor(f"{target}.lora_A", delta.lora_A)
    yield f"{prefix}B", _tensor(f"{target}.lora_B", delta.lora_B)
    if isinstance(delta, LowRank) and delta.magnitude is not None:
        yield "magnitude", _tensor(f"{target}.magnitude", delta.magnitude)
    if isinstance(delta, LowRank) and delta.bias is not None:
        yield "bias", _tensor(f"{target}.lora_B.bias", delta.bias)


def _tensor(key: str, array: np.ndarray) -> Tensor:
    return Tensor(key, array.shape, dtypes.name_of(array.dtype))
