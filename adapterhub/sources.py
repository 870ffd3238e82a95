"""The adapter that a text means: a path, a ref of the registry, or an address; never a guess between two.

Used by every command and function that takes a SRC; `base_sources` is the same for a BASE.
Bytes from a registry or an address are verified on the way.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.adapter_files import is_pickle_name, is_weights
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, UsageError

from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.manifest.present import Present
    from adapterhub.ref import Ref
    from adapterhub.registry.recipe import Parent
    from adapterhub.remotes.protocol import Source as Remote
    from adapterhub.training import InitialAdapter

ADDRESSES = ("https://", "http://", "hf://")
"""What the address of a base begins with."""


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to read.

    Attributes:
        path: What a format reader takes: a folder or a file.
        folder: The folder that contains it.
        where: The name that the user gave it.
        ref: Its ref or address, where it came from a registry.
        digest: The digest of its manifest, where it came from one.
    """

    path: Path
    folder: Path
    where: str
    ref: str | None = None
    digest: str | None = None


@contextmanager
def opened(source: StrPath, workspace: Workspace) -> Iterator[Source]:
    """The adapter that `source` names, until the context ends.

    Raises:
        NotFoundError: Neither a path nor a ref of the registry.
        UsageError: Both of them.
    """
    from adapterhub_converters.adapter_files import adapter_in, folder_for

    text = os.fspath(source)
    if is_address(source):
        from adapterhub.remotes.location import parse

        with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
            address = parse(text)
            folder = Path(temporary) / address.title
            with workspace.connect(address) as remote:
                digest = downloaded(remote, address.reference, folder, address.host, workspace)[0].digest
            with naming(folder, text):
                yield Source(adapter_in(folder), folder, text, text, digest)
        return
    path, ref = resolve(source, workspace)
    if ref is None:
        path = folder_for(existing(text) if path is None else path)
        yield Source(adapter_in(path), path if path.is_dir() else path.parent, text)
        return
    with workspace.opened() as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / ref.name.rpartition("/")[2]
        with workspace.bar("reading") as show:
            version = registry.pull(ref, folder, show)
        workspace.deprecated(version.ref, version.deprecated)
        with naming(folder, str(version.ref)):
            yield Source(adapter_in(folder), folder, str(version.ref), str(version.ref), version.digest)


@contextmanager
def in_place(source: StrPath, workspace: Workspace) -> Iterator[Path]:
    """A path or a version of the registry for a look at its headers: its blobs where they are, neither copied nor verified."""
    from adapterhub_converters.adapter_files import adapter_in

    ref = ref_of(source, workspace)
    if ref is None:
        with opened(source, workspace) as found:
            yield found.path
        return
    from adapterhub.store.export import linked

    with (
        workspace.opened() as registry,
        registry.reading(ref) as version,
        linked(registry.store, registry.files(version)) as folder,
        naming(folder, str(version.ref)),
    ):
        yield adapter_in(folder)


def downloaded(
    remote: Remote, reference: str, folder: Path, host: str, workspace: Workspace, *, replace: bool = False
) -> tuple[Manifest, bool]:
    """Write a version of a remote into a folder; its manifest, and whether it was not there already.

    Another version that is there is replaced if it is unmodified, or with `replace`.
    """
    from adapterhub.remotes import folders
    from adapterhub.remotes.oci.image import Unpacked

    there: list[bool] = []

    def replacing(present: Present) -> None:
        if not replace:
            present.check_lost(lambda digest: _stored(digest, workspace) or folders.has_version(remote, digest))
        workspace.tell(f"replaces {present}")

    with workspace.bar(f"pulling from {host}") as show:
        made = folders.download(
            Unpacked(remote),
            reference,
            folder,
            show,
            replacing=replacing,
            found=lambda: there.append(True),
            **workspace.transfer(),
        )
    if made.adapter_json is None:
        workspace.tell("there was no adapter.json: it was derived from the files")
    return made, not there


def _stored(digest: Digest, workspace: Workspace) -> bool:
    """Tell whether the registry has a version."""
    try:
        with workspace.opened() as registry:
            return bool(registry.holding(digest))
    except AdapterhubError:
        return False


