"""What a command's SRC means: a path that is there, or a ref; never a guess between the two."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError

from . import output, remotes
from .environment import hub, open_registry
from .options import Settings

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub.registry.recipe import Parent
    from adapterhub.train import InitialAdapter
    from adapterhub_converters.bases import BaseSpec


_ADDRESSES = ("https://", "http://", "hf://")
_EXPLICIT = "base:"  # before a name, where a path of that name is there too


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to read.

    `path` is what a format reader takes, `folder` what holds it, `where` what its user called it; `ref` and `digest` are set
    when it came from a registry.
    """

    path: Path
    folder: Path
    where: str
    ref: str | None = None
    digest: str | None = None


@contextmanager
def opened(text: str, settings: Settings) -> Iterator[Source]:
    """The adapter that `text` names, until the context ends; bytes from a registry are verified on the way."""
    from adapterhub.remotes.location import is_address
    from adapterhub_converters.adapter_files import adapter_in

    if is_address(text):
        with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
            folder, digest = remotes.fetch(text, Path(temporary))
            with naming(folder, text):
                yield Source(adapter_in(folder), folder, text, text, digest)
        return
    path, ref = resolve(text, settings)
    if ref is None:
        path = existing(text) if path is None else path
        yield Source(adapter_in(path), path if path.is_dir() else path.parent, text)
        return

    with open_registry(settings) as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / ref.name.rpartition("/")[2]
        version = registry.pull(ref, folder)
        output.deprecated(str(version.ref), version.deprecated)
        with naming(folder, str(version.ref)):
            yield Source(adapter_in(folder), folder, str(version.ref), str(version.ref), version.digest)


@contextmanager
def naming(folder: Path, name: str) -> Iterator[None]:
    """Errors say `name` for a temporary folder, which means nothing to whoever reads them."""
    try:
        yield
    except AdapterhubError as error:
        error.where = error.where.replace(str(folder), name)
        raise


@contextmanager
def as_folder(source: Source) -> Iterator[Path]:
    """A folder that holds the adapter and nothing else: its own, or a new one for a file that lies among others."""
    if not source.path.is_file() or source.ref or Path(source.where).is_dir():
        yield source.folder
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        place(source.path, Path(temporary) / source.path.name)
        yield Path(temporary)


def parent(source: Source, weight: float = 1.0) -> Parent:
    """What another adapter is made from, by the digest that a push of it has."""
    from adapterhub.manifest import oci_manifest
    from adapterhub.registry import recipe

    if source.digest:
        return recipe.Parent(source.folder, source.path, source.digest, source.ref, weight)
    with as_folder(source) as folder:
        digest = oci_manifest.build(folder).digest
    return recipe.Parent(source.folder, source.path, digest, None, weight)


def given(source: Source) -> InitialAdapter:
    """What a training starts from or an evaluation measures."""
    from adapterhub.train import InitialAdapter

    made = parent(source)
    return InitialAdapter(made.path, made.folder, made.digest, source.where, made.ref)


