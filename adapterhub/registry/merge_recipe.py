"""The recipe of a merged model: its ingredients and the digests of the result, in a few kilobytes.

A recipe has the base model, the adapters by the digests of their manifests, and the options: everything the bytes of a merge
depend on except the class of CPU. It also has an evenly spaced sample of the numbers that the merge changes, which shows how
far a different result is off. Recipes of adapters that were merged or converted are in `adapter_recipe`; recipes stored under a
name are in `recipe_store`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import platform
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, replace
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
from adapterhub_converters.bases.gguf_base import part_paths
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import FILE as TEMPLATE_FILE

from .adapter_recipe import RebuildDifference, ulps

SCHEMA_ID = "urn:adapterhub:schema:merge:2"
VERSION = 2
_MODEL = "model"  # name of the output in recipes, whatever its name on the disk
_SAMPLE = 512  # numbers of an output that a recipe records
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
    """The model that the adapters are merged into; a field is None if it is not known.

    Attributes:
        name: The name of its folder or file.
        source: Its location when the recipe was written, as the user gave it.
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
    """An adapter: the digest of its manifest, its ref or address (None for a folder), and the factor of its delta."""

    digest: Digest
    weight: float
    ref: str | None = None


@dataclass(frozen=True)
class OutputEntry:
    """A file of the output; `sample` has some of the numbers that the merge changes, as float32 in base64."""

    path: str
    size: int
    digest: Digest
    sample: str | None = None


@dataclass(frozen=True)
class MergeRecipe:
    """A recipe; its schema explains the fields.

    Attributes:
        options: The options of the merge, without its lineage.
        form: `folder` or `file`.
        files: The files of the output; None if their digests were not computed.
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
        """Bytes of the output; None if its digests were not computed."""
        return None if self.files is None else sum(file.size for file in self.files)

    @property
    def may_have_prompt(self) -> bool:
        """Whether the output may have the chat template of the adapters, which folders from before it was kept lack."""
        return self.files is None or self.form == "file" or any(file.path == TEMPLATE_FILE for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON."""
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
        """Return the bytes to store."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    def merge_options(self) -> Options:
        """Return the options of the merge, including the lineage that is written into the output."""
        base = self.base
        base_ids = {"repo": base.repo, "revision": base.revision, "fingerprint": base.fingerprint}
        adapters = [_without(asdict(adapter), "ref") for adapter in self.adapters]
        lineage = {"base": base_ids if base.repo else {**base_ids, "name": base.name}, "adapters": adapters}
        return replace(self.options, lineage=lineage)


def _without(table: dict[str, Any], optional: str) -> dict[str, Any]:
    """Return `table` without the key `optional` if its value is None."""
    return table if table[optional] is not None else {key: value for key, value in table.items() if key != optional}


@dataclass(frozen=True)
class MergeOutput:
    """An output on the disk.

    Attributes:
        single: Whether it is one file.
        touched: The tensors that the merge changes.
    """

    path: Path
    single: bool
    touched: Sequence[str]


def from_merge(
    base: Path, spec: BaseSpec, source: str, options: Options, output: MergeOutput | None, *, single: bool
) -> MergeRecipe:
    """Return the recipe of a merge, with the digests of its output and of the base's files.

    Args:
        base: The folder or file of the base.
        spec: What the base is.
        source: Its location as the user gave it.
        options: The options of the merge, including its lineage.
        output: The output; None for a recipe without digests.
        single: Whether the output is one file.
    """
    files = [
        WeightFile(path.name, path.stat().st_size, _digest_in_hub_cache(path) if output is None else sha256_file(path))
        for path in _weight_paths(base)
    ]
    name = options.lineage["base"].get("name") or base.resolve().name
    return MergeRecipe(
        base=RecipeBase(name, spec.repo, spec.revision, spec.fingerprint, tuple(files), source),
        adapters=tuple(Ingredient(**adapter) for adapter in options.lineage["adapters"]),
        options=replace(options, chat_template=None, end_token=None, lineage={}),
        form="file" if single else "folder",
        files=None if output is None else tuple(_output_entries(output)),
        made_by={"adapterhub": __version__, "numpy": np.__version__, "machine": platform.machine()},
    )


def parse(text: str, location: str) -> MergeRecipe:
    """Parse a recipe and check it against the schema; FormatError if it does not fit, RefusedError for a newer schema."""
    document = json_file.parse_object(text, location)
    # Checked before the schema, which would only report the first field that it does not know.
    version = document.get("schema_version")
    if type(version) is int and version > VERSION and str(document.get("$schema")).startswith("urn:adapterhub:schema:merge:"):
        raise RefusedError(
            location,
            f"schema_version {version} is newer than {VERSION}, the last supported",
            "Upgrade adapterhub",
            code="newer-version",
        )
    document = _upgrade(document)
    violation = adapterhub_schemas.violation(document, "merge")
    if violation is not None:
        keys, message = violation
        message = " ".join(message.split())[:120]
        path = "/".join(map(str, keys))
        raise FormatError(location, f"not a merge recipe: {path}: {message}" if path else f"not a merge recipe: {message}")
    base, files = document["base"], document["output"]["files"]
    return MergeRecipe(
        base=RecipeBase(**{**base, "files": tuple(WeightFile(**file) for file in base["files"])}),
        adapters=tuple(Ingredient(**adapter) for adapter in document["adapters"]),
        options=Options(**document["options"]),
        form=document["output"]["form"],
        files=None if files is None else tuple(OutputEntry(**file) for file in files),
        made_by=document.get("made_by", {}),
    )


def _upgrade(document: dict[str, Any]) -> dict[str, Any]:
    """Convert a recipe of schema 1, which spelled two options and one key differently, to schema 2."""
    if document.get("$schema") != "urn:adapterhub:schema:merge:1" or not isinstance(document.get("options"), dict):
        return document
    options = {_RENAMED.get(key, key): value for key, value in document["options"].items()}
    return {**document, "$schema": SCHEMA_ID, "schema_version": VERSION, "options": options}


_RENAMED = {"requantise": "requantize", "dequantise": "dequantize"}  # codespell:ignore


def check_base(recipe: MergeRecipe, base: Path, spec: BaseSpec) -> None:
    """Raise RefusedError unless names, shapes and file sizes are those of the recipe's base; the weights are not read."""
    expected_base = recipe.base
    if not spec.has_fingerprint(expected_base.fingerprint):
        reason = (
            f"its names and shapes have the fingerprint {str(spec.fingerprint)[:19]}, not {str(expected_base.fingerprint)[:19]}"
        )
        raise _other_base_error(base, recipe, reason)
    # Only the sizes, in order: a copy of the model may name its files differently.
    sizes = [path.stat().st_size for path in _weight_paths(base)]
    if sizes != [file.size for file in expected_base.files]:
        raise _other_base_error(base, recipe, "its weights have other sizes")


