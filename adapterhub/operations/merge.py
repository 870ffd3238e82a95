"""Merges of adapters that were looked up: the work of the command `merge`, of `adapterhub.merge()` and of `merge_into()`.

The arithmetic is in `adapterhub.merging`. This module finds the base that the adapters share, the destination and the lineage,
and records the recipe.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub_converters.errors import NotFoundError, ParameterError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, policy_checks, push, source_names, sources
from .workspace import Progress, StrPath, Workspace, as_list

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest, BaseInfo, Recipe
    from adapterhub.merging import FuseReport, Merge, MergeReport, Options
    from adapterhub.merging.adapters.methods import MergeMethod
    from adapterhub.merging.into_base.extraction import Extraction, ExtractionOptions
    from adapterhub.merging.into_base.merge_proof import Proofs
    from adapterhub.ref import Ref
    from adapterhub.registry.adapter_recipe import ParentAdapter, RebuildDifference
    from adapterhub.registry.registry import Registry, Version
    from adapterhub_converters.adapter import Adapter
    from adapterhub_converters.bases import BaseSpec
    from adapterhub_converters.formats import FloatDtype, QuantizedDtype

BaseWeights = Literal["original", "as-trained"]
"""The weights of a base to merge onto: as they are, or rounded as training saw them."""


@dataclass(frozen=True, repr=False)
class MergeResult:
    """An adapter that was merged from others.

    Attributes:
        report: What the merge did, by module.
        manifest: Its adapter.json.
        path: The folder, if a folder was asked for.
        version: The version, if it was stored in the registry.
    """

    report: MergeReport
    manifest: AdapterManifest
    path: Path | None = None
    version: Version | None = None

    def __repr__(self) -> str:
        return f"<MergeResult {self.version.ref if self.version else self.path}: {self.report!r}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def merge(
    adapters: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "cat",
    rank: int | None = None,
    energy: float | None = None,
    rank_budget: int | None = None,
    seed: int = 0,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    **parameters: float | str,
) -> MergeResult:
    """Merge adapters into one adapter. The result records how it was merged, so that it can be repeated and verified.

    Args:
        adapters: One or several of: a folder, a file, a ref, an address.
        out: The folder to write, or a ref to store the result under, which then passes the checks of a push.
        weights: The factor of each adapter; 1 each if None.
        method: `cat` (exact, ranks add up), `linear`, `svd`, `ties` … (`adapterhub.merging.METHODS`).
        rank: The rank of every module of the result.
        energy: Keep this share of the energy, with the smallest ranks that do.
        rank_budget: The bytes of tensors to spend; ranks are chosen to keep most in them.
        seed: The seed of the method's random numbers.
        parameters: Parameters of the method, such as `density`.
        replace: Replace an earlier output at `out`; else it must not exist.
        progress: Called with modules done and in all.
        workspace: Where names are looked up.

    Example:
        >>> ah.merge(["./sql", "./french"], "./both", method="ties", density=0.2).report.method
        'ties'
    """
    from adapterhub.manifest.document import Recipe

    workspace = (workspace or Workspace()).with_progress(progress)
    recipe = Recipe("merge", rank=rank, method=method, energy=energy, budget=rank_budget, seed=seed, parameters=parameters)
    target = merge_destination(out)  # before any adapter is downloaded: an ambiguous output is refused at once
    with _open_adapters(adapters, weights, workspace) as (adapter_sources, factors):
        return merge_adapters(adapter_sources, factors, target, recipe, workspace, replace=replace)


def merge_into(
    adapters: StrPath | Sequence[StrPath],
    base: StrPath,
    out: StrPath,
    *,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "cat",
    seed: int = 0,
    dtype: FloatDtype | None = None,
    requantize: QuantizedDtype | Literal["nf4"] | None = None,
    shard_size: int | None = None,
    onto: BaseWeights = "original",
    dequantize: bool = False,
    force: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
    **parameters: float | str,
) -> FuseReport:
    """Merge adapters into a base model. The result records how it was merged, so that it can be repeated and verified.

    Args:
        adapters: One or several of: a folder, a file, a ref, an address.
        base: The model, a Hugging Face folder or a GGUF file.
        out: The folder or .gguf file to write.
        weights: The factor of each adapter; 1 each if None.
        method: As for `merge`; its result is added without truncation to a rank.
        seed: The seed of the method's random numbers.
        dtype: The type of floats to write, `bf16`, `f16` or `f32`; the base's if None.
        requantize: The quantized type to write, `q8_0`, `q6_k`, `q4_k` …, a mixture like `q4_k_m`, or `nf4`.
        shard_size: The most bytes of tensors in a file.
        onto: Merge onto the base's weights as they are, `original`, or rounded as training saw them, `as-trained`.
        dequantize: Let a quantized Hugging Face model become one in floats.
        force: Write the model even if a quantized target absorbs the adapter.
        replace: Replace an earlier output at `out`; else it must not exist.
        progress: Called with bytes done and in all.
        workspace: Where names are looked up.
        parameters: Parameters of the method, such as `density`.

    Example:
        >>> len(ah.merge_into("./sql", "./tiny", "./merged").touched)
        4
    """
    from adapterhub.manifest.document import Recipe
    from adapterhub.merging import Options
    from adapterhub_converters.containers import atomic

    workspace, target = (workspace or Workspace()).with_progress(progress), Path(out)
    recipe = Recipe("merge", method=method, seed=seed, parameters=parameters)
    with _open_adapters(adapters, weights, workspace) as (adapter_sources, factors):
        folder = base_sources.weights(base, workspace)
        options = Options(
            dtype=dtype,
            requantize=requantize,
            shard_size=shard_size,
            dequantize=dequantize,
            as_trained=onto == "as-trained",
            force=force,
        )
        gguf = folder.is_dir() and target.suffix == ".gguf"
        check_place(target, folder)
        atomic.check_free(target, folder=not gguf and (folder.is_dir() or bool(shard_size)), replace=replace)
        prepared, _ = prepare_merge_into(adapter_sources, factors, folder, options, gguf=gguf, method=recipe)
        with workspace.bar("merging") as advance:
            return prepared.write(target, advance, replace=replace)


@contextmanager
def _open_adapters(
    adapters: StrPath | Sequence[StrPath], weights: Sequence[float] | None, workspace: Workspace
) -> Iterator[tuple[list[sources.Source], list[float]]]:
    """Yield adapters that were looked up, with the factor of each."""
    names = as_list(adapters)
    factors = [1.0] * len(names) if weights is None else list(weights)
    if len(factors) != len(names):
        raise ParameterError("weights", f"{len(factors)} for {len(names)} adapters", "Give one for each")
    with ExitStack() as stack:
        yield [stack.enter_context(sources.open_source(text, workspace)) for text in names], factors


def merge_destination(out: StrPath) -> Path | Ref:
    """Return the folder or the ref that a text names; raise UsageError where it may be both. A `Path` is a folder.

    One word, or a path that begins with a dot or a slash, is a folder; a ref with a tag is a ref. `a/b` is a ref where there is
    no folder `a`, and ambiguous otherwise.
    """
    from adapterhub.ref import Ref

    text, path = os.fspath(out), Path(out)
    if not isinstance(out, str):
        return path
    if source_names.is_address(out):
        raise UsageError(text, "is an address, and a merge is stored locally", "Merge into a ref like team/both, and copy that")
    try:
        ref = Ref.parse(text)
    except UsageError:
        # A colon begins a tag or is part of a path; only an existing parent folder makes it a path.
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
    adapters: Sequence[sources.Source],
    weights: Sequence[float],
    target: Path | Ref,
    options: Recipe,
    workspace: Workspace,
    *,
    replace: bool = False,
) -> MergeResult:
    """Merge adapters into one, in a new folder or as a version of the registry, where it passes the checks of a push.

    Args:
        adapters: The adapters.
        weights: The factor of each adapter.
        target: The folder or the ref; see `merge_destination`.
        options: The method, one of `adapterhub.merging.METHODS`, and its options.
        workspace: The registry and the policy.
        replace: Replace an adapter in the folder.
    """
    from adapterhub.registry import adapter_recipe
    from adapterhub_converters.containers import atomic

    # Refuse a target that cannot be written before minutes are spent on the merge.
    if isinstance(target, Path):
        atomic.check_free(target, replace=replace)
        for source in adapters:
            sources.check_apart(target, source.path)
    else:
        push.check_target(str(target), workspace)
    base = common_base(adapters)
    parents = [sources.parent(source, weight) for source, weight in zip(adapters, weights, strict=True)]

    def make(out: Path, *, durable: bool) -> tuple[MergeReport, AdapterManifest]:
        with workspace.steps("merging") as progress:
            return adapter_recipe.merge(parents, out, options, base=base, progress=progress, replace=replace, durable=durable)

    if isinstance(target, Path):
        report, manifest = make(target, durable=True)
        return MergeResult(report, manifest, path=target)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / target.name.rpartition("/")[2]
        report, manifest = make(folder, durable=False)
        return MergeResult(report, manifest, version=push.store(folder, target, workspace))


def common_base(adapters: Sequence[sources.Source]) -> BaseInfo | None:
    """Return the base that the adapters were trained on, as they pin it; raise RefusedError if they pin two."""
    pinned: dict[str, BaseInfo] = {}
    for source in adapters:
        base = _pinned_base(source)
        # An adapter without a fingerprint says nothing about its base, so it agrees with any.
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


def _pinned_base(source: sources.Source) -> BaseInfo:
    """Return the base in the adapter.json of an adapter; an empty one without the file."""
    from adapterhub.manifest.document import AdapterManifest, BaseInfo

    manifest = AdapterManifest.read(source.folder)
    return manifest.base if manifest else BaseInfo()


def common_quantization(adapters: Sequence[sources.Source]) -> str | None:
    """Return the quantization of the base that all adapters were trained in; None if none or more than one is recorded."""
    quantizations = {_pinned_base(source).quantization for source in adapters}
    return quantizations.pop() if len(quantizations) == 1 else None


def extract(
    base: Path, tuned: Path, target: Path | Ref, options: ExtractionOptions, workspace: Workspace, *, replace: bool = False
) -> tuple[Adapter, Extraction, Version | None]:
    """Extract an adapter from a full fine-tune of a base, into a new folder or as a version of the registry."""
    from adapterhub.manifest import derive
    from adapterhub.merging.into_base import extraction as difference
    from adapterhub_converters import bases
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import peft

    if isinstance(target, Path):
        atomic.check_free(target, replace=replace)
    else:
        push.check_target(str(target), workspace)
    with workspace.steps("extracting weights") as progress:
        adapter, report = difference.extract(base, tuned, options, progress=progress)

    def write(folder: Path) -> None:
        peft.write(adapter, folder)
        derive.describe(folder, base=bases.read_hf(base)).write(folder)

    if isinstance(target, Path):
        with atomic.pending_output(target, replace=replace) as scratch:
            write(scratch)
        return adapter, report, None
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        write(Path(temporary))
        return adapter, report, push.store(Path(temporary), target, workspace)


def prepare_merge_into(
    adapters: Sequence[sources.Source],
    weights: Sequence[float],
    base: Path,
    options: Options,
    *,
    gguf: bool = False,
    method: Recipe | None = None,
) -> tuple[Merge, Options]:
    """Prepare the merge of adapters into a base, by a method or as a sum: decide and measure, but write nothing.

    Returns:
        The merge, and the options with `trained_in` and `lineage` filled in. The warnings of the merge's report begin with a
        line for every adapter that was trained on a base with tensors of other names or shapes.
    """
    from adapterhub.merging import join, prepare_merge, read_base
    from adapterhub_converters.formats import convert

    model = read_base(base)
    spec = model.spec
    tensors = [convert.read(source.path, base=spec) for source in adapters]
    joined, lineage = None, _lineage(adapters, weights, base, spec)
    if method is not None:
        name, seed = method.method or "cat", method.seed or 0
        joined = join(tensors, weights, method=name, seed=seed, parameters=method.parameters)
        lineage |= {"method": name, "seed": seed, "parameters": dict(joined.parameters)} if joined else {}
    options = dataclasses.replace(options, trained_in=common_quantization(adapters), lineage=lineage)
    merge = prepare_merge(list(zip(tensors, weights, strict=True)), model, options, gguf=gguf, join=joined)
    warnings = (*_other_base_warnings(adapters, spec, base), *merge.report.warnings)
    return dataclasses.replace(merge, report=dataclasses.replace(merge.report, warnings=warnings)), options


def check_place(out: Path, base: Path) -> None:
    """Refuse to write a model over its base or into the folder of its base, which would change the base."""
    sources.check_apart(out, base)
    if base.is_dir() and base.resolve() in out.resolve().parents:
        raise UsageError(str(out), f"is inside the base, {base}, and would change it", "Choose another output")


def _other_base_warnings(adapters: Sequence[sources.Source], spec: BaseSpec, base: Path) -> Iterator[str]:
    """Yield a line for each adapter that pins a base of other names or shapes; a fine-tune of its base has the same."""
    for source in adapters:
        pinned = _pinned_base(source)
        if spec.fingerprint and pinned.fingerprint and not spec.has_fingerprint(pinned.fingerprint):
            trained_on = pinned.repo or f"the base {str(pinned.fingerprint)[:19]}"
            warning = f"was trained on {trained_on}, and {base.name} has tensors of other names or shapes"
            yield f"{source.location} {warning}. Check it on that base for the differences"


def _lineage(adapters: Sequence[sources.Source], weights: Sequence[float], base: Path, spec: BaseSpec) -> dict[str, Any]:
    parents = [sources.parent(source, weight) for source, weight in zip(adapters, weights, strict=True)]
    base_facts = {"repo": spec.repo, "revision": spec.revision, "fingerprint": spec.fingerprint}
    return {
        "base": base_facts if spec.repo else {**base_facts, "name": base.resolve().name},
        "adapters": [
            {"digest": parent.digest, **({"ref": parent.ref} if parent.ref else {}), "weight": parent.weight}
            for parent in parents
        ],
    }


def verify_merge(
    merged: Path,
    base: Path,
    adapters: Sequence[sources.Source],
    weights: Sequence[float],
    workspace: Workspace,
    *,
    onto: BaseWeights,
) -> Proofs:
    """Compare every tensor of a merged model with the expected result of merging these adapters into `base`."""
    from adapterhub.merging import Options
    from adapterhub.merging.into_base import merge_proof
    from adapterhub_converters import bases
    from adapterhub_converters.formats import convert

    spec = bases.read_hf(base) if base.is_dir() else None
    tensors = [convert.read(source.path, base=spec) for source in adapters]
    options = Options(as_trained=onto == "as-trained", trained_in=common_quantization(adapters))
    with workspace.steps("comparing tensors") as progress:
        return merge_proof.prove(list(zip(tensors, weights, strict=True)), base, merged, options=options, progress=progress)


# ---- rebuild


@dataclass(frozen=True)
class RebuildResult:
    """A version that was made again from its recipe; `differences` is empty if every byte is the same."""

    version: Version
    differences: tuple[RebuildDifference, ...]


@contextmanager
def version_to_rebuild(ref: str, workspace: Workspace, out: StrPath | None) -> Iterator[tuple[Registry, Version, Path]]:
    """Yield the registry, a version in it, and a temporary folder whose `stored` is the version.

    Raises:
        RefusedError: There is an output, and the policy does not allow the version; without one, it is only reported on.
    """
    from adapterhub.ref import Ref

    with workspace.open_registry() as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        if out is not None:
            policy_checks.check_use(registry, registry.resolve(Ref.parse(ref)), ref, workspace)
        version = registry.pull(Ref.parse(ref), Path(temporary) / "stored")
        workspace.warn_if_deprecated(version.ref, version.deprecated)
        yield registry, version, Path(temporary)


def rebuild(
    ref: str, workspace: Workspace, *, out: StrPath | None = None, base: BaseSpec | None = None, replace: bool = False
) -> RebuildResult:
    """Make a merged or converted adapter again from its recipe and its parents, and compare it with the stored one.

    Args:
        ref: A version of the registry, which must also have the version's parents.
        workspace: The registry.
        out: A new folder for the adapter; None to keep nothing.
        base: The model it was converted with, if any.
        replace: Replace an earlier output at `out`.
    """
    from adapterhub.registry import adapter_recipe
    from adapterhub_converters.containers import atomic

    with version_to_rebuild(ref, workspace, out) as (registry, version, temporary):
        stored = temporary / "stored"
        parents = list(_parents(registry, version.digest, temporary))
        target = Path(out) if out else temporary / "rebuilt"
        with atomic.pending_output(target, replace=replace, durable=out is not None) as rebuilt:
            with sources.relabel_errors(stored, str(version.ref)):
                adapter_recipe.rebuild_adapter(stored, parents, rebuilt, base=base)
            differences = adapter_recipe.differences(stored, rebuilt)
        return RebuildResult(version, tuple(differences))


def _parents(registry: Registry, digest: Digest, folder: Path) -> Iterator[ParentAdapter]:
    from adapterhub.registry import adapter_recipe
    from adapterhub_converters.adapter_files import resolve_adapter

    manifest = registry.adapter_manifest(digest)
    folders: dict[Digest, Path] = {}  # a recipe may name one parent thousands of times
    for parent in manifest.parents if manifest else ():
        versions = registry.versions_with(parent.digest)
        if not versions:
            raise NotFoundError(parent.ref or parent.digest, "this parent is not in the registry", "Push or pull it here first")
        parent_folder = folders.setdefault(versions[0].digest, folder / f"{len(folders)}")
        if not parent_folder.exists():
            registry.pull(versions[0].ref, parent_folder)
        weight = 1.0 if parent.weight is None else parent.weight
        yield adapter_recipe.ParentAdapter(parent_folder, resolve_adapter(parent_folder), parent.digest, parent.ref, weight)