def place(path: Path, target: Path) -> None:
    """The same bytes under another name: a link where the file system allows one."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def is_elsewhere(text: str) -> bool:
    """Whether `text` is an address."""
    from adapterhub.remotes.location import is_address

    return is_address(text)


def ref_of(text: str, settings: Settings) -> Ref | None:
    """The ref that `text` is, None for a path or an address; as `resolve`."""
    return None if is_elsewhere(text) else resolve(text, settings)[1]


def resolve(text: str, settings: Settings) -> tuple[Path | None, Ref | None]:
    """The path or the ref that `text` is; UsageError when it is both, NotFoundError when it is neither."""
    from adapterhub.ref import Ref
    from adapterhub.remotes.location import is_address

    if is_address(text):
        raise UsageError(text, "is elsewhere, and this command looks at what is here", "Pull it, or copy it to the registry")
    path = Path(text)
    there = path.exists() or path.is_symlink()
    try:
        ref = Ref.parse(text)
    except UsageError as error:
        if there:
            return path, None
        if ":" in text or "@" in text:
            raise
        raise NotFoundError(text, "no such file or folder, and not a ref either", "A ref is like team/sql:v2") from error
    if not there:
        return None, ref
    if _known(ref, settings):
        plain = f"{text}:latest" if str(ref) == ref.name else text
        hint = f"Write ./{text} for the path, {plain} for the adapter"
        raise UsageError(text, "both a path and an adapter in the registry", hint)
    return path, None


def _known(ref: Ref, settings: Settings) -> bool:
    try:
        with open_registry(settings) as registry:
            registry.resolve(ref)
    except AdapterhubError:
        return False
    return True


def existing(text: str) -> Path:
    """A path that must be there."""
    if text.lower().startswith(_ADDRESSES):
        hint = "Download it, and name the folder or file"
        raise UsageError(text.partition("?")[0], "is not on this disk, and the weights are needed, not only headers", hint)
    path = Path(text)
    if not path.exists():
        raise NotFoundError(text, "no such file or folder")
    return path


def weights(text: str, settings: Settings) -> Path:
    """A model on this disk by its folder, a file of that, or a GGUF file, for what needs more of it than headers."""
    try:
        path = existing(text)
    except NotFoundError as error:
        if base_name(text, settings) is None:
            raise
        what = "a base in the registry, which knows its headers only, and the weights are needed"
        raise NotFoundError(text, what, "Name its folder or file") from error
    return path.parent if path.is_file() and path.suffix in (".safetensors", ".json") else path


def read_base(text: str, settings: Settings, *, notes: bool = True) -> BaseSpec:
    """The base model that `--base` names, seen from its headers; what of it is not known is said unless `notes` is off.

    An address, a path that is there, or the name of a base in the registry; what is both of the latter is a UsageError.
    """
    spec = _read_base(text, settings)
    if spec.fetched is not None:
        of = f" of {output.size(spec.size)}" if spec.size else ""
        output.say(f"read {output.size(spec.fetched)}{of} by range")
    for note in spec.notes if notes else ():
        output.say(output.one_line(f"note: {note} ({spec.where})"))
    return spec


def base_name(text: str, settings: Settings) -> str | None:
    """The name of the base in the registry that `text` is; None for a path or an address, UsageError when it is two things."""
    from adapterhub.store.named_documents import parse_document_name

    if text.lower().startswith(_ADDRESSES):
        return None
    explicit = text.startswith(_EXPLICIT)
    name = text.removeprefix(_EXPLICIT)
    path = Path(text)
    there = path.exists() or path.is_symlink()
    try:
        parse_document_name(name, text)
    except UsageError:
        if explicit and not there:
            raise
        return None
    if explicit and not there:
        return name
    if not _known_base(name, settings, there=there):
        return None
    if there:
        raise UsageError(
            text, "both a path and a base in the registry", f"Write ./{text} for the path, {_EXPLICIT}{name} for the base"
        )
    return name


def _known_base(name: str, settings: Settings, *, there: bool) -> bool:
    from adapterhub.store import named_documents

    try:
        with open_registry(settings) as registry:
            return named_documents.current(registry.store, name).there
    except AdapterhubError as error:
        if there or isinstance(error, NotFoundError):  # a registry that is broken is no matter of a path's
            return False
        raise


def _read_base(text: str, settings: Settings) -> BaseSpec:
    if text.lower().startswith(_ADDRESSES):
        from adapterhub.bases.remote import read_url

        return read_url(text, hub())
    name = base_name(text, settings)
    if name is not None:
        from adapterhub.bases import registered

        with open_registry(settings) as registry:
            return registered.get(registry, name).spec
    from adapterhub_converters import bases

    path = Path(text)
    if not path.exists() and not path.is_symlink():
        on_hub = f"Write hf://{text} for one on the Hub" if text.count("/") == 1 and not text.startswith((".", "/")) else ""
        hint = on_hub or "`adapterhub base list` says which names there are"
        raise NotFoundError(text, "no such file or folder, and no base of this name", hint)
    return bases.read_base(path)


def here(base: str | None) -> str | None:
    """Where a base lies on this machine; None of one that doesn't."""
    return str(Path(base).resolve()) if base and Path(base).exists() else None
