"""The adapter that a text names: a path, a ref of the registry, or an address; never a guess between two.

Every command and function that takes a SRC uses this module; `base_sources` is the same for a BASE. `ref` parses refs, and
`registry.version_selection` picks a version for one. Bytes from a registry or an address are verified on the way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.adapter_files import is_pickle_name, is_weights
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.formats import added_format
from adapterhub_converters.lazy_dataclass import dataclass

from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.existing_folder import ExistingFolder
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.ref import Ref
    from adapterhub.registry.adapter_recipe import Conversion, ConversionFormat, ParentAdapter
    from adapterhub.remotes.protocol import Source as Remote

ADDRESSES = ("https://", "http://", "hf://")
"""Prefixes of the address of a base."""


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
def open_source(source: StrPath, workspace: Workspace, *, as_stored: bool = True) -> Iterator[Source]:
    """Yield the adapter that `source` names; copies from a registry are removed when the context ends.

    Args:
        source: A path, a ref or an address.
        workspace: The registry, and the credentials for an address.
        as_stored: Yield the `stored_form` of a path.

    Raises:
        NotFoundError: It is neither a path nor a ref of the registry.
        UsageError: It is both.
    """
    from adapterhub_converters.adapter_files import folder_for, resolve_adapter

    text = os.fspath(source)
    if is_address(source):
        from adapterhub.remotes.remote_address import parse

        with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
            address = parse(text)
            folder = Path(temporary) / address.title
            with workspace.connect(address) as remote:
                digest = download_version(remote, address.reference, folder, address.host, workspace)[0].digest
            with relabel_errors(folder, text):
                yield Source(resolve_adapter(folder), folder, text, text, digest)
        return
    path, ref = resolve(source, workspace)
    if ref is None:
        path = folder_for(existing_path(text) if path is None else path)
        with stored_form(path, text) if as_stored else nullcontext((path, None)) as (path, original_format):
            folder = path if path.is_dir() else path.parent
            yield Source(resolve_adapter(path), folder, text, original_format=original_format)
        return
    with workspace.open_registry() as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / ref.name.rpartition("/")[2]
        with workspace.bar("reading") as progress:
            version = registry.pull(ref, folder, progress)
        workspace.warn_if_deprecated(version.ref, version.deprecated)
        with relabel_errors(folder, str(version.ref)):
            yield Source(resolve_adapter(folder), folder, str(version.ref), str(version.ref), version.digest)


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

    ref = ref_of(source, workspace)
    if ref is None:
        with open_source(source, workspace, as_stored=False) as adapter_source:
            yield adapter_source.path
        return
    from adapterhub.store.export import linked_folder

    with (
        workspace.open_registry() as registry,
        registry.lease_version(ref) as version,
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
        error.where = error.where.replace(str(folder), name)
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

    if source.digest:
        return adapter_recipe.ParentAdapter(source.folder, source.path, source.digest, source.ref, weight)
    with as_folder(source) as folder:
        contents = folder_contents.read_folder(folder)
        draft = derive.draft_contents(contents)
        digest = oci_manifest.complete(contents.files, *draft.finalize(contents.files)).digest
    adapter = draft.inspected.complete_adapter
    return adapter_recipe.ParentAdapter(source.folder, source.path, digest, None, weight, adapter)


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


def is_address(source: StrPath) -> bool:
    """Return whether `source` is an address, such as `oci://…`; a `Path` never is."""
    if not isinstance(source, str):
        return False
    from adapterhub.remotes.remote_address import is_address

    return is_address(source)


def ref_of(source: StrPath, workspace: Workspace) -> Ref | None:
    """Return the ref that `source` is; None for a path or an address. Raises as `resolve` does."""
    return None if is_address(source) else resolve(source, workspace)[1]


def resolve(source: StrPath, workspace: Workspace) -> tuple[Path | None, Ref | None]:
    """Return the path or the ref that `source` is.

    Raises:
        UsageError: It is both, or an address.
        NotFoundError: It is neither.
    """
    from adapterhub.ref import Ref, intended_address

    text, path = os.fspath(source), Path(source)
    if is_address(source):
        raise UsageError(text, "an address, and this works on local adapters only", "Pull it, or copy it to the registry")
    # A broken link counts as a path: it is what the user named, and the error should say that it leads nowhere.
    exists = path.exists() or path.is_symlink()
    try:
        ref = Ref.parse(text)
    except UsageError as error:
        if exists:
            return path, None
        if ":" in text or "@" in text:
            raise
        hint = error.hint if intended_address(text) else "A ref is like team/sql:v2"
        raise NotFoundError(text, "no such file or folder, and not a ref either", hint, code="no-such-file") from error
    if not isinstance(source, str) or (exists and not _ref_exists(ref, workspace)):
        return path, None
    if not exists:
        return None, ref
    explicit_ref = f"{text}:latest" if str(ref) == ref.name else text
    hint = f"Write ./{text} for the path, {explicit_ref} for the adapter"
    raise UsageError(text, "both a path and an adapter in the registry", hint, code="ambiguous")


def is_stored(text: str, workspace: Workspace) -> bool:
    """Return whether the registry has the version that a ref names."""
    from adapterhub.ref import Ref

    return _ref_exists(Ref.parse(text), workspace)


def _ref_exists(ref: Ref, workspace: Workspace) -> bool:
    try:
        with workspace.open_registry() as registry:
            registry.resolve(ref)
    except AdapterhubError:
        return False
    return True


def existing_path(text: str) -> Path:
    """Return the path that `text` names. Raise NotFoundError if nothing is there, and UsageError for an address."""
    if text.lower().startswith(ADDRESSES):
        problem = "is not on this disk, and the weights are needed, not only headers"
        raise UsageError(text.partition("?")[0], problem, "Download it, and name the folder or file")
    path = Path(text)
    if not path.exists():
        raise NotFoundError(text, "no such file or folder", code="no-such-file")
    return path


def as_conversion(to: ConversionFormat | Conversion | None) -> Conversion | None:
    """Return the conversion to a format, with its default options; a `Conversion` as it is."""
    if not isinstance(to, str):
        return to
    from adapterhub.registry.adapter_recipe import Conversion

    return Conversion(to)


def local_base_path(base: StrPath | None) -> str | None:
    """Return the absolute path of a base on this machine; None for any other base."""
    return str(Path(base).resolve()) if base and Path(base).exists() else None
