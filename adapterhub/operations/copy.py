"""Copies of an adapter between the registry, addresses and folders; a copied version keeps its digest."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.registry.signature_policy import store_signatures
from adapterhub_converters.errors import RefusedError, UsageError

from . import signature_checks, source_names, sources
from .outgoing_version import open_package
from .policy_checks import check_policy
from .pull import PullResult, pull
from .push import push
from .push_result import PushResult, stored_result
from .signature_checks import VersionNames
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.ref import Ref
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.protocol import Source


def copy(source: StrPath, target: StrPath, workspace: Workspace) -> PushResult | PullResult:
    """Copy an adapter with its signatures under the same digest to a ref of the registry, an address, or a folder.

    A target that could be a ref is taken as one; write a folder as `./NAME`, or give a `Path`.
    """
    if source_names.is_address(target):
        return push(source, os.fspath(target), workspace=workspace)
    if (ref := copied_ref(source, target, workspace)) is not None:
        workspace.check_name(ref.name)
        with workspace.open_registry(create=True) as registry:
            try:
                return stored_result(_into_registry(registry, source, ref, workspace))
            except RefusedError as error:
                if error.fields.get("adapter") == ref.name:  # which is not stored: a remedy is about the source
                    error.fields["adapter"] = os.fspath(source)
                raise
    return pull(os.fspath(source), Path(target), workspace=workspace)


def copied_ref(source: StrPath, target: StrPath, workspace: Workspace) -> Ref | None:
    """Return the ref that a target which is no address means; None for a folder, to which only a version can be copied."""
    _, ref = source_names.resolve_target(target)
    if ref is None and not source_names.is_address(source) and source_names.ref_of(source, workspace) is None:
        raise UsageError(os.fspath(target), "both are folders", "Copy a folder with the tools of your system")
    return ref


def _into_registry(registry: Registry, source: StrPath, ref: Ref, workspace: Workspace) -> Version:
    """Store the source's manifest as a version of `ref`, or a new version if the source has no adapter.json."""
    # The registry's own policy applies to its names, whatever project the command runs in.
    if registry.policy is not None:
        registry.policy.check_name(ref.name)
    workspace = workspace.within(registry)
    with ExitStack() as stack:
        if (opened := open_version(stack, source, ref, workspace, registry)) is not None:
            origin, manifest = opened
            version = _copy_version(registry, origin, manifest.digest, ref, workspace)
            if source_names.is_address(source):
                # Stored with the version, so that the policy can verify them here as well.
                signatures = signature_checks.carried_signatures(origin, manifest, workspace)
                store_signatures(registry.store, manifest, signatures, workspace.rules(), ref.name)
            return version
    with (
        sources.open_source(source, replace(workspace, policy=None)) as opened_source,  # the policy is about the new name
        open_package(opened_source, workspace, name=ref.name) as package,
    ):
        return registry.publish(package, ref)


def open_version(
    stack: ExitStack, source: StrPath, ref: Ref, workspace: Workspace, registry: Registry | None
) -> tuple[Source, Manifest] | None:
    """Open what has the version that a copy to `ref` takes as it is, and return it with the manifest, which the policy allows.

    Returns:
        None for files that are to be packaged: those of a folder, or at an address without an adapter.json.
    """
    from adapterhub.remotes.local_name import LocalName
    from adapterhub.remotes.remote_address import parse

    if source_names.is_address(source):
        place = parse(os.fspath(source))
        remote = stack.enter_context(workspace.connect(place))
        manifest = remote.manifest(place.reference)
        if manifest.adapter_json is None:
            return None
        check_policy(remote, manifest.digest, VersionNames.of_address(place, os.fspath(source), into=ref.name), workspace)
        return remote, manifest
    source_ref = source_names.ref_of(source, workspace)
    if source_ref is None or registry is None:
        return None
    version = stack.enter_context(registry.lease_version(source_ref))
    local = LocalName(registry, version.name)
    check_policy(local, version.digest, VersionNames.of_version(version, str(version.ref), into=ref.name), workspace)
    return local, local.manifest(version.digest)


def _copy_version(registry: Registry, source: Source, digest: str, ref: Ref, workspace: Workspace) -> Version:
    """Copy a version into the registry as the policy allows, and return it."""
    from adapterhub.remotes import version_copy as copying
    from adapterhub.remotes.local_name import LocalName

    target = LocalName(registry, ref.name, workspace.rules())
    with target.lease_for_push(), workspace.bar("copying") as progress:
        copying.copy_version(source, digest, target, ref.tag, progress, **workspace.transfer())
    return target.version or registry.resolve(ref)
