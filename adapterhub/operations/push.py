"""The push of an adapter to the registry or to an address; everything stored passes `Registry.publish`.

A version that is pushed to an address keeps its digest. Its files are checked like those of a folder, because somebody else's
registry may contain anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.package_files import SIGNATURE
from adapterhub_converters.errors import ParameterError, RefusedError, RemoteError

from . import base_sources, signature_checks, source_names, sources
from .outgoing_version import EarlyUpload, PackageOptions, open_package, outgoing_version
from .policy_checks import parent_reader
from .push_result import PushResult, push_result, stored_result, target_address
from .tag import tag
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.package_files import Selection
    from adapterhub.ref import Ref
    from adapterhub.registry.adapter_recipe import Conversion, ConversionFormat
    from adapterhub.registry.registry import Version

_STALE_SIGNATURE = f"{SIGNATURE} is not about the files of this version, and was left out; sign the version itself"


def check_target(target: str, workspace: Workspace) -> None:
    """Refuse a ref or an address that cannot be pushed to, or that the policy forbids, before any work is done."""
    if source_names.is_address(target):
        target_address(target, workspace)
    else:
        pushable_ref(target, workspace)


def push(
    source: StrPath,
    target: str,
    *,
    base: base_sources.Base | None = None,
    to: ConversionFormat | Conversion | None = None,
    expect: str | None = None,
    force: bool = False,
    private: bool = False,
    name: str | None = None,
    selection: Selection | None = None,
    message: str = "",
    tags: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    attestations: Sequence[bytes] = (),
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> PushResult:
    """Check an adapter and store it as a new version, in the registry or at an address.

    Args:
        source: A folder, a file, a ref or an address.
        target: A ref, `namespace/name[:tag]`, or an address such as `oci://HOST/NAME[:TAG]` or `hf://ORG/NAME[@BRANCH]`.
        base: The model it was trained on, to pin; refused where the adapter does not fit it.
        to: Convert it to this format first, and name the source as its parent; `image`, at an address, for a container image.
            A `Conversion` also has the options of the format.
        expect: The digest that the target must still have, or `absent`.
        force: Store an adapter whose check finds errors. A policy cannot be overridden.
        private: Create a repository on a hub as private.
        name: The name of the target on a remote, which the policy checks in place of the address.
        selection: Patterns of files of a folder to package and to leave out.
        message: The reason, for the log of the name or the commit on a hub.
        tags: More tags that move to the version.
        metrics: Results of other programs, by name; registries and hubs of adapterhub record them.
        attestations: Bundles with claims about the version that a push of this folder makes, which a policy may require.
        progress: Called with bytes done and bytes in all.
        workspace: The registry, the policy, credentials.

    Raises:
        RefusedError: The check finds errors, or the policy of the project does not allow the adapter. Nothing was stored.
        ConflictError: The target is not at `expect`.

    Example:
        >>> ah.push("./sql", "team/sql:prod").ref
        'team/sql:v1'
        >>> ah.push("./sql", "layout://sql.tar:v1").tag
        'v1'
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    conversion = sources.as_conversion(to)
    options = PackageOptions(base_sources.base_spec(base, workspace), conversion, force, selection, tuple(attestations))
    from adapterhub.manifest import measurement

    measured = measurement.reported_evaluation(metrics, target) if metrics else None
    if source_names.is_address(target):
        return _push_to_address(
            source,
            target,
            workspace,
            options,
            expect=expect,
            private=private,
            name=name,
            message=message,
            metrics=measured.metrics if measured else {},
            tags=tags,
        )
    if conversion is not None and conversion.to == "image":
        raise ParameterError("conversion", "an image is for remotes; versions in the registry are files", code="image-here")
    if private:
        raise ParameterError("private", "only a repository on a hub, hf://ORG/NAME, can be private", "Leave it out")
    ref = pushable_ref(target, workspace)
    with (
        sources.open_source(source, replace(workspace, policy=None)) as opened_source,  # the policy is about the new name
        open_package(
            opened_source,
            workspace,
            options,
            name=ref.name,
            metrics=measured.searchable_metrics if measured else None,
        ) as package,
        workspace.open_registry(create=True) as registry,
        workspace.bar("storing") as advance,
    ):
        version = registry.publish(package, ref, expect=expect, progress=advance, message=message, tags=tags)
        if measured:
            from adapterhub.registry import measurement_log

            measurement_log.record(registry, version.ref, measured)
        # `publish` stores only a signature that is about these files.
        if package.signatures and not registry.store.signatures.read(version.digest, 0):
            workspace.tell(_STALE_SIGNATURE)
        return stored_result(version)