def check_weights(recipe: MergeRecipe, base: Path) -> bool:
    """Read the base's weights; RefusedError if they differ from the recipe's, False if the recipe lacks a digest."""
    has_all_digests = True
    for path, recorded_file in zip(_weight_paths(base), recipe.base.files, strict=True):
        if recorded_file.digest is None:
            has_all_digests = False
        elif sha256_file(path) != recorded_file.digest:
            raise _other_base_error(base, recipe, f"{path.name} has other numbers")
    return has_all_digests


def _other_base_error(base: Path, recipe: MergeRecipe, reason: str) -> RefusedError:
    problem = f"not the base model of the recipe, {recipe.base}: {reason}"
    return RefusedError(str(base), problem, "Name the base model that the recipe was made with", code="other-base")


def _weight_paths(base: Path) -> list[Path]:
    return list(weight_files(base) if base.is_dir() else part_paths(base))


def _digest_in_hub_cache(path: Path) -> Digest | None:
    """Return the digest of a file in huggingface_hub's cache, which names blobs by their digests; None for any other file."""
    real = path.resolve()
    return f"sha256:{real.name}" if real.parent.name == "blobs" and is_hex(real.name) else None


# ---- the output


def differences(recipe: MergeRecipe, output: MergeOutput) -> list[RebuildDifference]:
    """Return the differences between a rebuilt output and the recipe; empty if every byte is the same."""
    recorded = {file.path: file for file in recipe.files or ()}
    paths = dict(_output_paths(output))
    results = [
        RebuildDifference(name, "missing" if name in recorded else "not in the recipe")
        for name in recorded.keys() ^ paths.keys()
    ]
    for name in recorded.keys() & paths.keys():
        if sha256_file(paths[name]) != recorded[name].digest:
            results.append(_output_difference(name, paths[name], recorded[name].sample, output.touched))
    return sorted(results, key=lambda difference: difference.name)


