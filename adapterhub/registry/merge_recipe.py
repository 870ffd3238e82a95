"""Merge recipes: a merged model in a few kilobytes, as its ingredients and the digests of the result.

A recipe has the base model, the adapters by the digests of their manifests, and the options: everything the bytes of a merge
depend on except the class of CPU. It also keeps an even sample of the numbers that the merge changes, to tell how far a result
differs.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import platform
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import adapterhub_schemas
from adapterhub.digest import Digest, is_hex, sha256_file
from adapterhub.merging import Options
from adapterhub.version import __version__
from adapterhub_converters import dtypes
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.bases import BaseSpec, weight_files
from adapterhub_converters.bases.gguf import part_paths
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import FormatError, RefusedError

from .recipe import Difference, ulps

SCHEMA_ID = "urn:adapterhub:schema:merge:2"
VERSION = 2
_MODEL = "model"  # name of the output in recipes, whatever its name on the disk
_SAMPLE = 512  # numbers of an output that are kept
_OPTIONS = ("dtype", "requantize", "shard_size", "dequantize", "as_trained", "trained_in", "force")
_FLOATS = ("F32", "F16", "BF16")
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class WeightFile:
    """A weight file of the base; `digest` is None if it was not computed."""

    path: str
    size: int
    digest: Digest | None


@dataclass(frozen=True)
class RecipeBase:
    """The model that the adapters are merged into; None for what is not known.

    Attributes:
        name: The name of its folder or file.
        source: Its location when the recipe was written, as given.
    """

    name: str
    repo: str | None
    revision: str | None
    fingerprint: Digest | None
    files: tuple[WeightFile, ...]
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.repo and self.revision else self.repo or self.name


@dataclass(frozen=True)
class Ingredient:
    """An adapter: the digest of its manifest, its ref or address (None for a folder), the factor of its delta."""

    digest: Digest
    weight: float
    ref: str | None = None


@dataclass(frozen=True)
class OutputEntry:
    """A file of the output; `sample` are numbers that the merge changes, float32 in base64."""

    path: str
    size: int
    digest: Digest
    sample: str | None = None


@dataclass(frozen=True)
class MergeRecipe:
    """A recipe, as its schema explains it.

    Attributes:
        options: Those of the merge, without its lineage.
        form: `folder` or `file`.
        files: Those of the output; None if their digests were not computed.
        made_by: The software and the machine that computed them.
    """

    base: RecipeBase
    adapters: tuple[Ingredient, ...]
    options: Options
    form: str
    files: tuple[OutputEntry, ...] | None
    made_by: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int | None:
        """Bytes of the output; None if it was not made."""
        return None if self.files is None else sum(file.size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON."""
        return {
            "$schema": SCHEMA_ID,
            "schema_version": VERSION,
            **({"made_by": dict(self.made_by)} if self.made_by else {}),
            "base": _without(asdict(self.base), "source"),
            "adapters": [_without(asdict(adapter), "ref") for adapter in self.adapters],
            "options": {name: getattr(self.options, name) for name in _OPTIONS},
            "output": {
                "form": self.form,
                "files": None if self.files is None else [_without(asdict(file), "sample") for file in self.files],
            },
        }

    def dump(self) -> bytes:
        """The bytes to store."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    def merge_options(self) -> Options:
        """The options of the merge, with the lineage that is written into the output."""
        base = self.base
        known = {"repo": base.repo, "revision": base.revision, "fingerprint": base.fingerprint}
        adapters = [_without(asdict(adapter), "ref") for adapter in self.adapters]
        lineage = {"base": known if base.repo else {**known, "name": base.name}, "adapters": adapters}
        return replace(self.options, lineage=lineage)


def _without(table: dict[str, Any], optional: str) -> dict[str, Any]:
    """`table`, in which a key that is None is absent."""
    return table if table[optional] is not None else {key: value for key, value in table.items() if key != optional}


@dataclass(frozen=True)
class Made:
    """An output on the disk: `single` for one file; `touched` are the tensors that the merge changes."""

    path: Path
    single: bool
    touched: Sequence[str]


def of_merge(base: Path, spec: BaseSpec, source: str, options: Options, made: Made | None, *, single: bool) -> MergeRecipe:
    """Return the recipe of a merge whose lineage is in its options, with the digests of its output and of the base's files."""
    files = [
        WeightFile(path.name, path.stat().st_size, _known(path) if made is None else sha256_file(path))
        for path in _weights(base)
    ]
    name = options.lineage["base"].get("name") or base.resolve().name
    return MergeRecipe(
        base=RecipeBase(name, spec.repo, spec.revision, spec.fingerprint, tuple(files), source),
        adapters=tuple(Ingredient(**adapter) for adapter in options.lineage["adapters"]),
        options=replace(options, lineage={}),
        form="file" if single else "folder",
        files=None if made is None else tuple(_files(made)),
        made_by={"adapterhub": __version__, "numpy": np.__version__, "machine": platform.machine()},
    )


