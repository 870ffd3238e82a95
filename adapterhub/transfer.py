"""Bytes out of a store: each read once, hashed as it passes, and visible only when its digest is right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub_converters.errors import IntegrityError, LocalIOError, OutputExistsError

from .digest import copy_hashing
from .manifest import Descriptor
from .ref import Ref
from .registry import Registry, Version
from .store import local_errors, sync_dir


def pull(registry: Registry, ref: Ref, out: Path) -> Version:
    """Write the files of a version into `out`, a folder that doesn't exist or is empty: all of them, right, or nothing."""
    version = registry.resolve(ref)
    with whole_folder(out) as folder:
        for layer in registry.files(version):
            with registry.store.open_blob(layer.digest) as blob:
                write_layer(folder, layer, blob)
    return version


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` at the end, flushed; gone if the end isn't reached."""
    check_free(out)
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.urandom(6).hex()}")
    try:
        with local_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        yield temporary
        with local_errors(out):
            for folder, _, _ in os.walk(temporary):
                sync_dir(Path(folder))
            if out.is_dir():
                out.rmdir()  # empty, or this fails
            os.rename(temporary, out)
            sync_dir(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(out: Path) -> None:
    """OutputExistsError unless `out` is free to be written: absent, or an empty folder."""
    try:
        if out.is_symlink() or any(out.iterdir()):
            raise OutputExistsError(str(out))
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise OutputExistsError(str(out)) from error
    except OSError as error:
        raise LocalIOError(str(out), error.strerror or str(error)) from error


def write_layer(folder: Path, layer: Descriptor, source: object) -> None:
    """Write one file below `folder`, which must be new and ours; IntegrityError when the bytes are not the promised ones.

    `layer.path` has been checked by `manifest.parse` or `folder.listing`.
    """
    path = folder / layer.path
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with local_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0) as file:
            digest, size = copy_hashing(source, file, limit=layer.size)
            os.fsync(file.fileno())
    if (digest, size) != (layer.digest, layer.size):
        what = f"{size} bytes of {digest} instead of {layer.size} of {layer.digest}"
        raise IntegrityError(layer.path, what, "Run `adapterhub fsck`; nothing was written")
