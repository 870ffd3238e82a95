"""Opening the adapter that a text names (`source_names`), for use or for a report on it; `base_sources` does so for a BASE.

A version that is used meets the policy first, whatever it is used for: this is the one place that opens versions. Bytes from a
registry or an address are verified on the way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.adapter_files import ADAPTER_JSON, is_pickle_name, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, RefusedError, UsageError
from adapterhub_converters.formats import added_format
from adapterhub_converters.lazy_dataclass import dataclass

from . import source_names
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.existing_folder import ExistingFolder
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.ref import Ref
    from adapterhub.registry.adapter_recipe import Conversion, ConversionFormat, ParentAdapter
    from adapterhub.registry.registry import Registry, Version
    from adapterhub.remotes.protocol import Source as Remote


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to read.

    Attributes:
        path: The folder or file that a format reader takes.
        folder: The folder that contains it.
        location: The name that the user gave it.
        ref: Its ref or address, if it came from a registry.
        digest: The digest of its manifest, if it came from a registry.
        original_format: The format of another package that it was converted from; see `stored_form`.
    """

    path: Path
    folder: Path
    location: str
    ref: str | None = None
    digest: str | None = None
    original_format: str | None = None


@contextmanager
def open_source(source: StrPath, workspace: Workspace, *, as_stored: bool = True, for_report: bool = False) -> Iterator[Source]:
    """Yield the adapter that `source` names; copies from a registry are removed when the context ends.

    Args:
        source: A path, a ref or an address.
        workspace: The registry, the policy, and the credentials for an address.
        as_stored: Yield the `stored_form` of a path.
        for_report: Only report on it: a version that the policy refuses is opened too.

    Raises:
        NotFoundError: It is neither a path nor a ref of the registry.
        UsageError: It is both.
        RefusedError: The policy does not allow the version, or requires signatures that it lacks.
    """
    text = os.fspath(source)
    if source_names.is_address(source):
        adapter = _open_address(text, workspace, for_report=for_report)
    else:
        path, ref = source_names.resolve(source, workspace)
        if ref is None:
            adapter = _open_path(path, text, as_stored=as_stored)
        else:
            adapter = _open_version(ref, text, workspace, for_report=for_report)
    with adapter as opened:
        yield opened


@contextmanager
def _open_address(text: str, workspace: Workspace, *, for_report: bool) -> Iterator[Source]:
    """Download the version at an address, and yield the adapter in it."""
    from adapterhub.remotes.parallel_transfer import PinnedSource
    from adapterhub.remotes.remote_address import parse
    from adapterhub_converters.adapter_files import resolve_adapter

    from . import policy_checks  # of what comes from elsewhere; a folder needs neither rules nor signatures
    from .signature_checks import VersionNames

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        address = parse(text)
        folder = Path(temporary) / address.title
        if not for_report:
            workspace.check_name(address.repository)
        with workspace.connect(address) as remote:
            settled = PinnedSource(remote)
            if not for_report:
                policy_checks.check_policy(settled, address.reference, VersionNames.of_address(address, text), workspace)
            digest = download_version(settled, address.reference, folder, address.host, workspace)[0].digest
        with relabel_errors(folder, text):
            yield Source(resolve_adapter(folder), folder, text, text, digest)


@contextmanager
def _open_path(path: Path | None, text: str, *, as_stored: bool) -> Iterator[Source]:
    """Yield the adapter in a folder or a file; `path` is None if `text` names nothing that exists."""
    from adapterhub_converters.adapter_files import folder_for, resolve_adapter

    path = folder_for(source_names.existing_path(text) if path is None else path)
    with stored_form(path, text) if as_stored else nullcontext((path, None)) as (path, original_format):
        folder = path if path.is_dir() else path.parent
        yield Source(resolve_adapter(path), folder, text, original_format=original_format)


@contextmanager
def _open_version(ref: Ref, text: str, workspace: Workspace, *, for_report: bool) -> Iterator[Source]:
    """Copy a version out of the registry, and yield the adapter in it."""
    from adapterhub.store import export
    from adapterhub_converters.adapter_files import resolve_adapter

    from . import policy_checks

    with (
        _open_leased(ref, text, workspace) as (registry, version),
        tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary,
    ):
        folder = Path(temporary) / ref.name.rpartition("/")[2]
        if not for_report:
            policy_checks.check_use(registry, version, text, workspace)
        folder.mkdir()
        with workspace.bar("reading") as progress:
            export.export(registry.store, registry.files(version), folder, progress)
        workspace.warn_if_deprecated(version.ref, version.deprecated)
        with relabel_errors(folder, str(version.ref)):
            yield Source(resolve_adapter(folder), folder, str(version.ref), str(version.ref), version.digest)


@contextmanager
def _open_leased(ref: Ref, text: str, workspace: Workspace) -> Iterator[tuple[Registry, Version]]:
    """Yield the registry, and the version that a text names, whose blobs stay until the context ends."""
    with ExitStack() as stack:
        with source_names.no_path_either(text):
            registry = stack.enter_context(workspace.open_registry())
            version = stack.enter_context(registry.lease_version(ref))
        yield registry, version


@contextmanager
def stored_form(path: Path, location: str) -> Iterator[tuple[Path, str | None]]:
    """Yield `path`, or a temporary PEFT folder with the adapter if it is in a format of another package, and that format.

    A registry stores the built-in formats only, as what it stores must read the same everywhere.
    """
    row = added_format(path)
    if row is None:
        yield path, None
        return
    from adapterhub_converters.formats import convert  # needs numpy

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / path.stem
        with relabel_errors(folder, location):
            convert.convert(path, folder, to="peft")
            yield folder, row.name