def parse(text: str, where: str) -> MergeRecipe:
    """Parse a recipe and check it against the schema; FormatError for another text, RefusedError for a newer schema."""
    import jsonschema

    found = json_file.parse_object(text, where)
    version = found.get("schema_version")
    if type(version) is int and version > VERSION and str(found.get("$schema")).startswith("urn:adapterhub:schema:merge:"):
        raise RefusedError(
            where,
            f"schema_version {version} is newer than {VERSION}, the last supported",
            "Upgrade adapterhub",
            code="newer-version",
        )
    found = _upgraded(found)
    error = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(adapterhub_schemas.load("merge")).iter_errors(found)
    )
    if error:
        at = "/".join(str(part) for part in error.absolute_path)
        message = " ".join(error.message.split())[:120]
        raise FormatError(where, f"not a merge recipe: {at}: {message}" if at else f"not a merge recipe: {message}")
    base, files = found["base"], found["output"]["files"]
    return MergeRecipe(
        base=RecipeBase(**{**base, "files": tuple(WeightFile(**file) for file in base["files"])}),
        adapters=tuple(Ingredient(**adapter) for adapter in found["adapters"]),
        options=Options(**found["options"]),
        form=found["output"]["form"],
        files=None if files is None else tuple(OutputEntry(**file) for file in files),
        made_by=found.get("made_by", {}),
    )


def _upgraded(found: dict[str, Any]) -> dict[str, Any]:
    """Convert a recipe of schema 1, which spelled two options and one key differently, to schema 2."""
    if found.get("$schema") != "urn:adapterhub:schema:merge:1" or not isinstance(found.get("options"), dict):
        return found
    options = {_RENAMED.get(key, key): value for key, value in found["options"].items()}
    return {**found, "$schema": SCHEMA_ID, "schema_version": VERSION, "options": options}


_RENAMED = {"requantise": "requantize", "dequantise": "dequantize"}  # codespell:ignore


def check_base(recipe: MergeRecipe, base: Path, spec: BaseSpec) -> None:
    """Raise RefusedError unless names, shapes and sizes are those of the recipe's base; its bytes are not read."""
    wanted = recipe.base
    if spec.fingerprint != wanted.fingerprint:
        found = f"its names and shapes have the fingerprint {str(spec.fingerprint)[:19]}, not {str(wanted.fingerprint)[:19]}"
        raise _other_base(base, recipe, found)
    sizes = [path.stat().st_size for path in _weights(base)]
    if sizes != [file.size for file in wanted.files]:
        raise _other_base(base, recipe, "its weights have other sizes")


def check_weights(recipe: MergeRecipe, base: Path) -> bool:
    """Read the base's weights; RefusedError if they differ from the recipe's, False if the recipe lacks a digest."""
    known = True
    for path, wanted in zip(_weights(base), recipe.base.files, strict=True):
        if wanted.digest is None:
            known = False
        elif sha256_file(path) != wanted.digest:
            raise _other_base(base, recipe, f"{path.name} has other numbers")
    return known


def _other_base(base: Path, recipe: MergeRecipe, why: str) -> RefusedError:
    what = f"not the base model of the recipe, {recipe.base}: {why}"
    return RefusedError(str(base), what, "Name the base model that the recipe was made with", code="other-base")


def _weights(base: Path) -> list[Path]:
    return list(weight_files(base) if base.is_dir() else part_paths(base))


