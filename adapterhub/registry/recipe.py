"""Recipes of merged and converted adapters: a few lines in adapter.json from which the adapter can be made again.

A recipe and the digests of the parents are everything that a merge or a conversion depends on, except the base. With the
parents, the result can be reproduced and compared, bit for bit on the same class of CPU.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapterhub import digest
from adapterhub.manifest import describe, document
from adapterhub.manifest.document import AdapterManifest, BaseInfo, Recipe
from adapterhub_converters.adapter_files import ADAPTER_JSON, adapter_in, is_weights
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats import FORMATS, peft
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats.lossy import Allowed

if TYPE_CHECKING:
    from adapterhub.merging import MergeReport, Progress
    from adapterhub_converters.adapter import LossReport
    from adapterhub_converters.bases import BaseSpec

MERGE, CONVERT = "merge", "convert"


@dataclass(frozen=True)
class Conversion:
    """Options of a conversion; `rank` is that of approximations."""

    to: str
    dtype: str = "source"
    approx: bool = False
    drop: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def allowed(self) -> Allowed:
        """What it may lose."""
        return Allowed(approx=self.approx, drop=list(self.drop), rank=self.rank)

    def recipe(self, base: BaseSpec | None, report: LossReport) -> Recipe:
        """Return the recipe of a conversion with this loss report."""
        return Recipe(
            kind=CONVERT,
            to=self.to,
            dtype=self.dtype,
            allow_approx=self.approx,
            allow_drop=self.drop,
            rank=self.rank,
            base=base.fingerprint if base else None,
            loss={name: count for name, count in report.summary.items() if count},
        )

    @classmethod
    def of(cls, recipe: Recipe) -> Conversion:
        """Return the conversion of a recipe."""
        return cls(recipe.to or "", recipe.dtype or "source", bool(recipe.allow_approx), recipe.allow_drop or (), recipe.rank)


@dataclass(frozen=True)
class Parent:
    """An adapter that another is made from: its folder, its path and the digest of its manifest."""

    folder: Path
    path: Path
    digest: str
    ref: str | None = None
    weight: float = 1.0


def convert(
    parent: Parent, out: Path, conversion: Conversion, *, name: str, base: BaseSpec | None = None
) -> tuple[Path, LossReport]:
    """Convert `parent` into the new or empty folder `out`, with its manifest; return the adapter's path and the losses.

    A format of one file is named `name` with its suffix.
    """
    with atomic.whole(out) as folder:
        target = folder if FORMATS[conversion.to].folder else folder / f"{name}{FORMATS[conversion.to].suffix}"
        report = formats.convert(
            parent.path,
            target,
            to=conversion.to,
            base=base,
            allowed=conversion.allowed,
            dtype=conversion.dtype,
        )
        known = AdapterManifest.read(parent.folder)
        made = describe.describe(
            folder,
            base=base,
            parents=[document.Parent(parent.digest, method=CONVERT)],
            recipe=conversion.recipe(base, report),
        )
        _inherited(made, known).write(folder)
    return out / target.relative_to(folder) if target != folder else out, report


# Fields that a conversion does not change. The training is recorded in the parent.
_INHERITED = ("name", "task", "license", "description")


def _inherited(made: AdapterManifest, known: AdapterManifest | None) -> AdapterManifest:
    if known is None:
        return made
    kept = {key: getattr(known, key) for key in _INHERITED if getattr(known, key) is not None}
    return dataclasses.replace(made, base=known.base.filled_from(made.base), **kept)


def merge(
    parents: Sequence[Parent],
    out: Path,
    how: Recipe,
    *,
    base: BaseInfo | None = None,
    progress: Progress | None = None,
    replace: bool = False,
) -> tuple[MergeReport, AdapterManifest]:
    """Merge `parents` into the folder `out`, with its manifest; `base` is the model they were all trained on.

    `how` has the method and its options. It is recorded, with the seed and the parameters that were used.
    """
    from adapterhub.merging import combine  # late: a conversion merges nothing

    method = how.method or "cat"
    combined, report = combine(
        [formats.read(parent.path) for parent in parents],
        [parent.weight for parent in parents],
        method=method,
        rank=how.rank,
        energy=how.energy,
        budget=how.budget,
        seed=how.seed or 0,
        parameters=how.parameters,
        progress=progress,
    )
    used = dataclasses.replace(how, kind=MERGE, method=method, seed=report.seed, parameters=dict(report.parameters) or None)
    named = [document.Parent(parent.digest, parent.ref or None, parent.weight, method) for parent in parents]
    with atomic.whole(out, replace=replace) as folder:
        peft.write(combined, folder)
        made = describe.describe(folder, parents=named, recipe=used)
        made = dataclasses.replace(made, base=base or made.base)
        made.write(folder)
    return report, made


def again(folder: Path, parents: Sequence[Parent], out: Path, *, base: BaseSpec | None = None) -> None:
    """Make the adapter in `folder` again from its recipe and the parents that it names, in the new folder `out`.

    Raises RefusedError if it has no recipe, or `base` is not the one it was made with.
    """
    known = AdapterManifest.read(folder)
    if known is None or known.recipe is None:
        parents_named = known.parents if known else ()
        what = "it was merged before recipes were recorded" if parents_named else "it has no parents"
        if parents_named and parents_named[0].method == "train":
            what = "it was trained; its training record describes how"
        raise RefusedError(str(folder), f"no recipe to make it from: {what}", "Only merged and converted adapters have one")
    recipe = known.recipe
    if not parents or (recipe.kind == CONVERT and len(parents) > 1):
        what = f"names {len(parents)} parents for a recipe of the kind {recipe.kind!r}"
        raise FormatError(f"{folder}/{ADAPTER_JSON}", what)
    if recipe.kind == MERGE:
        merge(parents, out, recipe, base=known.base)
        return
    if recipe.base and (base is None or base.fingerprint != recipe.base):
        given = "another one was given" if base else "none was given"
        what = f"made with the base whose fingerprint is {recipe.base[:19]}, and {given}"
        raise RefusedError(str(folder), what, "Pass that base", code="recipe-base-required")
    convert(parents[0], out, Conversion.of(recipe), name=_stem(folder), base=base)


def _stem(folder: Path) -> str:
    file = adapter_in(folder)
    return file.stem if file.is_file() else folder.name


@dataclass(frozen=True)
class Difference:
    """A tensor or a file that differs; `ulps`: the largest distance of its numbers in units in the last place, if known."""

    name: str
    what: str
    ulps: int | None = None


def differences(stored: Path, made: Path) -> list[Difference]:
    """Compare the rebuilt files with the stored ones; further stored files are ignored."""
    found = []
    for name in sorted(path for path, status in walk(made) if stat.S_ISREG(status.st_mode)):
        if name.rpartition("/")[2] == ADAPTER_JSON:
            continue
        if not (stored / name).is_file():
            found.append(Difference(name, "missing"))
        elif digest.sha256_file(made / name) != digest.sha256_file(stored / name):
            found += list(_tensors(stored, made)) if is_weights(name) else [Difference(name, "bytes differ")]
    return found


def _tensors(stored: Path, made: Path) -> Iterator[Difference]:
    one, other = (dict(formats.read(folder).tensors()) for folder in (stored, made))
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            yield Difference(name, "only in one of them")
        elif one[name].shape != other[name].shape or one[name].dtype != other[name].dtype:
            yield Difference(name, f"{one[name].dtype} {one[name].shape} became {other[name].dtype} {other[name].shape}")
        elif one[name].tobytes() != other[name].tobytes():
            yield Difference(name, "numbers differ", ulps(one[name], other[name]))


def ulps(one: np.ndarray, other: np.ndarray) -> int:
    """Return the largest distance between two numbers at the same position, in units in the last place."""
    bits = np.dtype(f"i{one.dtype.itemsize}")
    lowest = np.iinfo(bits).min

    def ordered(array: np.ndarray) -> np.ndarray:
        whole = np.ascontiguousarray(array).view(bits).astype(np.int64)
        return np.where(whole < 0, int(lowest) - whole, whole)  # negative floats run the other way; -0 is 0

    return int(np.abs(ordered(one) - ordered(other)).max(initial=0))
