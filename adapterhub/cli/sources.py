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

from . import output
from .app import Settings
from .locate import open_registry

if TYPE_CHECKING:
    from adapterhub.ref import Ref
    from adapterhub_converters.base import BaseSpec


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
    path, ref = resolve(text, settings)
    if ref is None:
        path = existing(text) if path is None else path
        yield Source(adapter_path(path), path if path.is_dir() else path.parent, text)
        return
    from adapterhub import transfer

    with open_registry(settings) as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / ref.name.rpartition("/")[2]
        version = transfer.pull(registry, ref, folder)
        output.deprecated(str(version.ref), version.deprecated)
        try:
            yield Source(adapter_path(folder), folder, str(version.ref), str(version.ref), version.digest)
        except AdapterhubError as error:
            # The temporary folder means nothing to whoever reads the error.
            error.where = error.where.replace(str(folder), str(version.ref))
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


def place(path: Path, target: Path) -> None:
    """The same bytes under another name: a link where the file system allows one."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def resolve(text: str, settings: Settings) -> tuple[Path | None, Ref | None]:
    """The path or the ref that `text` is; UsageError when it is both, NotFoundError when it is neither."""
    from adapterhub.ref import Ref

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
    path = Path(text)
    if not path.exists():
        raise NotFoundError(text, "no such file or folder")
    return path


def adapter_path(path: Path) -> Path:
    """The adapter in a folder: the folder itself, or the one GGUF file it has."""
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not found or (path / "adapter_config.json").exists():
        return path
    if len(found) > 1:
        raise UsageError(str(path), f"{len(found)} GGUF files are in it", f"Name one, like {found[0]}")
    return found[0]


def read_base(text: str) -> BaseSpec:
    """The base model that `--base` names, seen from its headers."""
    from adapterhub_converters import base

    return base.read_base(existing(text))
