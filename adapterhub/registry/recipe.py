"""How an adapter is made from others, kept as a few lines in its adapter.json, and made again from them.

A recipe and the digests of its parents say all that a merge or a conversion depends on but the base, so whoever has the
parents can check that the result is theirs, bit for bit on the same class of CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adapterhub import digest
from adapterhub.manifest import describe, document
from adapterhub.manifest.document import AdapterManifest, BaseInfo, Recipe
from adapterhub.merge import MergeReport, Progress, combine
from adapterhub_converters.adapter_files import ADAPTER_JSON, adapter_in, is_weights
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.lossy import Allowed

if TYPE_CHECKING:
    from adapterhub_converters.adapter import LossReport
    from adapterhub_converters.bases import BaseSpec

MERGE, CONVERT = "merge", "convert"


@dataclass(frozen=True)
class Conversion:
    """What a conversion was asked for; `rank` is that of approximations."""

    to: str
    dtype: str = "source"
    approx: bool = False
    drop: tuple[str, ...] = ()
    rank: int | None = None

    def recipe(self, base: BaseSpec | None, report: LossReport) -> Recipe:
        """The recipe of a conversion that gave this report."""
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
        """The conversion that `recipe` describes."""
        return cls(recipe.to or "", recipe.dtype or "source", bool(recipe.allow_approx), recipe.allow_drop or (), recipe.rank)


@dataclass(frozen=True)
class Parent:
    """An adapter that another is made from: where it lies now, and the digest of its manifest."""

    folder: Path
    path: Path
    digest: str
    ref: str | None = None
    weight: float = 1.0


def convert(
    parent: Parent, out: Path, conversion: Conversion, *, name: str, base: BaseSpec | None = None
) -> tuple[Path, LossReport]:
    """Convert `parent` into the new or empty folder `out`, with a manifest that records it; the adapter's path and the losses.

    A format that is one file is called `name` with its ending.
    """
    with atomic.whole(out) as folder:
        target = folder if conversion.to in formats.FOLDERS else folder / f"{name}{formats.ENDINGS[conversion.to]}"
        report = formats.convert(
            parent.path,
            target,
            to=conversion.to,
            base=base,
            allowed=Allowed(approx=conversion.approx, drop=list(conversion.drop), rank=conversion.rank),
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


# What stays true of an adapter in another format. Its training is the parent's, and there it is recorded.
_INHERITED = ("name", "task", "license", "description")


def _inherited(made: AdapterManifest, known: AdapterManifest | None) -> AdapterManifest:
    if known is None:
        return made
    kept = {key: getattr(known, key) for key in _INHERITED if getattr(known, key) is not None}
    return replace(made, base=known.base.filled_from(made.base), **kept)


def merge(
    parents: Sequence[Parent],
    out: Path,
    *,
    method: str,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    seed: int = 0,
    parameters: Mapping[str, float | str] | None = None,
    base: BaseInfo | None = None,
    progress: Progress | None = None,
) -> tuple[MergeReport, AdapterManifest]:
    """Merge `parents` into the new folder `out`, with a manifest that records it; `base` is the model of all of them."""
    combined, report = combine(
        [formats.read(parent.path) for parent in parents],
        [parent.weight for parent in parents],
        method=method,
        rank=rank,
        energy=energy,
        budget=budget,
        seed=seed,
        parameters=parameters,
        progress=progress,
    )
    how = Recipe(
        kind=MERGE,
        method=method,
        rank=rank,
        energy=energy,
        budget=budget,
        seed=report.seed,
        parameters=dict(report.parameters) or None,
    )
    named = [document.Parent(parent.digest, parent.ref or None, parent.weight, method) for parent in parents]
    with atomic.whole(out) as folder:
        peft.write(combined, folder)
        made = describe.describe(folder, parents=named, recipe=how)
        made = replace(made, base=base or made.base)
        made.write(folder)
    return report, made


def again(folder: Path, parents: Sequence[Parent], out: Path, *, base: BaseSpec | None = None) -> None:
    """Make the adapter in `folder` anew from its recipe, in the new folder `out`.

    RefusedError where it has no recipe, or where the base is not the one it was made with.
    """
    known = AdapterManifest.read(folder)
    if known is None or known.recipe is None:
        parents_named = known.parents if known else ()
        what = "it was merged before recipes were kept" if parents_named else "it has no parents"
        if parents_named and parents_named[0].method == "train":
            what = "it was trained, and its training record says how"
        raise RefusedError(str(folder), f"no recipe to make it from: {what}", "Only what was merged or converted can be")
    recipe = known.recipe
    if len(parents) != len(known.parents):
        raise FormatError(f"{folder}/{ADAPTER_JSON}", f"{len(known.parents)} parents are named, {len(parents)} were given")
    if recipe.kind == MERGE:
        merge(
            parents,
            out,
            method=recipe.method or "",
            rank=recipe.rank,
            energy=recipe.energy,
            budget=recipe.budget,
            seed=recipe.seed or 0,
            parameters=recipe.parameters,
            base=known.base,
        )
        return
    if recipe.base and (base is None or base.fingerprint != recipe.base):
        given = "another was given" if base else "none was given"
        raise RefusedError(str(folder), f"made with the base {recipe.base[:19]}, and {given}", "Pass it as --base")
    convert(parents[0], out, Conversion.of(recipe), name=_stem(folder), base=base)


def _stem(folder: Path) -> str:
    file = adapter_in(folder)
    return file.stem if file.is_file() else folder.name


@dataclass(frozen=True)
class Difference:
    """A tensor or a file that came out otherwise; `ulps`: the largest distance of its numbers, if they can be counted."""

    name: str
    what: str
    ulps: int | None = None


def differences(kept: Path, made: Path) -> list[Difference]:
    """How the files that were made anew differ from those kept; files that were only laid beside them don't count."""
    found = []
    for path in sorted(item for item in made.rglob("*") if item.is_file() and item.name != ADAPTER_JSON):
        name = path.relative_to(made).as_posix()
        if not (kept / name).is_file():
            found.append(Difference(name, "is not there"))
        elif digest.sha256_file(path) != digest.sha256_file(kept / name):
            found += list(_tensors(kept, made)) if is_weights(path.name) else [Difference(name, "bytes differ")]
    return found


def _tensors(kept: Path, made: Path) -> Iterator[Difference]:
    one, other = (dict(formats.read(folder).tensors()) for folder in (kept, made))
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            yield Difference(name, "is in one of them only")
        elif one[name].shape != other[name].shape or one[name].dtype != other[name].dtype:
            yield Difference(name, f"{one[name].dtype} {one[name].shape} became {other[name].dtype} {other[name].shape}")
        elif one[name].tobytes() != other[name].tobytes():
            yield Difference(name, "numbers differ", ulps(one[name], other[name]))


def ulps(one: np.ndarray, other: np.ndarray) -> int:
    """The largest number of floats between two of one place."""
    bits = np.dtype(f"i{one.dtype.itemsize}")
    lowest = np.iinfo(bits).min

    def ordered(array: np.ndarray) -> np.ndarray:
        whole = np.ascontiguousarray(array).view(bits).astype(np.int64)
        return np.where(whole < 0, int(lowest) - whole, whole)  # negative floats run the other way; -0 is 0

    return int(np.abs(ordered(one) - ordered(other)).max(initial=0))
