"""What a push, a pull or a copy would do, without doing it: the same sources, checks and digests, up to the first byte written.

`operations.push`, `operations.pull` and `operations.copy` are the real ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.ref import LATEST, Ref
from adapterhub_converters.errors import NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import copy, pull, push, source_names, sources
from .outgoing_version import PackageOptions, open_package, outgoing_version
from .push_result import target_address
from .signature_checks import NO_DEMAND, Demand
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.oci_manifest import Descriptor, Manifest
    from adapterhub.manifest.package_files import Selection
    from adapterhub.registry.adapter_recipe import Conversion
    from adapterhub.registry.registry import Registry
    from adapterhub.remotes.protocol import Source
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True)
class TransferPlan:
    """A version as a push would store it, or as a pull would write it.

    Attributes:
        target: The ref, the address, or the folder.
        digest: The digest of its manifest.
        size: Bytes of its files.
        missing: Bytes that the target lacks.
        files: Path and size of each file.
        new: False if the target has this version already.
        skipped: Names in a pushed folder that are left out.
        overridden: Codes of the errors of its check that `force` accepts.
    """

    target: str
    digest: Digest
    size: int
    missing: int
    files: tuple[tuple[str, int], ...]
    new: bool
    skipped: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()


def plan_push(
    source: StrPath,
    target: str,
    workspace: Workspace,
    *,
    base: BaseSpec | None = None,
    conversion: Conversion | None = None,
    expect: Digest | None = None,
    force: bool = False,
    name: str | None = None,
    selection: Selection | None = None,
) -> TransferPlan:
    """Check an adapter as `push` does, and return what the target would get; the arguments are those of `push`.

    Raises:
        RefusedError: The check finds errors, or the policy of the project does not allow the adapter.
        ConflictError: The target is not at `expect`.
    """
    options = PackageOptions(base, conversion, force, selection)
    if source_names.is_address(target):
        from adapterhub.remotes.remote_address import expect_digest

        address = target_address(target, workspace, name)
        with ExitStack() as stack:
            remote = stack.enter_context(workspace.connect(address))
            expect_digest(remote, expect)
            outgoing = outgoing_version(stack, source, workspace, options, address=address, name=name)
            manifest = outgoing.source.manifest(outgoing.reference)
            remote.check_push(manifest, address.reference)
            workspace.tell_notes(remote)
            skipped, overridden = outgoing.skipped, outgoing.overridden
            return _plan(str(address), manifest, remote, remote.has_blob, skipped=skipped, overridden=overridden)
    return _plan_registry_push(source, target, workspace, options, expect)


def _plan_registry_push(
    source: StrPath, target: str, workspace: Workspace, options: PackageOptions, expect: Digest | None
) -> TransferPlan:
    from adapterhub.remotes.adapter_folders import AdapterFolder
    from adapterhub.remotes.local_name import LocalName

    ref = push.pushable_ref(target, workspace)
    with (
        ExitStack() as stack,
        sources.open_source(source, workspace) as opened,
        open_package(opened, workspace, options, name=ref.name) as package,
    ):
        folder = AdapterFolder(package.folder, opened.location, draft=package.draft)
        manifest, codes = folder.manifest(LATEST), tuple(problem.code for problem in package.overridden)
        try:
            registry = stack.enter_context(workspace.open_registry())
        except NotFoundError:  # a push would create it
            return _plan(str(ref), manifest, None, lambda _: False, skipped=folder.skipped, overridden=codes)
        registry.check_publish(package, ref, expect)
        _check_tag(registry, ref, manifest.digest)
        local = LocalName(registry, ref.name, workspace.rules())

        def is_stored(blob: Descriptor) -> bool:
            return registry.store.size(blob.digest) == blob.size

        return _plan(str(ref), manifest, local, is_stored, skipped=folder.skipped, overridden=codes)


def _check_tag(registry: Registry, ref: Ref, digest: Digest) -> None:
    """Raise the error with which a push to `ref` would end that moves its tag to a version that is there already."""
    from adapterhub.registry.rehearsal import rehearsal

    row = next((row for row in registry.versions_with(digest) if row.name == ref.name), None)
    if row is not None and ref.tag is not None and ref.tag not in (LATEST, *row.tags):
        with rehearsal(registry):
            registry.tag(Ref(ref.name, number=row.number), ref.tag)


def _plan(
    where: str,
    manifest: Manifest,
    versions: Source | None,
    has_blob: Callable[[Descriptor], bool],
    *,
    skipped: tuple[str, ...] = (),
    overridden: tuple[str, ...] = (),
) -> TransferPlan:
    """Return the plan for a target that has these versions, none if it is not there yet, and these blobs."""
    from adapterhub.remotes.adapter_folders import has_version
    from adapterhub.remotes.version_copy import distinct_blobs

    is_new = versions is None or not has_version(versions, manifest.digest)
    missing = sum(blob.size for blob in distinct_blobs(manifest) if not has_blob(blob)) if is_new else 0
    files = tuple((layer.path, layer.size) for layer in manifest.layers)
    return TransferPlan(where, manifest.digest, manifest.size, missing, files, is_new, skipped, overridden)


def plan_pull(
    source: str,
    out: StrPath | None,
    workspace: Workspace,
    *,
    name: str | None = None,
    replace: bool = False,
    demand: Demand = NO_DEMAND,
) -> TransferPlan:
    """Look a version up and check it as `pull` does, and return what would be written; the arguments are those of `pull`.

    Raises:
        RefusedError: A policy or `demand` refuses the version.
        ConflictError: The folder has changes of your own, and `replace` is off.
    """
    from adapterhub.manifest import existing_folder

    out = source_names.output_path(out) if out else None
    with pull.incoming_version(source, workspace, name=name, demand=demand) as incoming:
        target = out or Path(incoming.title)
        manifest = incoming.manifest
        existing = existing_folder.inspect_folder(target)
        is_new = existing is None or not existing.holds(manifest)
        if existing is not None and is_new and not replace:
            existing.check_lost(incoming.is_elsewhere)
        files = tuple((layer.path, layer.size) for layer in manifest.layers)
        return TransferPlan(str(target), manifest.digest, manifest.size, manifest.size if is_new else 0, files, is_new)


def plan_copy(source: StrPath, target: StrPath, workspace: Workspace) -> TransferPlan:
    """Look a version up and check it as `copy` does, and return what the target would get."""
    if source_names.is_address(target):
        return plan_push(source, os.fspath(target), workspace)
    from adapterhub.registry import moves
    from adapterhub.remotes.local_name import LocalName

    ref = copy.copied_ref(source, target, workspace)
    if ref is None:
        return plan_pull(os.fspath(source), Path(target), workspace)
    workspace.check_name(ref.name)
    with ExitStack() as stack:
        registry: Registry | None = None
        with suppress(NotFoundError):  # a copy would create it
            registry = stack.enter_context(workspace.open_registry())
        if registry is not None:
            moves.check_push(registry.ledger, ref, None)
            for policy in registry.gate.policies():
                policy.check_name(ref.name)
            workspace = workspace.within(registry)
        opened = copy.open_version(stack, source, ref, workspace, registry)
        if opened is None:
            return plan_push(source, str(ref), workspace)
        _, manifest = opened
        local = LocalName(registry, ref.name, workspace.rules()) if registry else None

        def is_stored(blob: Descriptor) -> bool:
            return registry is not None and registry.store.size(blob.digest) == blob.size

        return _plan(str(ref), manifest, local, is_stored)
