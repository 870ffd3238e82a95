"""Versions prepared for a runtime, in folders that never change.

    <root>/sha256-<digits of the version>/<runtime>-<key>/     the files that the runtime reads, and served.json
    <root>/leases/                                             the leases of running servers (`store.leases`)
    <root>/names/<digits>                                      an empty file: a remote has this version under this name

An engine reads a folder again whenever it has evicted the adapter, and caches what it computed under the path: it would mix in
bytes that changed there, and a missing folder ends vLLM's engine. So a folder appears complete, is read-only, and is never
written again; a damaged one is left in place and created anew under another name. A process that has given a folder to an
engine holds a lease on it, which ends with the process.

A digest has one folder, whatever the names of its version. The names that a remote has confirmed are recorded, so that nobody
can use the digest with a name of their own to get what was pulled under another name.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest, sha256_file
from adapterhub.store import leases
from adapterhub.store.store_files import local_errors
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.containers.file_lock import wait_for_lock
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.errors import AdapterhubError, NotFoundError, OutputExistsError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

UNUSED = 30 * 24.0
"""Hours since it was last resolved, after which a gc removes a folder without a lease."""
OWN_TEMPLATE = "own-chat-template"
"""The code of the error for a version that would be asked by another chat template than in its training."""
_RECORD = "served.json"
_NAMES = "names"
_ABANDONED = 24 * 3600.0  # seconds after which hidden folders count as left by killed processes


@dataclass(frozen=True, slots=True)
class PreparedVersion:
    """A version as a runtime reads it.

    Attributes:
        ref: `team/sql:v3`, as resolved.
        name: `team/sql`.
        digest: The digest of the version, `sha256:…`.
        runtime: `vllm`, `sglang`, `llama.cpp`, `mlx`, `peft` or `transformers`.
        path: An immutable folder, or the GGUF file in it.
        rank: The largest rank of its modules.
        flags: The command-line options that the runtime needs for it.
        notes: What was converted or folded, and the conditions of the verdict, one line each.
        prompt: The prompt that it was trained with; `PROMPT_OF_BASE` for that of its base.
    """

    ref: str
    name: str
    digest: Digest
    runtime: str
    path: Path
    rank: int
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    prompt: TrainedPrompt = PROMPT_OF_BASE

    @property
    def model(self) -> str:
        """A name that means this version forever: `team/sql@sha256:…`."""
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True, slots=True)
class FolderRecord:
    """The facts about the files of a prepared folder, as recorded in served.json.

    Attributes:
        rank: The largest rank of the adapter's modules.
        modules: The last parts of the names of its modules, sorted.
        notes: What was converted or folded, and the conditions of the verdict.
        file: The file that the runtime reads; empty for the folder itself.
        prompt: The prompt that it was trained with.
    """

    rank: int
    modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    file: str = ""
    prompt: TrainedPrompt = PROMPT_OF_BASE


@dataclass
class SweepResult:
    """The number of folders that a sweep removed, or would remove, with their bytes, and of those still in use."""

    folders: int = 0
    size: int = 0
    in_use: int = 0


@dataclass(frozen=True, slots=True)
class ServedFolder:
    """The folder of all prepared versions."""

    root: Path
    _files: ConfinedFiles = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_files", ConfinedFiles(self.root))

    def find(self, digest: Digest, form: str) -> tuple[Path, FolderRecord] | None:
        """Return the folder of a version in a form, `<runtime>-<key>`, with every byte verified; None if there is none.

        This counts as a use of the folder.

        Raises:
            RefusedError: A link is in the place of a folder.
        """
        parent = self._version_folder(digest)
        if not self.root.is_dir() or not self._files.exists(parent):
            return None
        for folder in self._files.list_subfolders(parent):
            if folder.name == form or folder.name.startswith(f"{form}~"):
                with suppress(AdapterhubError, OSError):  # damaged, or being removed by another process
                    if (record := _read_verified(folder)) is not None:
                        self._files.touch(folder)
                        return folder, record
        return None

    def make(self, digest: Digest, form: str, write: Callable[[Path], FolderRecord]) -> tuple[Path, FolderRecord]:
        """Fill a new folder with `write`, and return it; or the folder of another process that was faster, if it is intact.

        Raises:
            LocalIOError: The disk is full, or not writable; nothing is left behind.
        """
        target = self._version_folder(digest) / form
        if os.path.lexists(target):
            if existing := self.find(digest, form):  # another process was faster
                return existing
            # The folder that exists is damaged. It stays, because an engine may have it open.
            target = target.with_name(f"{form}~{os.urandom(4).hex()}")
        try:
            with atomic.pending_output(target) as folder:
                record = write(folder)
                _write_record(folder, record)
        except OutputExistsError:
            existing = self.find(digest, form)
            if existing is None:
                raise
            return existing
        with local_errors(target):
            target.chmod(0o555)  # only now: renaming a folder needs write permission in it, to update its parent entry
        return target, record

    @contextmanager
    def open_lease(self) -> Iterator[ServedLease]:
        """Hold a lease, empty at first, until the context or the process ends."""
        with local_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        with leases.hold(self._files, "serve", required=True) as lease:
            yield ServedLease(self, lease)

    def has_folder(self, name: str) -> bool:
        """Return whether the root has a folder of this name."""
        return self._files.exists(self.root / name)

    def is_confirmed(self, name: str, digest: Digest) -> bool:
        """Return whether `confirm` was called with this name of a remote and digest; this counts as a use."""
        with suppress(OSError, RefusedError):
            self._files.touch(self._confirmation_path(name, digest))
            return True
        return False

    def confirm(self, name: str, digest: Digest) -> None:
        """Record that a remote has a version under a name, for when it does not answer."""
        if self.is_confirmed(name, digest):
            return
        path = self._confirmation_path(name, digest)
        with suppress(OSError, RefusedError):
            self.root.mkdir(parents=True, exist_ok=True)
            self._files.make_dir(path.parent)
            self._files.create(path).close()

    def revoke(self, name: str, digest: Digest) -> None:
        """Record that a remote no longer has a version under a name."""
        with suppress(OSError, RefusedError):
            self._files.remove(self._confirmation_path(name, digest))

    def _confirmation_path(self, name: str, digest: Digest) -> Path:
        """Return the file that records a confirmed name."""
        return self.root / _NAMES / hashlib.sha256(f"{name}@{digest}".encode()).hexdigest()

    def sweep(self, *, unused: float = UNUSED, dry_run: bool = False) -> SweepResult:
        """Remove folders without a lease that were not resolved for `unused` hours, and what killed processes left."""
        result = SweepResult()
        if not self.root.is_dir():
            return result
        with local_errors(self.root):
            for lease in leases.dead_leases(self._files):
                with suppress(FileNotFoundError):
                    self._files.remove(lease)
            for parent in self._files.list_subfolders(self.root):
                if parent.name.startswith("sha256-"):
                    self._sweep(parent, unused * 3600, result, dry_run=dry_run)
            if not dry_run:
                self._sweep_names(time.time() - unused * 3600)
        return result

    def _sweep_names(self, before: float) -> None:
        """Remove the confirmed names that were not used since `before`."""
        names = self.root / _NAMES
        for path in self._files.list_folder(names) if self._files.exists(names) else ():
            with suppress(FileNotFoundError):  # another gc was first
                if self._files.status(path).st_mtime < before:
                    self._files.remove(path)

    def _sweep(self, parent: Path, unused: float, result: SweepResult, *, dry_run: bool) -> None:
        """Remove the unused folders of one version, and the version's folder if nothing is left in it."""
        names = self._files.list_subfolders(parent)
        for folder in names:
            before = time.time() - (_ABANDONED if folder.name.startswith(".") else unused)
            with suppress(FileNotFoundError):  # another gc was first
                if self._files.status(folder).st_mtime < before:
                    self._remove(folder, before, result, dry_run=dry_run)
        if not names and not dry_run and self._files.status(parent).st_mtime < time.time() - _ABANDONED:
            with suppress(OSError):  # another process is filling it
                parent.rmdir()

    def _remove(self, folder: Path, before: float, result: SweepResult, *, dry_run: bool) -> None:
        """Remove one folder, unless a process has a lease on it or has resolved it since `before`."""
        size = sum(status.st_size for _, status in walk(folder) if not stat.S_ISDIR(status.st_mode))
        with self.lock():
            if f"{folder.parent.name}/{folder.name}" in leases.active_leases(self._files)[0]:
                result.in_use += 1
                return
            if self._files.status(folder).st_mtime >= before:  # resolved in the meantime
                return
            # Renamed under the lock, so that no process finds it any more; deleting takes longer and needs no lock.
            removed_path = folder.with_name(f".removed-{os.urandom(6).hex()}")
            if not dry_run:
                # A read-only folder cannot be renamed everywhere.
                folder.chmod(0o755)
                self._files.move(folder, removed_path)
        if not dry_run:
            self._files.remove_tree(removed_path)
        result.folders += 1
        result.size += size

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclude other processes while a lease is added, or checked before a folder is removed."""
        with local_errors(self.root), self._files.resume(self.root / "lock") as file:
            wait_for_lock(file.fileno())
            yield

    def _version_folder(self, digest: Digest) -> Path:
        """Return the folder of a version, which has a folder for each form."""
        return self.root / digest.replace(":", "-")


class ServedLease:
    """The prepared versions that a process holds, so that no gc removes them; usable from any thread."""

    def __init__(self, folder: ServedFolder, lease: leases.Lease) -> None:
        self._folder, self._lease = folder, lease
        self._holders: dict[str, set[str]] = {}  # the models that use each folder: versions with the same files share one
        self._lock = threading.Lock()

    def add(self, served: PreparedVersion) -> None:
        """Hold a version; NotFoundError if its folder is gone."""
        name = self._folder_name(served)
        with self._lock, self._folder.lock():
            if name not in self._holders:
                self._lease.note(name)
            self._holders.setdefault(name, set()).add(served.model)
            # Checked after the lease is noted: from here on no gc can remove the folder.
            if not self._folder.has_folder(name):
                raise NotFoundError(str(served.path), "no longer there", "Resolve the version again")

    def drop(self, served: PreparedVersion) -> None:
        """Release a version."""
        name = self._folder_name(served)
        with self._lock, self._folder.lock():
            holders = self._holders.get(name, set())
            holders.discard(served.model)
            if not holders and self._holders.pop(name, None) is not None:
                self._lease.replace_digests(self._holders)

    def _folder_name(self, served: PreparedVersion) -> str:
        """Return the path of a version's folder below the root."""
        return "/".join(served.path.relative_to(self._folder.root).parts[:2])


