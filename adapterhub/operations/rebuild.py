"""Rebuild of merged and converted adapters: made again from their recipes and parents, and compared with what is stored."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import policy_checks, source_names, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.registry.adapter_recipe import ParentAdapter, RebuildDifference
    from adapterhub.registry.registry import Registry, Version
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True)
class RebuildResult:
    """A version that was made again from its recipe or its record; `differences` is empty if every byte is the same.

    `steps` are the first and the last completed step of a part of a training that was repeated; None for all of it.
    """

    version: Version
    differences: tuple[RebuildDifference, ...]
    steps: tuple[int, int] | None = None


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
    from adapterhub_converters.trained_prompt import FILE as TEMPLATE_FILE

    path = source_names.output_path(out) if out else None
    with version_to_rebuild(ref, workspace, out) as (registry, version, temporary):
        stored = temporary / "stored"
        parents = list(_parents(registry, version.digest, temporary))
        target = path or temporary / "rebuilt"
        with atomic.pending_output(target, replace=replace, durable=out is not None) as rebuilt:
            with sources.relabel_errors(stored, str(version.ref)):
                adapter_recipe.rebuild_adapter(stored, parents, rebuilt, base=base)
            differences = adapter_recipe.differences(stored, rebuilt)
            if (rebuilt / TEMPLATE_FILE).exists() and not (stored / TEMPLATE_FILE).exists():
                workspace.tell(f"note: {version.ref} lacks the chat template of its parents, which a merge keeps now")
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
