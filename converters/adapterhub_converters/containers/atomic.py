"""Output files and folders that appear completely or not at all.

The output is written to a hidden folder next to its destination and renamed at the end, once it is on disk. If the process is
killed in between, that folder stays as `.NAME.partial-…`, or for a moment at its start as `.NAME.new-…`, and a later run for
the same destination removes it; the folder of a running process is locked and stays.

An output that is replaced is first moved aside as `.NAME.old-…`, and removed once the new output has its name. A process that
is killed between the two leaves no `NAME`: the next run for the same destination restores the old output before it does
anything else. Files that are the same byte for byte in the new output are kept, so that programs that watch or cache them see
no change.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterhub_converters.errors import LocalIOError, OutputExistsError, UsageError

from .open_file import FOLDER_FLAGS, walk

_ABANDONED_AFTER = 24 * 3600  # seconds
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".lora", ".pth", ".pt", ".bin")


@contextmanager
def pending_output(out: Path, *, folder: bool = True, replace: bool = False, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to, an empty folder if `folder`, that becomes `out` if the block succeeds and is removed otherwise.

    Args:
        out: The destination.
        folder: Whether it is a folder.
        replace: Whether it may replace an earlier output: a file a file, a folder one of the same kind (`kind_of`).
        durable: Whether it must outlive a power cut, unlike an output in a temporary folder.

    Raises:
        OutputExistsError: `out` exists, other than as an empty folder that may be filled.
        UsageError: `out` would be replaced, and is not an earlier output.
        LocalIOError: A disk error, here or in the block; it names `out`, and nothing is left behind.
    """
    # Check before the work, to fail early, and after it, since somebody may have created `out` meanwhile.
    check_free(out, folder=folder, replace=replace)
    destination = Path(os.path.abspath(out))  # "." has no name for a hidden folder
    with scratch_folder(out) as scratch, _errors_name(out):
        pending = scratch / destination.name
        if folder:
            pending.mkdir()
        yield pending
        # The bytes must be on disk before they get the final name, and the name before the block counts as successful.
        if durable:
            _flush(pending)
        check_free(out, folder=folder, replace=replace)
        if replace and _is_taken(out):
            _replace_output(pending, destination, out)
        else:
            _publish(pending, destination, folder=folder)
        if durable:
            sync_to_disk(destination.parent)


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `out`, on the same disk, for the duration of the block; remove those of killed runs."""
    destination = Path(os.path.abspath(out))
    with _errors_name(out):
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(destination)
        scratch, lock = _create_scratch(destination)
    try:
        yield scratch
    finally:
        # Remove it while it is still locked, so that no other run does the same.
        shutil.rmtree(scratch, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_free(out: Path, *, folder: bool = True, replace: bool = False) -> None:
    """Raise an OutputExistsError unless `out` is absent, an empty folder if `folder`, or, with `replace`, replaceable.

    An output that a killed run had moved aside is restored first.
    """
    _restore_old(Path(os.path.abspath(out)))
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
    """Raise a UsageError unless `out` can be an earlier output, and has nothing else in it."""
    if out.is_symlink():
        raise UsageError(str(out), "is a link, and links are not replaced", "Name what it points to, or remove it")
    if out.is_dir() != folder or not (folder or out.is_file()):
        raise UsageError(str(out), f"is not a {'folder' if folder else 'file'}, and the output is one", _REMOVE_HINT)
    if not folder:
        return
    # A repository's .git or an editor's folder: somebody works here.
    hidden_folder = next((entry.name for entry in os.scandir(out) if entry.name.startswith(".") and entry.is_dir()), None)
    if hidden_folder:
        raise UsageError(str(out), f"contains {hidden_folder}, which is no part of an earlier output", _REMOVE_HINT)
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(str(out), "is the working folder or contains it, and cannot be replaced", "Run this elsewhere")
    if kind_of(out) is None:
        raise UsageError(str(out), "is not an earlier output: it contains neither an adapter nor a model", _REMOVE_HINT)


def kind_of(folder: Path) -> str | None:
    """Return the kind of a folder, by the names in it: `layout`, `ollama`, `adapter`, `model`, or None."""
    names = {entry.name for entry in os.scandir(folder)}
    if "oci-layout" in names:
        return "layout"
    if "Modelfile" in names:
        return "ollama"
    if "config.json" in names and names.isdisjoint(("adapter_config.json", "adapter.json")):
        return "model"
    if names & {"adapter_config.json", "adapter.json"} or any(name.endswith(_WEIGHT_SUFFIXES) for name in names):
        return "adapter"
    return None


@contextmanager
def _errors_name(out: Path) -> Iterator[None]:
    """Name `out` in disk errors, rather than the temporary folder, which the user doesn't know."""
    try:
        yield
    except LocalIOError as error:
        raise LocalIOError(str(out), error.what, error.hint, code=error.code) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise LocalIOError(str(out), "its parent is a file, not a folder; nothing was left behind") from error
    except OSError as error:
        raise LocalIOError(str(out), f"{error.strerror or error}; nothing was left behind") from error