def _write_record(folder: Path, record: FolderRecord) -> None:
    """Write served.json, and make all files read-only."""
    (folder / _RECORD).unlink(missing_ok=True)  # the adapter may have a file of this name, which no runtime reads
    files = {name: sha256_file(folder / name) for name in _file_names(folder)}
    (folder / _RECORD).write_text(json.dumps({**asdict(record), "files": files}, indent=2))
    for name in _file_names(folder):
        (folder / name).chmod(0o444)


def _file_names(folder: Path) -> list[str]:
    """Return the paths of all regular files, sorted."""
    return sorted(str(path) for path, status in walk(folder) if stat.S_ISREG(status.st_mode))


def _read_verified(folder: Path) -> FolderRecord | None:
    """Return the record in served.json if all files match it byte for byte; otherwise None."""
    record: dict[str, Any] = json_file.read_object(folder / _RECORD, follow=False)
    files = record.pop("files", None)
    # Additional files count as damage too, because a runtime might read them.
    if not isinstance(files, dict) or {*files, _RECORD} != {*_file_names(folder)}:
        return None
    if any(sha256_file(folder / name) != digest for name, digest in files.items()):
        return None
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    try:
        return FolderRecord(**{**values, "prompt": TrainedPrompt.from_document(values["prompt"])})
    except (KeyError, TypeError):  # members written by another version of adapterhub
        return None