def check_apart(out: Path, source: Path) -> None:
    """Refuse an output that is its own source or contains it: replacing the one would remove the other."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(str(out), "is the source or contains it", "Choose another output")


@contextmanager
def naming(folder: Path, name: str) -> Iterator[None]:
    """Have errors name `name` instead of a temporary folder, which means nothing to their reader."""
    try:
        yield
    except AdapterhubError as error:
        error.where = error.where.replace(str(folder), name)
        raise


@contextmanager
def as_folder(source: Source) -> Iterator[Path]:
    """A folder that contains the adapter and nothing else: its own, or a new one for a file among others.

    Raises:
        FormatError: A file is no adapter.
        RefusedError: It is one under a name that no file of weights has, by which nothing would find it in a folder.
    """
    if not source.path.is_file() or source.ref or Path(source.where).is_dir():
        yield source.folder
        return
    if not (is_weights(source.path.name) or is_pickle_name(source.path.name)):
        from adapterhub_converters.formats import convert  # needs numpy

        what = f"an adapter in the format {convert.sniff(source.path)}, whose name ends in neither .safetensors nor .gguf"
        raise RefusedError(source.where, what, "Rename it, or convert it to PEFT")
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        place(source.path, Path(temporary) / source.path.name)
        with naming(Path(temporary), str(source.folder)):
            yield Path(temporary)


def parent(source: Source, weight: float = 1.0) -> Parent:
    """The adapter as a parent of another, by the digest that a push of it has."""
    from adapterhub.manifest import oci_manifest
    from adapterhub.registry import recipe

    if source.digest:
        return recipe.Parent(source.folder, source.path, source.digest, source.ref, weight)
    with as_folder(source) as folder:
        digest = oci_manifest.build(folder).digest
    return recipe.Parent(source.folder, source.path, digest, None, weight)


def given(source: Source) -> InitialAdapter:
    """The adapter to continue a training from, or to evaluate."""
    from adapterhub.training import InitialAdapter

    made = parent(source)
    return InitialAdapter(made.path, made.folder, made.digest, source.where, made.ref)


def place(path: Path, target: Path) -> None:
    """Put the same bytes under another name: a hard link where the file system allows one."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def is_address(source: StrPath) -> bool:
    """Whether `source` is an address, such as `oci://…`; a `Path` never is."""
    if not isinstance(source, str):
        return False
    from adapterhub.remotes.location import is_address

    return is_address(source)


def ref_of(source: StrPath, workspace: Workspace) -> Ref | None:
    """The ref that `source` is, None for a path or an address; as `resolve`."""
    return None if is_address(source) else resolve(source, workspace)[1]


def resolve(source: StrPath, workspace: Workspace) -> tuple[Path | None, Ref | None]:
    """The path or the ref that `source` is; UsageError when it is both, NotFoundError when it is neither."""
    from adapterhub.ref import Ref, address_meant

    text, path = os.fspath(source), Path(source)
    if is_address(source):
        raise UsageError(text, "an address, and this works on local adapters only", "Pull it, or copy it to the registry")
    there = path.exists() or path.is_symlink()
    try:
        ref = Ref.parse(text)
    except UsageError as error:
        if there:
            return path, None
        if ":" in text or "@" in text:
            raise
        hint = error.hint if address_meant(text) else "A ref is like team/sql:v2"
        raise NotFoundError(text, "no such file or folder, and not a ref either", hint, code="no-such-file") from error
    if not isinstance(source, str) or (there and not _known(ref, workspace)):
        return path, None
    if not there:
        return None, ref
    plain = f"{text}:latest" if str(ref) == ref.name else text
    hint = f"Write ./{text} for the path, {plain} for the adapter"
    raise UsageError(text, "both a path and an adapter in the registry", hint, code="ambiguous")


def _known(ref: Ref, workspace: Workspace) -> bool:
    try:
        with workspace.opened() as registry:
            registry.resolve(ref)
    except AdapterhubError:
        return False
    return True


def existing(text: str) -> Path:
    """A path that must be there."""
    if text.lower().startswith(ADDRESSES):
        what = "is not on this disk, and the weights are needed, not only headers"
        raise UsageError(text.partition("?")[0], what, "Download it, and name the folder or file")
    path = Path(text)
    if not path.exists():
        raise NotFoundError(text, "no such file or folder", code="no-such-file")
    return path


def here(base: StrPath | None) -> str | None:
    """The absolute path of a base on this machine; None for any other."""
    return str(Path(base).resolve()) if base and Path(base).exists() else None
