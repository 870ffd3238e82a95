"""Merges of adapters that were looked up: what the command `merge` and `adapterhub.merge()` do, with the recipe recorded.

The arithmetic is in `adapterhub.merging`; here are the base that the adapters share, the destination, and the lineage.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError

from . import sources
from .sharing import pushing
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest, BaseInfo, Recipe
    from adapterhub.merging import FuseReport, Merge, MergeReport, Options
    from adapterhub.merging.into_base.extract import Extraction, Wanted
    from adapterhub.merging.into_base.verify import Proofs
    from adapterhub.ref import Ref
    from adapterhub.registry.recipe import Difference, Parent
    from adapterhub.registry.registry import Registry, Version
    from adapterhub_converters.adapter import Adapter
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True, repr=False)
class Combined:
    """An adapter that was merged from others.

    Attributes:
        report: What the merge did, by module.
        manifest: Its adapter.json.
        path: The folder, where one was asked for.
        version: The version, where it was stored in the registry.
    """

    report: MergeReport
    manifest: AdapterManifest
    path: Path | None = None
    version: Version | None = None

    def __repr__(self) -> str:
        return f"<Combined {self.version.ref if self.version else self.path}: {self.report!r}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def destination(out: StrPath) -> Path | Ref:
    """The folder or the ref that a text means; UsageError where it may be both. A `Path` is a folder.

    One word, or a path that begins with a dot or a slash, is a folder; a ref with a tag is a ref. `a/b` is a ref where there
    is no folder `a`, and ambiguous otherwise.
    """
    from adapterhub.ref import Ref

    text, path = os.fspath(out), Path(out)
    if not isinstance(out, str):
        return path
    if sources.is_address(out):
        raise UsageError(text, "is an address, and a merge is stored locally", "Merge into a ref like team/both, and copy that")
    try:
        ref = Ref.parse(text)
    except UsageError:
        if ":" in text and not path.parent.is_dir():
            raise
        return path
    if ref.number or ref.digest or ref.range:
        raise UsageError(text, "names a version, and a merge creates a new one", f"Write {ref.name}, or {ref.name}:TAG")
    if not ref.tag and path.parent.is_dir():
        raise UsageError(
            text, "could be a folder or a ref", f"Write ./{text} for the folder, {text}:latest for the ref", code="ambiguous"
        )
    return ref


def merge_adapters(
    found: Sequence[sources.Source],
    weights: Sequence[float],
    target: Path | Ref,
    how: Recipe,
    workspace: Workspace,
    *,
    replace: bool = False,
) -> Combined:
    """Merge adapters into one, in a new folder or as a version of the registry, where it passes the checks of a push.

    Args:
        found: The adapters.
        weights: What each is multiplied by.
        target: See `destination`.
        how: The method, one of `adapterhub.merging.METHODS`, and its options.
        workspace: The registry and the policy.
        replace: Replace an adapter in the folder.
    """
    from adapterhub.registry import recipe
    from adapterhub_converters.containers import atomic

    if isinstance(target, Path):
        atomic.check_free(target, replace=replace)
        for source in found:
            sources.check_apart(target, source.path)
    else:
        pushing.check_target(str(target), workspace)
    base = common_base(found)
    parents = [sources.parent(source, weight) for source, weight in zip(found, weights, strict=True)]

    def make(out: Path) -> tuple[MergeReport, AdapterManifest]:
        with workspace.steps("merging") as progress:
            return recipe.merge(parents, out, how, base=base, progress=progress, replace=replace)

    if isinstance(target, Path):
        report, manifest = make(target)
        return Combined(report, manifest, path=target)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / target.name.rpartition("/")[2]
        report, manifest = make(folder)
        return Combined(report, manifest, version=pushing.store(folder, target, workspace))


def common_base(found: Sequence[sources.Source]) -> BaseInfo | None:
    """The base that the adapters were trained on, as they pin it; RefusedError when they pin two."""
    pinned: dict[str, BaseInfo] = {}
    for source in found:
        base = _pinned(source)
        if base.fingerprint:
            pinned.setdefault(base.fingerprint, base)
    if len(pinned) > 1:
        names = " and ".join(base.repo or fingerprint[:19] for fingerprint, base in pinned.items())
        raise RefusedError(
            "base",
            f"the adapters were trained on different models: {names}",
            "Merge adapters of one base",
            code="different-bases",
        )
    return next(iter(pinned.values()), None)


def _pinned(source: sources.Source) -> BaseInfo:
    """The base in the adapter.json of an adapter; empty without one."""
    from adapterhub.manifest.document import AdapterManifest, BaseInfo

    manifest = AdapterManifest.read(source.folder)
    return manifest.base if manifest else BaseInfo()


def trained_in(found: Sequence[sources.Source]) -> str | None:
    """The quantization of the base in the training of all adapters; None when none or more than one is recorded."""
    recorded = {_pinned(source).quantization for source in found}
    return recorded.pop() if len(recorded) == 1 else None


def extract(
    base: Path, tuned: Path, target: Path | Ref, wanted: Wanted, workspace: Workspace, *, replace: bool = False
) -> tuple[Adapter, Extraction, Version | None]:
    """Extract an adapter from a full fine-tune of a base, into a new folder or as a version of the registry."""
    from adapterhub.manifest import describe
    from adapterhub.merging.into_base import extract as difference
    from adapterhub_converters import bases
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import peft

    if isinstance(target, Path):
        atomic.check_free(target, replace=replace)
    else:
        pushing.check_target(str(target), workspace)
    with workspace.steps("extracting weights") as progress:
        adapter, report = difference.extract(base, tuned, wanted, progress=progress)

    def write(folder: Path) -> None:
        peft.write(adapter, folder)
        describe.describe(folder, base=bases.read_hf(base)).write(folder)

    if isinstance(target, Path):
        with atomic.whole(target, replace=replace) as made:
            write(made)
        return adapter, report, None
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        write(Path(temporary))
        return adapter, report, pushing.store(Path(temporary), target, workspace)


def merge_into(
    found: Sequence[sources.Source],
    weights: Sequence[float],
    out: Path,
    base: Path,
    workspace: Workspace,
    *,
    onto: str = "original",
    replace: bool = False,
    method: Recipe | None = None,
    **how: Any,
) -> FuseReport:
    """Merge adapters into a base and write the model as `out`; `how` are fields of `adapterhub.merging.Options`."""
    from adapterhub.merging import Options
    from adapterhub_converters.containers import atomic

    options = Options(as_trained=onto == "as-trained", **how)
    gguf = base.is_dir() and out.suffix == ".gguf"
    check_place(out, base)
    atomic.check_free(out, folder=not gguf and (base.is_dir() or bool(options.shard_size)), replace=replace)
    merge, _ = prepare_into(found, weights, base, options, gguf=gguf, method=method)
    with workspace.bar("merging") as progress:
        return merge.write(out, progress, replace=replace)


def prepare_into(
    found: Sequence[sources.Source],
    weights: Sequence[float],
    base: Path,
    options: Options,
    *,
    gguf: bool = False,
    method: Recipe | None = None,
) -> tuple[Merge, Options]:
    """Prepare the merge of adapters into a base, by a method or as a sum: decided and measured, nothing written.

    Returned with the options, in which `trained_in` and `lineage` are filled in. The warnings of the report begin with a line
    for every adapter that was trained on a base with tensors of other names or shapes.
    """
    from adapterhub.merging import join, prepared, read_base
    from adapterhub_converters.formats import convert

    model = read_base(base)
    spec = model.spec
    adapters = [convert.read(source.path, base=spec) for source in found]
    how, lineage = None, _lineage(found, weights, base, spec)
    if method is not None:
        name, seed = method.method or "cat", method.seed or 0
        how = join(adapters, weights, method=name, seed=seed, parameters=method.parameters)
        lineage |= {"method": name, "seed": seed, "parameters": dict(how.parameters)} if how else {}
    options = dataclasses.replace(options, trained_in=trained_in(found), lineage=lineage)
    merge = prepared(list(zip(adapters, weights, strict=True)), model, options, gguf=gguf, join=how)
    warnings = (*_of_other_bases(found, spec, base), *merge.report.warnings)
    return dataclasses.replace(merge, report=dataclasses.replace(merge.report, warnings=warnings)), options


def check_place(out: Path, base: Path) -> None:
    """Refuse to write a model over its base, or into the folder of its base, which would change it."""
    sources.check_apart(out, base)
    if base.is_dir() and base.resolve() in out.resolve().parents:
        raise UsageError(str(out), f"is inside the base, {base}, and would change it", "Choose another output")


def _of_other_bases(found: Sequence[sources.Source], spec: BaseSpec, base: Path) -> Iterator[str]:
    """A line for each adapter that pins a base of other names or shapes; a fine-tune of its base has the same."""
    for source in found:
        pinned = _pinned(source)
        if spec.fingerprint and pinned.fingerprint not in (None, spec.fingerprint):
            trained_on = pinned.repo or f"the base {str(pinned.fingerprint)[:19]}"
            what = f"was trained on {trained_on}, and {base.name} has tensors of other names or shapes"
            yield f"{source.where} {what}. Check it on that base for the differences"


def _lineage(found: Sequence[sources.Source], weights: Sequence[float], base: Path, spec: BaseSpec) -> dict[str, Any]:
    parents = [sources.parent(source, weight) for source, weight in zip(found, weights, strict=True)]
    known = {"repo": spec.repo, "revision": spec.revision, "fingerprint": spec.fingerprint}
    return {
        "base": known if spec.repo else {**known, "name": base.resolve().name},
        "adapters": [
            {"digest": parent.digest, **({"ref": parent.ref} if parent.ref else {}), "weight": parent.weight}
            for parent in parents
        ],
    }


def verify_merge(
    merged: Path, base: Path, found: Sequence[sources.Source], weights: Sequence[float], workspace: Workspace, *, onto: str
) -> Proofs:
    """Compare every tensor of a merged model with what the merge of these adapters into `base` should have made of it."""
    from adapterhub.merging import Options
    from adapterhub.merging.into_base import verify
    from adapterhub_converters import bases
    from adapterhub_converters.formats import convert

    spec = bases.read_hf(base) if base.is_dir() else None
    read = [convert.read(source.path, base=spec) for source in found]
    options = Options(as_trained=onto == "as-trained", trained_in=trained_in(found))
    with workspace.steps("comparing tensors") as progress:
        return verify.prove(list(zip(read, weights, strict=True)), base, merged, options=options, progress=progress)


# ---- rebuilt


@dataclass(frozen=True)
class Rebuilt:
    """A version that was made again from its recipe; no `differences` where every byte is the same."""

    version: Version
    differences: tuple[Difference, ...]


def rebuild(ref: str, workspace: Workspace, *, out: StrPath | None = None, base: BaseSpec | None = None) -> Rebuilt:
    """Make a merged or converted adapter again from its recipe and its parents, and compare it with the stored one.

    Args:
        ref: A version of the registry, which must have its parents too.
        workspace: The registry.
        out: A new folder for the adapter; None to keep nothing.
        base: The model it was converted with, if any.
    """
    from adapterhub.ref import Ref
    from adapterhub.registry import recipe

    with workspace.opened() as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        stored = Path(temporary) / "stored"
        version = registry.pull(Ref.parse(ref), stored)
        workspace.deprecated(version.ref, version.deprecated)
        parents = list(_parents(registry, version.digest, Path(temporary)))
        made = Path(out) if out else Path(temporary) / "made"
        with sources.naming(stored, str(version.ref)):
            recipe.again(stored, parents, made, base=base)
        return Rebuilt(version, tuple(recipe.differences(stored, made)))


def _parents(registry: Registry, digest: Digest, folder: Path) -> Iterator[Parent]:
    from adapterhub.registry import recipe
    from adapterhub_converters.adapter_files import adapter_in

    manifest = registry.adapter_manifest(digest)
    places: dict[Digest, Path] = {}  # a recipe may name one parent thousands of times
    for parent in manifest.parents if manifest else ():
        held = registry.holding(parent.digest)
        if not held:
            raise NotFoundError(parent.ref or parent.digest, "this parent is not in the registry", "Push or pull it here first")
        place = places.setdefault(held[0].digest, folder / f"{len(places)}")
        if not place.exists():
            registry.pull(held[0].ref, place)
        weight = 1.0 if parent.weight is None else parent.weight
        yield recipe.Parent(place, adapter_in(place), parent.digest, parent.ref, weight)