def store(folder: Path, ref: Ref, workspace: Workspace) -> Version:
    """Check an adapter that was created in a temporary folder, and store it; errors name the ref."""
    from adapterhub.registry import packaging

    package = packaging.package(folder, location=str(ref), policy=workspace.rules(), read_parent=parent_reader(workspace))
    with workspace.open_registry(create=True) as registry:
        return registry.publish(package, ref)


def pushable_ref(target: str, workspace: Workspace) -> Ref:
    """Parse a ref that can be pushed to."""
    from adapterhub.ref import Ref
    from adapterhub.registry.moves import check_pushable

    ref = Ref.parse(target)
    check_pushable(ref)
    workspace.check_name(ref.name)
    return ref


def _push_to_address(
    source: StrPath,
    target: str,
    workspace: Workspace,
    options: PackageOptions,
    *,
    expect: Digest | None,
    private: bool,
    name: str | None,
    message: str,
    metrics: Mapping[str, float],
    tags: Sequence[str],
) -> PushResult:
    """Push an adapter to an address, as it is stored, as a new version, or as a container image."""
    from adapterhub.remotes import attached_signatures
    from adapterhub.remotes import version_copy as copying
    from adapterhub.remotes.remote_address import expect_digest

    address = target_address(target, workspace, name)
    with ExitStack() as stack:
        remote = stack.enter_context(workspace.connect(address))
        # Compare-and-swap: the write fails if the tag has moved since the caller looked.
        expect_digest(remote, expect)
        if private:
            remote.make_private()
        if message:
            remote.annotate(message)
        if metrics:
            remote.record_metrics(metrics)
        is_tagged = remote.tag_too(tags)
        # Such a remote takes files before their digest is known, so large ones are hashed while they are sent.
        early_upload = EarlyUpload(remote, address.host, workspace)
        outgoing = outgoing_version(
            stack,
            source,
            workspace,
            options,
            address=address,
            name=name,
            tags=tags,
            early_upload=early_upload if remote.as_unnamed_target() else None,
        )
        version_source, reference = outgoing.source, outgoing.reference
        manifest, attached = version_source.manifest(reference), 0
        remote.check_push(manifest, address.reference)
        signatures = [*outgoing.signatures, *signature_checks.carried_signatures(version_source, manifest, workspace)]
        # Attached before the version where possible, because a policy there may ask for signatures; not every registry allows
        # it.
        if remote.as_referring_target() is not None:
            with suppress(RemoteError, RefusedError):
                attached = attached_signatures.attach_all(remote, manifest, signatures)
        with workspace.bar(f"copying to {address.host}") as progress:
            copied = copying.copy_version(
                version_source, reference, remote, address.reference, progress, **workspace.transfer()
            )
        attached = attached or attached_signatures.attach_all(remote, manifest, signatures)
        if signatures and not attached and not outgoing.is_image:
            workspace.tell(
                _STALE_SIGNATURE
                if remote.as_referring_target()
                else f"{remote.kind} has no attachments, so the signatures stay behind"
            )
        elif 0 < attached < len(signatures) and remote.as_referring_target() is None:
            others = len(signatures) - attached
            behind = "one other claim stays" if others == 1 else f"{others} other claims stay"
            workspace.tell(f"{remote.kind} keeps one {SIGNATURE} and no attachments, so {behind} behind")
    result = replace(
        push_result(address, copied, remote, workspace),
        sent=copied.sent + early_upload.sent,
        skipped=outgoing.skipped,
        overridden=outgoing.overridden,
    )
    # Another place takes one tag per copy, so that further tags are set afterwards.
    for extra_tag in () if is_tagged else tags:
        result = replace(result, moved=tag(result.ref, extra_tag, workspace).moved or result.moved)
    return result
