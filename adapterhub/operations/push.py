"""The push of an adapter to the registry or to an address; everything stored passes `Registry.publish`.

A version that is pushed to an address keeps its digest. Its files are checked like those of a folder, because somebody else's
registry may contain anything.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.package_files import SIGNATURE
from adapterhub_converters.errors import ParameterError, RefusedError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, signature_checks, source_names, sources
from .policy_checks import check_policy, check_version
from .promotion_checks import check_tags_at
from .push_result import PushResult, push_result, stored_result, target_address
from .signature_checks import VersionNames
from .tag import tag
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.package_files import Selection
    from adapterhub.ref import Ref
    from adapterhub.registry.adapter_recipe import Conversion, ConversionFormat
    from adapterhub.registry.packaging import Package
    from adapterhub.registry.registry import Version
    from adapterhub.remotes.protocol import OpenRemote, Source
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub_converters.bases import BaseSpec

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
    spec, conversion = base_sources.base_spec(base, workspace), sources.as_conversion(to)
    from adapterhub.manifest import measurement

    measured = measurement.reported_evaluation(metrics, target) if metrics else None
    if source_names.is_address(target):
        return _push_to_address(
            source,
            target,
            workspace,
            base=spec,
            conversion=conversion,
            expect=expect,
            force=force,
            private=private,
            name=name,
            selection=selection,
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
            base=spec,
            conversion=conversion,
            force=force,
            name=ref.name,
            selection=selection,
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

    package = packaging.package(folder, location=str(ref), policy=workspace.rules())
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


@contextmanager
def open_package(
    source: sources.Source,
    workspace: Workspace,
    *,
    name: str,
    base: BaseSpec | None = None,
    conversion: Conversion | None = None,
    force: bool = False,
    hash_below: int = 0,
    selection: Selection | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Iterator[Package]:
    """Yield the checked package of an adapter or of its conversion; `name` is the name of a converted file."""
    from adapterhub.registry import packaging

    if source.original_format:
        workspace.tell(f"{source.location} is in {source.original_format}, a format of another package: what is stored is PEFT")
    if conversion is None:
        with sources.as_folder(source) as folder:
            yield packaging.package(
                folder,
                location=source.location,
                base=base,
                policy=workspace.rules(),
                force=force,
                hash_below=hash_below,
                selection=selection,
                metrics=metrics,
            )
        return
    from adapterhub.registry import adapter_recipe

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "adapter"
        convert = partial(
            adapter_recipe.convert, sources.parent(source), folder, conversion, name=name.rpartition("/")[2], base=base
        )
        # The source is checked before it is converted: a conversion could hide what is wrong with it.
        overridden = packaging.check_adapter(source.path, location=source.location, base=base, force=force, try_storing=convert)
        convert()
        package = packaging.package(
            folder, location=source.location, base=base, policy=workspace.rules(), already_checked=True, metrics=metrics
        )
        yield replace(package, overridden=overridden)


def _push_to_address(
    source: StrPath,
    target: str,
    workspace: Workspace,
    *,
    base: BaseSpec | None,
    conversion: Conversion | None,
    expect: Digest | None,
    force: bool,
    private: bool,
    name: str | None,
    selection: Selection | None,
    message: str,
    metrics: Mapping[str, float],
    tags: Sequence[str],
) -> PushResult:
    """Push an adapter to an address, as it is stored, as a new version, or as a container image."""
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
            address=address,
            name=name,
            base=base,
            conversion=conversion,
            force=force,
            selection=selection,
            tags=tags,
            early_upload=early_upload if remote.as_unnamed_target() else None,
        )
        version_source, reference = outgoing.source, outgoing.reference
        manifest, attached = version_source.manifest(reference), 0
        signatures = [*outgoing.signatures, *signature_checks.carried_signatures(version_source, manifest, workspace)]
        # Attached before the version where possible, because a policy there may ask for signatures; not every registry allows
        # it.
        with suppress(RemoteError, RefusedError):
            attached = signature_checks.carry(remote, manifest, signatures)
        with workspace.bar(f"copying to {address.host}") as progress:
            copied = copying.copy_version(
                version_source, reference, remote, address.reference, progress, **workspace.transfer()
            )
        attached = attached or signature_checks.carry(remote, manifest, signatures)
        if signatures and not attached and not outgoing.is_image:
            workspace.tell(
                _STALE_SIGNATURE
                if remote.as_referring_target()
                else f"{remote.kind} has no attachments, so the signatures stay behind"
            )
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


@dataclass(frozen=True)
class OutgoingVersion:
    """What a push to an address sends: a checked version of `source`, with `reference` as its name there.

    Attributes:
        signatures: The signatures that came with a folder, unverified.
        skipped: Names in the folder that are left out.
        overridden: Codes of the errors of its check that `force` accepted.
        is_image: Whether it is a container image.
    """

    source: Source
    reference: str
    signatures: tuple[bytes, ...] = ()
    skipped: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()
    is_image: bool = False


def outgoing_version(
    stack: ExitStack,
    source: StrPath,
    workspace: Workspace,
    *,
    address: RemoteAddress,
    name: str | None,
    base: BaseSpec | None,
    conversion: Conversion | None,
    force: bool,
    selection: Selection | None,
    tags: Sequence[str] = (),
    early_upload: EarlyUpload | None = None,
) -> OutgoingVersion:
    """Open and check what a push to `address` sends; `stack` closes it. The arguments are those of `push`.

    Args:
        stack: Closes what is opened.
        early_upload: Sends large files while they are hashed; None to hash every file first, and to send nothing.
    """
    from adapterhub.ref import LATEST
    from adapterhub.remotes.adapter_folders import MIN_SENT_AHEAD, AdapterFolder

    as_image = conversion is not None and conversion.to == "image"
    conversion = None if as_image else conversion
    if base is None and conversion is None and (checked_version := _checked_version(source, workspace, stack, force=force)):
        version_source, reference, overridden = checked_version
        outgoing = OutgoingVersion(version_source, reference, overridden=overridden)
    else:
        opened_source = stack.enter_context(sources.open_source(source, replace(workspace, policy=None)))
        # Not for an image, whose layers are not the files of the folder.
        early_upload = None if as_image else early_upload
        package = stack.enter_context(
            open_package(
                opened_source,
                workspace,
                name=address.title,
                base=base,
                conversion=conversion,
                force=force,
                hash_below=MIN_SENT_AHEAD if early_upload else sys.maxsize,
                selection=selection,
            )
        )
        folder = AdapterFolder(package.folder, opened_source.location, early_upload, package.draft)
        overridden = tuple(problem.code for problem in package.overridden)
        outgoing = OutgoingVersion(folder, LATEST, package.signatures, folder.skipped, overridden)
    check_tags_at(address, [address.reference, *tags], outgoing.source.manifest(outgoing.reference).digest, workspace)
    if as_image:
        from adapterhub.remotes.oci.adapter_image import AdapterImage

        image = AdapterImage(outgoing.source, outgoing.reference)
        outgoing = replace(outgoing, source=image, reference=LATEST, is_image=True)
    names = replace(VersionNames.of_address(address, os.fspath(source), name), origin="")
    signature_checks.require(outgoing.source, outgoing.reference, names, workspace, supplied=outgoing.signatures)
    return outgoing


def _checked_version(
    source: StrPath, workspace: Workspace, stack: ExitStack, *, force: bool
) -> tuple[Source, str, tuple[str, ...]] | None:
    """Return a version to copy as it is, checked, with its digest and the errors that `force` accepted; None for a path."""
    from adapterhub.remotes.local_name import LocalName
    from adapterhub.remotes.remote_address import parse

    if source_names.is_address(source):
        place = parse(os.fspath(source))
        remote = stack.enter_context(workspace.connect(place))
        checked_source, overridden = stack.enter_context(
            _fetch_checked(remote, place, os.fspath(source), workspace, force=force)
        )
        return checked_source, place.reference, overridden
    ref = source_names.ref_of(source, workspace)
    if ref is None:
        return None
    registry = stack.enter_context(workspace.open_registry())
    version = stack.enter_context(registry.lease_version(ref))
    workspace.warn_if_deprecated(version.ref, version.deprecated)
    check_version(
        registry, version, VersionNames.of_version(version, str(version.ref)), replace(workspace, policy=registry.policy)
    )
    local = LocalName(registry, version.name, workspace.rules())
    return local, version.digest, local.check_version(local.manifest(version.digest), str(version.ref), force=force)


@contextmanager
def _fetch_checked(
    remote: OpenRemote, place: RemoteAddress, location: str, workspace: Workspace, *, force: bool
) -> Iterator[tuple[Source, tuple[str, ...]]]:
    """Yield a remote whose version has been fetched and checked; its blobs are read from disk unless they can be mounted."""
    from adapterhub.registry import packaging
    from adapterhub.remotes.parallel_transfer import DownloadedSource, PinnedSource
    from adapterhub_converters.adapter_files import resolve_adapter

    # What is checked here must be what is copied later, even if the tag moves in between.
    settled = PinnedSource(remote)
    check_policy(settled, place.reference, VersionNames.of_address(place, location), workspace)
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / place.title
        manifest, _ = sources.download_version(settled, place.reference, folder, place.host, workspace)
        with sources.relabel_errors(folder, location):
            errors = packaging.check_adapter(resolve_adapter(folder), location=location, force=force)
        yield DownloadedSource(settled, folder, manifest), tuple(problem.code for problem in errors)


class EarlyUpload:
    """An early upload of large files, sent while they are hashed.

    It is used with a remote that takes blobs before their digest is known and surely has none of them.
    """

    def __init__(self, remote: OpenRemote, host: str, workspace: Workspace) -> None:
        self._remote, self._host, self._workspace = remote.as_unnamed_target(), host, workspace
        self._is_new_repository: bool | None = None if self._remote else False
        self.sent = 0

    def __call__(self, path: str, size: int, source: Source) -> Digest | None:
        """Send a file and return its digest; None if it has to be hashed first."""
        from adapterhub.manifest.oci_manifest import Descriptor
        from adapterhub.remotes.parallel_transfer import RateLimit, Transfer

        remote = self._remote
        if remote and self._is_new_repository is None:
            self._is_new_repository = remote.is_new()
        if not remote or not self._is_new_repository:
            return None
        with self._workspace.bar(f"copying to {self._host}") as progress:
            move = Transfer([Descriptor("", "", size, path)], progress, pace=RateLimit(self._workspace.rate))
            digest = remote.put_unnamed(size, path, move.watch(source))
        self.sent += size
        return digest