def _output_difference(name: str, path: Path, recorded_sample: str | None, touched: Sequence[str]) -> RebuildDifference:
    if recorded_sample is None:
        return RebuildDifference(name, "bytes differ")
    try:
        old = np.frombuffer(base64.b64decode(recorded_sample, validate=True), "<f4")
    except (binascii.Error, ValueError):
        return RebuildDifference(name, "bytes differ; the numbers in the recipe cannot be read")
    samples = list(_sample(path, touched, len(old)))
    if sum(len(new) for new in samples) != len(old):
        return RebuildDifference(name, "bytes differ, and the tensors it contains")
    differing, max_ulps, offset = 0, 0, 0
    for new in samples:
        # float32 holds float16 and bfloat16 exactly, so converting back loses nothing.
        before = old[offset : offset + len(new)].astype(new.dtype)
        differing += int(np.count_nonzero(before != new))
        max_ulps, offset = max(max_ulps, ulps(before, new)), offset + len(new)
    if not differing:
        return RebuildDifference(name, f"bytes differ, but none of the {len(old)} numbers in the recipe does", 0)
    return RebuildDifference(name, f"bytes differ; {differing} of the {len(old)} numbers in the recipe differ", max_ulps)


def _output_entries(output: MergeOutput) -> Iterator[OutputEntry]:
    weights = [path for _, path in _output_paths(output) if is_weights(path.name)]
    for name, path in _output_paths(output):
        samples = list(_sample(path, output.touched, max(16, _SAMPLE // len(weights)))) if path in weights else []
        numbers = np.concatenate([chunk.astype("<f4") for chunk in samples]).tobytes() if samples else None
        sample = base64.b64encode(numbers).decode() if numbers is not None else None
        yield OutputEntry(name, path.stat().st_size, sha256_file(path), sample)


def _output_paths(output: MergeOutput) -> Iterator[tuple[str, Path]]:
    """Yield every file with its name in recipes, in which the output is always called `model`."""
    if output.single:
        yield f"{_MODEL}.gguf", output.path
        return
    for name in sorted(path for path, status in walk(output.path) if stat.S_ISREG(status.st_mode)):
        is_shard = name.startswith(f"{output.path.name}-") and name.endswith(".gguf")
        yield f"{_MODEL}{name.removeprefix(output.path.name)}" if is_shard else name, output.path / name


def _sample(path: Path, touched: Sequence[str], count: int) -> Iterator[np.ndarray]:
    """Yield a sample of the numbers that a merge changes in a file, in their own dtypes.

    The positions are multiples of the golden ratio, modulo 1: evenly spread for any number of samples.
    """
    with SafetensorsFile(path) if path.suffix == ".safetensors" else GGUFFile(path) as file:
        kinds = {name: str(getattr(info, "dtype", "") or getattr(info, "type_name", "")) for name, info in file.tensors.items()}
        # The codes of an NF4 weight are bytes; of the tensors that make it up, the scales of its scales are floats.
        changed = {*touched, *(f"{name}.nested_absmax" for name in touched)}
        names = sorted(name for name in changed & kinds.keys() if kinds[name] in _FLOATS)
        ends = np.cumsum([0, *(math.prod(file.tensors[name].shape) for name in names)])
        fractions = np.arange(1, min(count, int(ends[-1])) + 1) * _GOLDEN % 1
        positions = np.sort((fractions * ends[-1]).astype(np.int64))
        for name, start, end in zip(names, ends, ends[1:], strict=False):
            offsets = positions[(positions >= start) & (positions < end)] - start
            if len(offsets):
                info = file.tensors[name]
                # Mapped, so that only the pages with sampled numbers are read.
                numbers = np.memmap(path, dtypes.NUMPY[kinds[name]], "r", info.offset, (math.prod(info.shape),))
                yield np.array(numbers[offsets])
