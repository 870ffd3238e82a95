"""What a push sends: a checked package of a folder or of a conversion, or a version that is copied as it is."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.card import with_card
from adapterhub_converters.lazy_dataclass import dataclass

from . import signature_checks, source_names, sources
from .policy_checks import check_policy, check_version, parent_reader
from .promotion_checks import check_tags_at
from .signature_checks import VersionNames
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.derive import Draft
    from adapterhub.manifest.package_files import Selection
    from adapterhub.registry.adapter_recipe import Conversion
    from adapterhub.registry.packaging import Package
    from adapterhub.remotes.protocol import OpenRemote, Source
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub_converters.bases import BaseSpec

_NO_LICENSE = (
    "no license is recorded, so that nobody knows who may use it: set one in README.md, or under [card] of the training"
)
_LOCAL_BASE = (
    "is recorded as the name of its base on the Hub, and is a folder here: set base_model_name_or_path in adapter_config.json "
    "to the name of the model"
)
_NO_BASE = "no base is recorded by name, so that every command needs it as an option: set base_model in README.md"


@dataclass(frozen=True)
class PackageOptions:
    """How an adapter is checked and packaged.

    Attributes:
        base: The model it was trained on, to pin.
        conversion: Convert it first.
        force: Accept errors of its check.
        selection: Patterns of files of a folder to package and to leave out.
        attestations: Bundles with claims about the version that is made, which a policy may require.
    """

    base: BaseSpec | None = None
    conversion: Conversion | None = None
    force: bool = False
    selection: Selection | None = None
    attestations: tuple[bytes, ...] = ()


_AS_IT_IS = PackageOptions()


@contextmanager
def open_package(
    source: sources.Source,
    workspace: Workspace,
    options: PackageOptions = _AS_IT_IS,
    *,
    name: str,
    hash_below: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> Iterator[Package]:
    """Yield the checked package of an adapter or of its conversion; `name` is the name of a converted file."""
    from adapterhub.registry import packaging

    if source.original_format:
        workspace.tell(f"{source.location} is in {source.original_format}, a format of another package: what is stored is PEFT")
    if options.conversion is None:
        with sources.as_folder(source) as folder:
            package = packaging.package(
                folder,
                location=source.location,
                base=options.base,
                policy=workspace.rules(),
                force=options.force,
                hash_below=hash_below,
                selection=options.selection,
                metrics=metrics,
                read_parent=parent_reader(workspace),
            )
            _tell_what_is_missing(package.draft, source.location, workspace)
            yield replace(package, signatures=(*package.signatures, *options.attestations))
        return
    from adapterhub.registry import adapter_recipe

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "adapter"
        convert = partial(
            adapter_recipe.convert,
            sources.parent(source),
            folder,
            options.conversion,
            name=name.rpartition("/")[2],
            base=options.base,
        )
        # The source is checked before it is converted: a conversion could hide what is wrong with it.
        overridden = packaging.check_adapter(
            source.path, location=source.location, base=options.base, force=options.force, try_storing=convert
        )
        convert()
        package = packaging.package(
            folder,
            location=source.location,
            base=options.base,
            policy=workspace.rules(),
            already_checked=True,
            metrics=metrics,
            read_parent=parent_reader(workspace),
        )
        yield replace(package, overridden=overridden)


def _tell_what_is_missing(draft: Draft, location: str, workspace: Workspace) -> None:
    """Note what others would miss: a base that they can find, and the license of what was trained here.

    A config without any base may be meant; one with a path, as trl writes it, has a base that others cannot find.
    """
    recorded, base = draft.recorded, draft.base_repo()
    if base is not None and source_names.local_base_path(base):
        workspace.tell(f"{location}: {base} {_LOCAL_BASE}")
    if recorded and recorded.training and with_card(recorded, draft.card).license is None:
        workspace.tell(f"{location}: {_NO_LICENSE}")
    if base is None and (draft.inspected.adapter.meta.base_model or (recorded and recorded.training)):
        workspace.tell(f"{location}: {_NO_BASE}")


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
    options: PackageOptions,
    *,
    address: RemoteAddress,
    name: str | None,
    tags: Sequence[str] = (),
    early_upload: EarlyUpload | None = None,
) -> OutgoingVersion:
    """Open and check what a push to `address` sends; `stack` closes it. The arguments are those of `push`.

    Args:
        stack: Closes what is opened.
        early_upload: Sends large files while they are hashed; None to hash every file first, and to send nothing.
    """
    from adapterhub.ref import LATEST
    from adapterhub.remotes.adapter_folders import MIN_SENT_AHEAD, AdapterFolder, HashingAhead

    as_image = options.conversion is not None and options.conversion.to == "image"
    options = replace(options, conversion=None) if as_image else options
    is_copied = options.base is None and options.conversion is None
    if is_copied and (checked_version := _checked_version(source, workspace, stack, force=options.force)):
        version_source, reference, overridden = checked_version
        outgoing = OutgoingVersion(version_source, reference, overridden=overridden)
    else:
        opened_source = stack.enter_context(sources.open_source(source, replace(workspace, policy=None)))
        # Not for an image, whose layers are not the files of the folder.
        early_upload = None if as_image else early_upload
        ahead = None
        if early_upload and options.conversion is None and opened_source.path.is_dir():
            ahead = stack.enter_context(HashingAhead(opened_source.path, lambda: not early_upload.takes_files))
        package = stack.enter_context(
            open_package(
                opened_source,
                workspace,
                options,
                name=address.title,
                hash_below=MIN_SENT_AHEAD if early_upload else sys.maxsize,
            )
        )
        folder = AdapterFolder(package.folder, opened_source.location, early_upload, package.draft, ahead)
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

    @property
    def takes_files(self) -> bool:
        """Whether files are sent before their digest is known; the remote is asked once."""
        if self._remote and self._is_new_repository is None:
            self._is_new_repository = self._remote.is_new()
        return bool(self._is_new_repository)

    def __call__(self, path: str, size: int, source: Source) -> Digest | None:
        """Send a file and return its digest; None if it has to be hashed first."""
        from adapterhub.manifest.oci_manifest import Descriptor
        from adapterhub.remotes.parallel_transfer import RateLimit, Transfer

        remote = self._remote
        if remote is None or not self.takes_files:
            return None
        with self._workspace.bar(f"copying to {self._host}") as progress:
            move = Transfer([Descriptor("", "", size, path)], progress, pace=RateLimit(self._workspace.rate))
            digest = remote.put_unnamed(size, path, move.watch(source))
        self.sent += size
        return digest
