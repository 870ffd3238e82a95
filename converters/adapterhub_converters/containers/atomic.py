"""Write files and folders that appear whole or not at all.

The output is written to a hidden folder next to its destination and renamed at the end, once it is on the disk. If the process
is killed in between, that folder remains as `.NAME.partial-…`, or for a moment at its start as `.NAME.new-…`, and a later run
for the same destination removes it; the folder of a running process is locked and remains.

What is replaced is moved aside as `.NAME.old-…` first, and removed once the new output has its name. A process that is killed
between the two leaves no `NAME`: the next run for the same destination puts the old one back before it does anything else.
Files that the new output has byte for byte are kept, so that what watches or caches them sees no change.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.errors import LocalIOError, OutputExistsError, UsageError

from .open_file import FOLDER, walk

_OLD = 24 * 3600  # seconds
_WEIGHTS = (".safetensors", ".gguf", ".lora", ".pth", ".pt", ".bin")


@contextmanager
def whole(out: Path, *, folder: bool = True, replace: bool = False) -> Iterator[Path]:
    """Yield a path to write to, an empty folder if `folder`, that becomes `out` if the block succeeds and is removed otherwise.

    Args:
        out: The destination.
        folder: It is a folder.
        replace: It may replace an earlier output: a file a file, a folder one of the same kind (`kind_of`).

    Raises:
        OutputExistsError: `out` exists, other than as an empty folder that may be filled.
        UsageError: `out` is to be replaced, and is no earlier output.
        LocalIOError: A disk error, here or in the block; it names `out`, and nothing is left behind.
    """
    check_free(out, folder=folder, replace=replace)
    place = Path(os.path.abspath(out))  # "." has no name for a hidden folder
    with scratch_folder(out) as scratch, _naming(out):
        inside = scratch / place.name
        if folder:
            inside.mkdir()
        yield inside
        _flush(inside)
        check_free(out, folder=folder, replace=replace)
        if replace and _is_taken(out):
            _swap(inside, place, out)
        else:
            _publish(inside, place, folder=folder)
        sync(place.parent)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `out`, on the same disk, for the duration of the block; remove those of killed runs."""
    place = Path(os.path.abspath(out))
    with _naming(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        scratch, lock = _scratch(place)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_free(out: Path, *, folder: bool = True, replace: bool = False) -> None:
    """Raise OutputExistsError unless `out` is absent or, if `folder`, an empty folder; with `replace`, as `whole` does.

    What a killed run had moved aside is put back first.
    """
    _restore(Path(os.path.abspath(out)))
    try:
        if not _is_taken(out) or (folder and out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
            return
        if replace:
            _check_replaceable(out, folder=folder)
            return
    except OSError as error:
        raise LocalIOError(str(out), error.strerror or str(error)) from error
    raise OutputExistsError(str(out))


def _is_taken(out: Path) -> bool:
    return os.path.lexists(out)


def _check_replaceable(out: Path, *, folder: bool) -> None:
    """Raise UsageError unless `out` can be an earlier output, and is nothing more than that."""
    if out.is_symlink():
        raise UsageError(str(out), "is a link, and links are not replaced", "Name what it points to, or remove it")
    if out.is_dir() != folder or not (folder or out.is_file()):
        raise UsageError(str(out), f"is not a {'folder' if folder else 'file'}, and the output is one", _REMOVE)
    if not folder:
        return
    inner = next((entry.name for entry in os.scandir(out) if entry.name.startswith(".") and entry.is_dir()), None)
    if inner:
        raise UsageError(str(out), f"contains {inner}, which is no part of an earlier output", _REMOVE)
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(str(out), "is the working folder or contains it, and cannot be replaced", "Run this elsewhere")
    if kind_of(out) is None:
        raise UsageError(str(out), "is not an earlier output: it contains neither an adapter nor a model", _REMOVE)


def kind_of(folder: Path) -> str | None:
    """What a folder is, by the names in it: `layout`, `ollama`, `adapter`, `model`, or None."""
    names = {entry.name for entry in os.scandir(folder)}
    if "oci-layout" in names:
        return "layout"
    if "Modelfile" in names:
        return "ollama"
    if "config.json" in names and names.isdisjoint(("adapter_config.json", "adapter.json")):
        return "model"
    if names & {"adapter_config.json", "adapter.json"} or any(name.endswith(_WEIGHTS) for name in names):
        return "adapter"
    return None


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Name `out` in disk errors, rather than the temporary folder, which is unknown to the user."""
    try:
        yield
    except LocalIOError as error:
        raise LocalIOError(str(out), error.what, error.hint, code=error.code) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise LocalIOError(str(out), "its parent is a file, not a folder; nothing was left behind") from error
    except OSError as error:
        raise LocalIOError(str(out), f"{error.strerror or error}; nothing was left behind") from error


def _scratch(out: Path) -> tuple[Path, int | None]:
    """Create a folder next to `out` and lock it, before it gets the name that other runs sweep."""
    import tempfile  # late: commands that only read import this module for `sync`, and start faster without

    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    lock = locked(fresh)
    try:
        return fresh.rename(fresh.with_name(fresh.name.replace(".new-", ".partial-"))), lock
    except OSError:
        fresh.rmdir()
        if lock is not None:
            os.close(lock)
        raise


def _sweep(out: Path) -> None:
    """Remove the folders that killed runs for the same `out` left; none without locks, which tell the running ones.

    One that was killed before it had locked its folder left it as `new`, which is removed when it is old.
    """
    for kind in ("partial", "new"):
        for left in out.parent.glob(f".{escaped(out.name)}.{kind}-*"):
            lock = locked(left)
            if lock is None:
                continue
            found = os.fstat(lock)
            if found.st_uid == os.geteuid() and (kind == "partial" or found.st_mtime < time.time() - _OLD):
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def escaped(text: str) -> str:
    """`text` as a glob pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def locked(folder: Path) -> int | None:
    """Lock a folder and return the descriptor; None if another process holds the lock, or for a link or anything else.

    None, too, if the name went to another folder while this one was being locked, and where locks are not supported.
    """
    try:
        import fcntl
    except ImportError:
        return None
    with suppress(OSError):
        fd = os.open(folder, FOLDER)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), folder.lstat()):
                return fd
        os.close(fd)
    return None


