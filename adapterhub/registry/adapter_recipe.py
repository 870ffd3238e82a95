"""Recipes of adapters that were merged or converted: the few lines of adapter.json from which such an adapter can be rebuilt.

A merge or a conversion depends on its recipe, the digests of its parents, and the base: nothing else. Given the parents, the
result can be reproduced and compared, bit for bit on the same class of CPU. Recipes of merged models are in `merge_recipe`.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from adapterhub import digest
from adapterhub.manifest import derive, document
from adapterhub.manifest.document import AdapterManifest, BaseInfo, Recipe
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights, resolve_adapter
from adapterhub_converters.containers import atomic
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats import FORMATS, GgufDtype, PackageFormat, WrittenFormat, peft
from adapterhub_converters.formats import convert as formats
from adapterhub_converters.formats.lossy import LossAllowance
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import FILE as TEMPLATE_FILE
from adapterhub_converters.trained_prompt import TrainedPrompt, common_prompt

if TYPE_CHECKING:
    from adapterhub.merging import MergeReport, Progress
    from adapterhub_converters.adapter import Adapter, LossReport
    from adapterhub_converters.bases import BaseSpec

MERGE, CONVERT = "merge", "convert"
_DIFFERENT_PROMPTS = (
    "the adapters were trained with different chat templates, options or dates, so the result has none of its own"
)
_LOST_OPTIONS = "options or a date of the base's chat template are in the adapters, and not in the result"
ConversionFormat = WrittenFormat | PackageFormat | Literal["image"]
"""What a version is converted to; `image` packages an adapter as a container image, at a remote."""


@dataclass(frozen=True)
class Conversion:
    """Options of a conversion; `rank` is the rank of approximations."""

    to: ConversionFormat
    dtype: GgufDtype = "source"
    approx: bool = False
    drop: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def allowed_losses(self) -> LossAllowance:
        """The losses that the conversion may cause."""
        return LossAllowance(approx=self.approx, drop=list(self.drop), rank=self.rank)

    def recipe(self, base: BaseSpec | None, report: LossReport) -> Recipe:
        """Return the recipe of a conversion that ended with this loss report."""
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
    def from_recipe(cls, recipe: Recipe) -> Conversion:
        """Return the conversion that a recipe describes."""
        # The schema of adapter.json has an enum of the formats, and the writer refuses a dtype that it does not know.
        to, dtype = cast("WrittenFormat", recipe.to), cast("GgufDtype", recipe.dtype or "source")
        return cls(to, dtype, bool(recipe.allow_approx), recipe.allow_drop or (), recipe.rank)


@dataclass(frozen=True)
class ParentAdapter:
    """An adapter that another one is made from: its folder, its path and the digest of its manifest.

    `adapter` is the adapter itself, if computing its digest took reading all of it, and `prompt` is how it was trained to be
    asked, if that was read too.
    """

    folder: Path
    path: Path
    digest: str
    ref: str | None = None
    weight: float = 1.0
    adapter: Adapter | None = None
    prompt: TrainedPrompt | None = None


def convert(
    parent: ParentAdapter, out: Path, conversion: Conversion, *, name: str, base: BaseSpec | None = None
) -> tuple[Path, LossReport]:
    """Convert `parent` into the new or empty folder `out`, with a manifest; return the adapter's path and the losses.

    In a format of one file, the file is called `name`, with the format's suffix.
    """
    with atomic.pending_output(out) as folder:
        target = folder if FORMATS[conversion.to].folder else folder / f"{name}{FORMATS[conversion.to].suffix}"
        report = formats.convert(
            parent.path,
            target,
            to=conversion.to,
            base=base,
            allowed=conversion.allowed_losses,
            dtype=conversion.dtype,
        )
        parent_manifest = AdapterManifest.read(parent.folder)
        manifest = derive.describe(
            folder,
            base=base,
            parents=[document.Parent(parent.digest, method=CONVERT)],
            recipe=conversion.recipe(base, report),
        )
        _with_inherited_fields(manifest, parent_manifest).write(folder)
    return out / target.relative_to(folder) if target != folder else out, report


# Fields that a conversion does not change. The training is recorded in the parent.
_INHERITED = ("name", "task", "license", "description", "expires")


def _with_inherited_fields(manifest: AdapterManifest, parent_manifest: AdapterManifest | None) -> AdapterManifest:
    if parent_manifest is None:
        return manifest
    inherited = {key: getattr(parent_manifest, key) for key in _INHERITED if getattr(parent_manifest, key) is not None}
    return dataclasses.replace(manifest, base=parent_manifest.base.filled_from(manifest.base), **inherited)


def merge(
    parents: Sequence[ParentAdapter],
    out: Path,
    recipe: Recipe,
    *,
    base: BaseInfo | None = None,
    progress: Progress | None = None,
    replace: bool = False,
    durable: bool = True,
) -> tuple[MergeReport, AdapterManifest]:
    """Merge `parents` into the folder `out`, with a manifest.

    Args:
        parents: The adapters.
        out: The folder to write.
        recipe: The method and its options; recorded with the seed and the parameters that were used.
        base: The model they were all trained on.
        progress: Called as the merge advances.
        replace: Replace what is in `out`.
        durable: Flush it to disk, unless it is in a temporary folder.
    """
    from adapterhub.merging import combine  # late: a conversion merges nothing

    method = recipe.method or "cat"
    combined, report = combine(
        [parent.adapter or formats.read(parent.path) for parent in parents],
        [parent.weight for parent in parents],
        method=method,
        rank=recipe.rank,
        energy=recipe.energy,
        budget=recipe.budget,
        seed=recipe.seed or 0,
        parameters=recipe.parameters,
        progress=progress,
    )
    recorded_recipe = dataclasses.replace(
        recipe, kind=MERGE, method=method, seed=report.seed, parameters=dict(report.parameters) or None
    )
    parent_records = [document.Parent(parent.digest, parent.ref or None, parent.weight, method) for parent in parents]
    prompt = common_prompt(map(_prompt, parents), base.chat_template_digest if base else None)
    with atomic.pending_output(out, replace=replace, durable=durable) as folder:
        peft.write(combined, folder)
        note = _DIFFERENT_PROMPTS if prompt is None else None if prompt.write_template(folder) else _LOST_OPTIONS
        manifest = derive.describe(folder, parents=parent_records, recipe=recorded_recipe)
        manifest = dataclasses.replace(manifest, base=base or manifest.base)
        manifest.write(folder)
    return dataclasses.replace(report, notes=(*report.notes, *filter(None, [note]))), manifest


def _prompt(parent: ParentAdapter) -> TrainedPrompt:
    return TrainedPrompt.read(parent.path) if parent.prompt is None else parent.prompt


def rebuild_adapter(folder: Path, parents: Sequence[ParentAdapter], out: Path, *, base: BaseSpec | None = None) -> None:
    """Make the adapter in `folder` again, from its recipe and its parents, in the new folder `out`.

    Raises RefusedError if the adapter has no recipe, or if `base` is not the one it was made with.
    """
    manifest = AdapterManifest.read(folder)
    if manifest is None or manifest.recipe is None:
        recorded_parents = manifest.parents if manifest else ()
        reason = "it was merged before recipes were recorded" if recorded_parents else "it has no parents"
        hint, code = "Only merged and converted adapters have one", ""
        if manifest and manifest.training and manifest.training.config:
            reason, hint, code = "it was trained", "Train it again from its record, with its base and its data", "trained"
        raise RefusedError(str(folder), f"no recipe to make it from: {reason}", hint, code=code)
    recipe = manifest.recipe
    if not parents or (recipe.kind == CONVERT and len(parents) > 1):
        reason = f"names {len(parents)} parents for a recipe of the kind {recipe.kind!r}"
        raise FormatError(f"{folder}/{ADAPTER_JSON}", reason)
    if recipe.kind == MERGE:
        merge(parents, out, recipe, base=manifest.base)
        return
    if recipe.base and (base is None or not base.has_fingerprint(recipe.base)):
        base_note = "another one was given" if base else "none was given"
        problem = f"made with the base whose fingerprint is {recipe.base[:19]}, and {base_note}"
        raise RefusedError(str(folder), problem, "Pass that base", code="recipe-base-required")
    convert(parents[0], out, Conversion.from_recipe(recipe), name=_stem(folder), base=base)


def _stem(folder: Path) -> str:
    file = resolve_adapter(folder)
    return file.stem if file.is_file() else folder.name


@dataclass(frozen=True)
class RebuildDifference:
    """A tensor or a file that differs; `ulps` is the largest distance of its numbers in units in the last place, if known."""

    name: str
    what: str
    ulps: int | None = None


def differences(stored: Path, rebuilt: Path) -> list[RebuildDifference]:
    """Compare rebuilt files with the stored ones; further stored files are ignored.

    So is the chat template that all parents have, where the stored adapter, of a merge from before it was kept, has none.
    """
    results = []
    for name in sorted(path for path, status in walk(rebuilt) if stat.S_ISREG(status.st_mode)):
        # adapter.json also has what people declared, which a rebuild cannot know.
        if name.rpartition("/")[2] == ADAPTER_JSON:
            continue
        if not (stored / name).is_file():
            if name == TEMPLATE_FILE:
                continue
            results.append(RebuildDifference(name, "missing"))
        elif digest.sha256_file(rebuilt / name) != digest.sha256_file(stored / name):
            results += (
                list(tensor_differences(*(dict(formats.read(folder).tensors()) for folder in (stored, rebuilt))))
                if is_weights(name)
                else [RebuildDifference(name, "bytes differ")]
            )
    return results


def tensor_differences(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> Iterator[RebuildDifference]:
    """Yield the tensors that differ, by their names."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield RebuildDifference(name, "only in one of them")
        elif before[name].shape != after[name].shape or before[name].dtype != after[name].dtype:
            yield RebuildDifference(
                name,
                f"{before[name].dtype} {before[name].shape} became {after[name].dtype} {after[name].shape}",
            )
        elif before[name].tobytes() != after[name].tobytes():
            yield RebuildDifference(name, "numbers differ", ulps(before[name], after[name]))


def ulps(first: np.ndarray, second: np.ndarray) -> int:
    """Return the largest distance between two numbers at the same position, in units in the last place."""
    bits = np.dtype(f"i{first.dtype.itemsize}")
    lowest = np.iinfo(bits).min

    def monotonic(array: np.ndarray) -> np.ndarray:
        integers = np.ascontiguousarray(array).view(bits).astype(np.int64)
        # As integers, the bit patterns of negative floats run the other way; mirrored, they continue below 0, and -0 is 0.
        return np.where(integers < 0, int(lowest) - integers, integers)

    return int(np.abs(monotonic(first) - monotonic(second)).max(initial=0))