@contextmanager
def open_in_place(source: StrPath, workspace: Workspace) -> Iterator[Path]:
    """Yield the path of an adapter whose headers are to be read: the blobs of a version are linked, not copied or verified."""
    from adapterhub_converters.adapter_files import resolve_adapter

    ref = source_names.ref_of(source, workspace)
    if ref is None:
        with open_source(source, workspace, as_stored=False, for_report=True) as adapter_source:
            yield adapter_source.path
        return
    from adapterhub.store.export import linked_folder

    with (
        _open_leased(ref, os.fspath(source), workspace) as (registry, version),
        linked_folder(registry.store, registry.files(version)) as folder,
        relabel_errors(folder, str(version.ref)),
    ):
        yield resolve_adapter(folder)


def download_version(
    remote: Remote, reference: str, folder: Path, host: str, workspace: Workspace, *, replace: bool = False
) -> tuple[Manifest, bool]:
    """Write a version of a remote into a folder. Return its manifest, and whether it was not there already.

    Another version that is there is replaced if it is unmodified, or with `replace`.
    """
    from adapterhub.remotes import adapter_folders
    from adapterhub.remotes.oci.adapter_image import UnpackedSource

    unchanged: list[bool] = []

    def replacing(present: ExistingFolder) -> None:
        if not replace:
            # A version that exists in the registry or on the remote can be pulled again, so nothing is lost.
            present.check_lost(partial(is_elsewhere, remote, workspace))
        workspace.tell(f"replaces {present}")

    with workspace.bar(f"pulling from {host}") as progress:
        manifest = adapter_folders.download(
            UnpackedSource(remote),
            reference,
            folder,
            progress,
            replacing=replacing,
            on_unchanged=lambda: unchanged.append(True),
            **workspace.transfer(),
        )
    if manifest.adapter_json is None:
        workspace.tell("there was no adapter.json: it was derived from the files")
    return manifest, not unchanged


def is_elsewhere(remote: Remote, workspace: Workspace, digest: Digest) -> bool:
    """Return whether the registry or a remote has a version, by its digest."""
    from adapterhub.remotes import adapter_folders

    return _is_stored(digest, workspace) or adapter_folders.has_version(remote, digest)


def _is_stored(digest: Digest, workspace: Workspace) -> bool:
    """Return whether the registry has a version."""
    try:
        with workspace.open_registry() as registry:
            return bool(registry.versions_with(digest))
    except AdapterhubError:
        return False


def check_apart(out: Path, source: Path) -> None:
    """Refuse an output that is its own source or contains it, because replacing it would remove the source."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(str(out), "is the source or contains it", "Choose another output")


@contextmanager
def relabel_errors(folder: Path, name: str) -> Iterator[None]:
    """Replace a temporary folder by `name` in the errors of the block: its path means nothing to their reader."""
    try:
        yield
    except AdapterhubError as error:
        error.rename(str(folder), name)
        raise


@contextmanager
def as_folder(source: Source) -> Iterator[Path]:
    """Yield a folder that contains the adapter and nothing else: its own, or a new one for a file among others.

    Raises:
        FormatError: A file is not an adapter.
        RefusedError: The file has a name that no reader of a folder takes for weights.
    """
    if not source.path.is_file() or source.ref or Path(source.location).is_dir():
        yield source.folder
        return
    if not (is_weights(source.path.name) or is_pickle_name(source.path.name)):
        from adapterhub_converters.formats import convert  # needs numpy

        problem = f"an adapter in the format {convert.sniff(source.path)}, whose name ends in neither .safetensors nor .gguf"
        raise RefusedError(source.location, problem, "Rename it, or convert it to PEFT")
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        link_or_copy(source.path, Path(temporary) / source.path.name)
        with relabel_errors(Path(temporary), str(source.folder)):
            yield Path(temporary)


def parent(source: Source, weight: float = 1.0) -> ParentAdapter:
    """Return the adapter as a parent of another, by the digest that pushing it would give."""
    from adapterhub.manifest import derive, folder_contents, oci_manifest
    from adapterhub.registry import adapter_recipe
    from adapterhub_converters.trained_prompt import TrainedPrompt

    if source.digest:
        return adapter_recipe.ParentAdapter(source.folder, source.path, source.digest, source.ref, weight)
    with as_folder(source) as folder:
        contents = folder_contents.read_folder(folder)
        draft = derive.draft_contents(contents)
        digest = oci_manifest.complete(contents.files, *draft.finalize(contents.files)).digest
    text, inspected = contents.manifest_text, draft.inspected
    record = json_file.parse_object(text, f"{source.folder}/{ADAPTER_JSON}") if text else None
    prompt = TrainedPrompt.read(source.path, record, inspected.gguf_header)
    return adapter_recipe.ParentAdapter(
        source.folder, source.path, digest, weight=weight, adapter=inspected.complete_adapter, prompt=prompt
    )


def initial_adapter(source: Source) -> tuple[Path, Path, Digest, str, str | None]:
    """Return the arguments of `training.InitialAdapter` for the adapter to continue a training from, or to evaluate."""
    as_parent = parent(source)
    return as_parent.path, as_parent.folder, as_parent.digest, source.location, as_parent.ref


def link_or_copy(path: Path, target: Path) -> None:
    """Put the same bytes under another name: as a hard link where the file system allows one, else as a copy."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def as_conversion(to: ConversionFormat | Conversion | None) -> Conversion | None:
    """Return the conversion to a format, with its default options; a `Conversion` as it is."""
    if not isinstance(to, str):
        return to
    from adapterhub.registry.adapter_recipe import Conversion

    return Conversion(to)