def _create_scratch(out: Path) -> tuple[Path, int | None]:
    """Create a folder next to `out` and lock it before it gets the name that other runs look for."""
    import tempfile  # late: commands that only read import this module for `sync_to_disk`, and start faster without

    unlocked = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    lock = lock_folder(unlocked)
    try:
        return unlocked.rename(unlocked.with_name(unlocked.name.replace(".new-", ".partial-"))), lock
    except OSError:
        unlocked.rmdir()
        if lock is not None:
            os.close(lock)
        raise


def _remove_abandoned(out: Path) -> None:
    """Remove the folders that killed runs for the same `out` left; none without locks, which identify the running ones.

    A run that was killed before it had locked its folder left it as `new`, which is removed once it is old.
    """
    for kind in ("partial", "new"):
        for leftover in out.parent.glob(f".{escape_glob(out.name)}.{kind}-*"):
            lock = lock_folder(leftover)
            if lock is None:
                continue
            info = os.fstat(lock)
            # In a shared folder, others' leftovers are theirs to remove.
            if info.st_uid == os.geteuid() and (kind == "partial" or info.st_mtime < time.time() - _ABANDONED_AFTER):
                shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def escape_glob(text: str) -> str:
    """Return `text` as a glob pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder and return the descriptor; None if another process holds the lock, or for a link or anything else.

    None, too, if the name was given to another folder while this one was being locked, and where locks are not supported.
    """
    try:
        import fcntl
    except ImportError:
        return None
    with suppress(OSError):
        fd = os.open(folder, FOLDER_FLAGS)
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), folder.lstat()):
                return fd
        os.close(fd)
    return None


def _flush(pending: Path) -> None:
    """Flush a file, or a folder with everything in it, to disk."""
    if pending.is_dir():
        for path, _ in walk(pending):
            sync_to_disk(pending / path)
    sync_to_disk(pending)


def _publish(pending: Path, out: Path, *, folder: bool) -> None:
    """Give an output its final name, which must be free."""
    if folder:
        try:
            if out.is_dir():
                out.rmdir()  # empty, or this fails
            pending.rename(out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another run was faster
                raise OutputExistsError(str(out)) from error
            raise
        return
    try:
        os.link(pending, out)  # unlike a rename, never replaces a file created meanwhile
    except FileExistsError as error:
        raise OutputExistsError(str(out)) from error
    except OSError:  # a file system without hard links
        pending.rename(out)


def _replace_output(pending: Path, out: Path, name: Path) -> None:
    """Replace `out`, which the user calls `name`, by `pending`. A file is renamed over; a folder is moved aside first."""
    if not pending.is_dir():
        _keep_identical(out, pending)
        os.replace(pending, out)
        return
    new_kind, old_kind = kind_of(pending), kind_of(out)
    if new_kind != old_kind:
        problem = (
            f"is {_KIND_NAMES.get(old_kind or '', 'no output')}, "
            f"and would be replaced by {_KIND_NAMES.get(new_kind or '', 'something else')}"
        )
        raise UsageError(str(name), problem, _REMOVE_HINT)
    for path, _ in list(walk(pending)):
        _keep_identical(out / path, pending / path)
    # It stays locked under its new name, so that no other run restores or removes it.
    lock = lock_folder(out)
    old_path = out.with_name(pending.parent.name.replace(f".{out.name}.partial-", f".{out.name}.old-", 1))
    try:
        out.rename(old_path)
        pending.rename(out)
        # The old output may go only once the new name is on disk.
        sync_to_disk(out.parent)
        shutil.rmtree(old_path, ignore_errors=True)
    finally:
        if not _is_taken(out) and _is_taken(old_path):
            old_path.rename(out)
        if lock is not None:
            os.close(lock)


def _keep_identical(old_file: Path, new_file: Path) -> None:
    """Put the old file in the place of the new one if both have the same bytes; if that is impossible, leave the new one."""
    link = new_file.with_name(f"{new_file.name}.kept")
    with suppress(OSError):  # absent, no hard links here, or the file of another user
        os.link(old_file, link, follow_symlinks=False)
        if not link.is_symlink() and filecmp.cmp(link, new_file, shallow=False):
            os.replace(link, new_file)
    link.unlink(missing_ok=True)


_REMOVE_HINT = "Remove it yourself, or name another output"
_KIND_NAMES = {"layout": "an image layout", "ollama": "a folder for Ollama", "adapter": "an adapter", "model": "a model"}


def _restore_old(out: Path) -> None:
    """Restore the output that a killed run had moved aside, or remove it if the new output already has its name."""
    for old_path in out.parent.glob(f".{escape_glob(out.name)}.old-*"):
        lock = lock_folder(old_path)
        if lock is None:
            continue
        try:
            if os.fstat(lock).st_uid != os.geteuid():
                continue
            if _is_taken(out):
                shutil.rmtree(old_path, ignore_errors=True)
            else:
                with suppress(OSError):
                    old_path.rename(out)
        finally:
            os.close(lock)


def sync_to_disk(path: Path) -> None:
    """Flush a file's bytes or a folder's names to disk; a system that cannot open folders (Windows) does so itself."""
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | getattr(os, "O_BINARY", 0))
    except PermissionError:
        if is_folder:
            return
        handle = os.open(path, os.O_RDONLY)  # a file that the user write-protected, kept from an earlier output
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
