"""Merges of adapters into one, after they are looked up: the work of the command `merge` and of `adapterhub.merge()`.

The arithmetic is in `adapterhub.merging`. This module finds the base that the adapters share, the destination and the lineage,
and records the recipe.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import ParameterError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import push, source_names, sources
from .workspace import Progress, StrPath, Workspace, as_list

if TYPE_CHECKING:
    from adapterhub.manifest.document import AdapterManifest, BaseInfo, Recipe
    from adapterhub.merging import MergeReport
    from adapterhub.merging.adapters.methods import MergeMethod
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Version


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
    with open_adapters(adapters, weights, workspace) as (adapter_sources, factors):
        return merge_adapters(adapter_sources, factors, target, recipe, workspace, replace=replace)


@contextmanager
def open_adapters(
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
    text, path = os.fspath(out), Path(out)
    if source_names.is_address(out):
        raise UsageError(text, "is an address, and a merge is stored locally", "Merge into a ref like team/both, and copy that")
    _, ref = source_names.resolve_target(out)
    if ref is None:
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
        base = pinned_base(source)
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


def pinned_base(source: sources.Source) -> BaseInfo:
    """Return the base in the adapter.json of an adapter; an empty one without the file."""
    from adapterhub.manifest.document import AdapterManifest, BaseInfo

    manifest = AdapterManifest.read(source.folder)
    return manifest.base if manifest else BaseInfo()