def _known(path: Path) -> Digest | None:
    """Return the digest of a file in huggingface_hub's cache, whose blobs are named by it; None for another file."""
    real = path.resolve()
    return f"sha256:{real.name}" if real.parent.name == "blobs" and is_hex(real.name) else None


# ---- the output


def differences(recipe: MergeRecipe, made: Made) -> list[Difference]:
    """Compare a rebuilt output with the recipe; empty if every byte is the same."""
    wanted = {file.path: file for file in recipe.files or ()}
    there = dict(_paths(made))
    found = [Difference(name, "missing" if name in wanted else "not in the recipe") for name in wanted.keys() ^ there.keys()]
    for name in wanted.keys() & there.keys():
        if sha256_file(there[name]) != wanted[name].digest:
            found.append(_difference(name, there[name], wanted[name].sample, made.touched))
    return sorted(found, key=lambda one: one.name)


def _difference(name: str, path: Path, kept: str | None, touched: Sequence[str]) -> Difference:
    if kept is None:
        return Difference(name, "bytes differ")
    try:
        old = np.frombuffer(base64.b64decode(kept, validate=True), "<f4")
    except (binascii.Error, ValueError):
        return Difference(name, "bytes differ; the numbers in the recipe cannot be read")
    drawn = list(_sample(path, touched, len(old)))
    if sum(len(new) for new in drawn) != len(old):
        return Difference(name, "bytes differ, and the tensors it contains")
    apart, most, at = 0, 0, 0
    for new in drawn:
        before = old[at : at + len(new)].astype(new.dtype)
        apart += int(np.count_nonzero(before != new))
        most, at = max(most, ulps(before, new)), at + len(new)
    if not apart:
        return Difference(name, f"bytes differ, but none of the {len(old)} numbers in the recipe does", 0)
    return Difference(name, f"bytes differ; {apart} of the {len(old)} numbers in the recipe differ", most)


def _files(made: Made) -> Iterator[OutputEntry]:
    weights = [path for _, path in _paths(made) if is_weights(path.name)]
    for name, path in _paths(made):
        drawn = list(_sample(path, made.touched, max(16, _SAMPLE // len(weights)))) if path in weights else []
        numbers = np.concatenate([one.astype("<f4") for one in drawn]).tobytes() if drawn else None
        sample = base64.b64encode(numbers).decode() if numbers is not None else None
        yield OutputEntry(name, path.stat().st_size, sha256_file(path), sample)


def _paths(made: Made) -> Iterator[tuple[str, Path]]:
    """Yield every file with its name in recipes, where the output is called `model`."""
    if made.single:
        yield f"{_MODEL}.gguf", made.path
        return
    for name in sorted(path for path, status in walk(made.path) if stat.S_ISREG(status.st_mode)):
        ours = name.startswith(f"{made.path.name}-") and name.endswith(".gguf")
        yield f"{_MODEL}{name.removeprefix(made.path.name)}" if ours else name, made.path / name


def _sample(path: Path, touched: Sequence[str], count: int) -> Iterator[np.ndarray]:
    """Yield a sample of the numbers that a merge changes in a file, in their own dtypes, at multiples of the golden ratio."""
    with SafetensorsFile(path) if path.suffix == ".safetensors" else GGUFFile(path) as file:
        kinds = {name: str(getattr(info, "dtype", "") or getattr(info, "type_name", "")) for name, info in file.tensors.items()}
        changed = {*touched, *(f"{name}.nested_absmax" for name in touched)}  # of a weight in NF4 the scales are floats
        names = sorted(name for name in changed & kinds.keys() if kinds[name] in _FLOATS)
        ends = np.cumsum([0, *(math.prod(file.tensors[name].shape) for name in names)])
        share = np.arange(1, min(count, int(ends[-1])) + 1) * _GOLDEN % 1
        drawn = np.sort((share * ends[-1]).astype(np.int64))
        for name, start, end in zip(names, ends, ends[1:], strict=False):
            at = drawn[(drawn >= start) & (drawn < end)] - start
            if len(at):
                info = file.tensors[name]
                numbers = np.memmap(path, dtypes.NUMPY[kinds[name]], "r", info.offset, (math.prod(info.shape),))
                yield np.array(numbers[at])