def _flush(inside: Path) -> None:
    if inside.is_dir():
        for path, _ in walk(inside):
            sync(inside / path)
    sync(inside)


def _publish(inside: Path, out: Path, *, folder: bool) -> None:
    if folder:
        if out.is_dir():
            out.rmdir()  # empty, or this fails
        inside.rename(out)
        return
    try:
        os.link(inside, out)  # unlike a rename, never replaces a file created meanwhile
    except FileExistsError as error:
        raise OutputExistsError(str(out)) from error
    except OSError:  # a file system without hard links
        inside.rename(out)


def _swap(inside: Path, out: Path, name: Path) -> None:
    """Replace `out`, which the user calls `name`, by `inside`. A file is renamed over; a folder is moved aside first."""
    if not inside.is_dir():
        _keep(out, inside)
        os.replace(inside, out)
        return
    made, there = kind_of(inside), kind_of(out)
    if made != there:
        what = f"is {_KINDS.get(there or '', 'no output')}, and would be replaced by {_KINDS.get(made or '', 'something else')}"
        raise UsageError(str(name), what, _REMOVE)
    for path, _ in list(walk(inside)):
        _keep(out / path, inside / path)
    lock = locked(out)  # it stays locked under its new name: nobody else puts it back or removes it
    old = out.with_name(inside.parent.name.replace(f".{out.name}.partial-", f".{out.name}.old-", 1))
    try:
        out.rename(old)
        inside.rename(out)
        sync(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if not _is_taken(out) and _is_taken(old):
            old.rename(out)
        if lock is not None:
            os.close(lock)


def _keep(there: Path, made: Path) -> None:
    """Put the file `there` in the place of `made` if both have the same bytes; where that cannot be, leave `made`."""
    linked = made.with_name(f"{made.name}.kept")
    with suppress(OSError):  # absent, no hard links here, or the file of another user
        os.link(there, linked, follow_symlinks=False)
        if not linked.is_symlink() and filecmp.cmp(linked, made, shallow=False):
            os.replace(linked, made)
    linked.unlink(missing_ok=True)


_REMOVE = "Remove it yourself, or name another output"
_KINDS = {"layout": "an image layout", "ollama": "a folder for Ollama", "adapter": "an adapter", "model": "a model"}


def _restore(out: Path) -> None:
    """Put back what a killed run had moved aside, or remove it where the new output was there in time."""
    for old in out.parent.glob(f".{escaped(out.name)}.old-*"):
        lock = locked(old)
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_uid != os.geteuid():
                continue
            if _is_taken(out):
                shutil.rmtree(old, ignore_errors=True)
            else:
                with suppress(OSError):
                    old.rename(out)
        finally:
            os.close(lock)


def sync(path: Path) -> None:
    """Flush a file's bytes or a folder's names to the disk; a system that cannot open folders (Windows) does so itself."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | getattr(os, "O_BINARY", 0))
    except PermissionError:
        if is_folder:
            return
        handle = os.open(path, os.O_RDONLY)  # a file of the user's own that he protected, kept from an earlier output
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
