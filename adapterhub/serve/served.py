"""Versions in the form that a runtime reads, in folders that never change.

    <root>/sha256-<digits of the version>/<runtime>-<key>/     the files that the runtime reads, and served.json
    <root>/leases/                                             what running servers hold (`store.leases`)
    <root>/names/<digits>                                      an empty file: a remote has this version under this name

An engine reads a folder again whenever it has evicted the adapter, and caches what it computed under the path: it would mix in
bytes that changed there, and a folder that is gone ends the engine of vLLM. So a folder appears whole, is read-only, and is
never written again; a damaged one is left where it is and made anew under another name. A process that has told an engine of a
folder holds a lease on it, which ends with the process.

A digest has one folder, whatever the names of its version. So that nobody gets by the digest and a name of their own what was
pulled under another name, the names that a remote has confirmed are recorded.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest, sha256_file
from adapterhub.store import leases
from adapterhub.store.atomic import local_errors
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.errors import AdapterhubError, NotFoundError, OutputExistsError, RefusedError

UNUSED = 30 * 24.0
"""Hours after which a gc removes a folder that no process holds, since it was last resolved."""
_RECORD = "served.json"
_NAMES = "names"
_ABANDONED = 24 * 3600.0  # seconds after which hidden folders are those of killed processes


@dataclass(frozen=True, slots=True)
class Served:
    """A version as a runtime reads it.

    Attributes:
        ref: `team/sql:v3`, as resolved.
        name: `team/sql`.
        digest: Of the version, `sha256:…`.
        runtime: `vllm`, `sglang`, `llama.cpp`, `mlx`, `peft` or `transformers`.
        path: An immutable folder, or the GGUF file in it.
        rank: The largest of its modules.
        flags: The words of a command line that the runtime needs for it.
        notes: What was converted or folded, and the conditions of the verdict, one line each.
    """

    ref: str
    name: str
    digest: Digest
    runtime: str
    path: Path
    rank: int
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """One name for one version, forever: `team/sql@sha256:…`."""
        return f"{self.name}@{self.digest}"


@dataclass(frozen=True, slots=True)
class Made:
    """What is known of the files in a served folder.

    Attributes:
        rank: The largest of the adapter's modules.
        modules: The last parts of the names of its modules, sorted.
        notes: What was converted or folded, and the conditions of the verdict.
        file: The file that the runtime reads; empty for the folder itself.
    """

    rank: int
    modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    file: str = ""


@dataclass
class Removed:
    """What a sweep removed, or would remove: folders, of `size` bytes; `held` are those that a process still uses."""

    folders: int = 0
    size: int = 0
    held: int = 0


@dataclass(frozen=True, slots=True)
class ServedFolder:
    """The folder of all served versions."""

    root: Path
    _files: Inside = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_files", Inside(self.root))

    def find(self, digest: Digest, form: str) -> tuple[Path, Made] | None:
        """The folder of a version in a form, `<runtime>-<key>`, every byte verified; None if there is none. It counts as used.

        Raises:
            RefusedError: A link in the place of a folder.
        """
        parent = self._of(digest)
        if not self.root.is_dir() or not self._files.exists(parent):
            return None
        for folder in self._files.folders(parent):
            if folder.name == form or folder.name.startswith(f"{form}~"):
                with suppress(AdapterhubError, OSError):  # damaged, or another process removes it
                    if (made := _verified(folder)) is not None:
                        self._files.touch(folder)
                        return folder, made
        return None

    def make(self, digest: Digest, form: str, write: Callable[[Path], Made]) -> tuple[Path, Made]:
        """Fill a new folder by `write`, and keep it; the folder of another process that was faster, if it is whole.

        Raises:
            LocalIOError: The disk is full, or not writable; nothing is left behind.
        """
        place = self._of(digest) / form
        if os.path.lexists(place):
            if found := self.find(digest, form):  # another process was faster
                return found
            place = place.with_name(f"{form}~{os.urandom(4).hex()}")
        try:
            with atomic.whole(place) as folder:
                made = write(folder)
                _record(folder, made)
        except OutputExistsError:
            found = self.find(digest, form)
            if found is None:
                raise
            return found
        with local_errors(place):
            place.chmod(0o555)  # not before: renaming a folder writes its entry for the one above
        return place, made

    @contextmanager
    def leased(self) -> Iterator[ServedLease]:
        """Hold a lease, on nothing at first, until the context or the process ends."""
        with local_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        with leases.hold(self._files, "serve", required=True) as lease:
            yield ServedLease(self, lease)

    @contextmanager
    def held(self, served: Served) -> Iterator[Served]:
        """Hold a lease on a served version: no gc removes it meanwhile."""
        with self.leased() as lease:
            lease.add(served)
            yield served

    def is_there(self, name: str) -> bool:
        """Whether there is a folder of this name below."""
        return self._files.exists(self.root / name)

    def is_confirmed(self, name: str, digest: Digest) -> bool:
        """Whether `confirm` was called with a name of a remote and a digest; it counts as used."""
        with suppress(OSError, RefusedError):
            self._files.touch(self._confirmed(name, digest))
            return True
        return False

    def confirm(self, name: str, digest: Digest) -> None:
        """Record that a remote has a version under a name; where nothing can be written, it will be asked again."""
        path = self._confirmed(name, digest)
        with suppress(OSError, RefusedError):
            self.root.mkdir(parents=True, exist_ok=True)
            self._files.make_dir(path.parent)
            self._files.create(path).close()

    def _confirmed(self, name: str, digest: Digest) -> Path:
        return self.root / _NAMES / hashlib.sha256(f"{name}@{digest}".encode()).hexdigest()

    def sweep(self, *, unused: float = UNUSED, dry_run: bool = False) -> Removed:
        """Remove what nobody holds and was not resolved for `unused` hours, and what killed processes left."""
        removed = Removed()
        if not self.root.is_dir():
            return removed
        with local_errors(self.root):
            for lease in leases.dead(self._files):
                with suppress(FileNotFoundError):
                    self._files.remove(lease)
            for parent in self._files.folders(self.root):
                if parent.name.startswith("sha256-"):
                    self._sweep(parent, unused * 3600, removed, dry_run=dry_run)
            if not dry_run:
                self._sweep_names(time.time() - unused * 3600)
        return removed

    def _sweep_names(self, before: float) -> None:
        names = self.root / _NAMES
        for path in self._files.listed(names) if self._files.exists(names) else ():
            with suppress(FileNotFoundError):  # another gc was first
                if self._files.status(path).st_mtime < before:
                    self._files.remove(path)

    def _sweep(self, parent: Path, unused: float, removed: Removed, *, dry_run: bool) -> None:
        names = self._files.folders(parent)
        for folder in names:
            before = time.time() - (_ABANDONED if folder.name.startswith(".") else unused)
            with suppress(FileNotFoundError):  # another gc was first
                if self._files.status(folder).st_mtime < before:
                    self._remove(folder, before, removed, dry_run=dry_run)
        if not names and not dry_run and self._files.status(parent).st_mtime < time.time() - _ABANDONED:
            with suppress(OSError):  # a process fills it just now
                parent.rmdir()

    def _remove(self, folder: Path, before: float, removed: Removed, *, dry_run: bool) -> None:
        size = sum(found.st_size for _, found in walk(folder) if not stat.S_ISDIR(found.st_mode))
        with self.locked():
            if f"{folder.parent.name}/{folder.name}" in leases.noted(self._files)[0]:
                removed.held += 1
                return
            if self._files.status(folder).st_mtime >= before:  # resolved meanwhile
                return
            gone = folder.with_name(f".removed-{os.urandom(6).hex()}")
            if not dry_run:
                folder.chmod(0o755)
                self._files.move(folder, gone)
        if not dry_run:
            self._files.remove_tree(gone)
        removed.folders += 1
        removed.size += size

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other processes while a lease is added, or one is looked for and the folder taken away."""
        with local_errors(self.root), self._files.resume(self.root / "lock") as file:
            leases.wait_for(file.fileno())
            yield

    def _of(self, digest: Digest) -> Path:
        return self.root / digest.replace(":", "-")


class ServedLease:
    """What a process holds of a folder of served versions; from any thread. No gc removes that."""

    def __init__(self, folder: ServedFolder, lease: leases.Lease) -> None:
        self._folder, self._lease = folder, lease
        self._holders: dict[str, set[str]] = {}  # the models that have a folder: versions of the same files share one
        self._lock = threading.Lock()

    def add(self, served: Served) -> None:
        """Hold a version; NotFoundError where its folder is gone."""
        name = self._name(served)
        with self._lock, self._folder.locked():
            if name not in self._holders:
                self._lease.note(name)
            self._holders.setdefault(name, set()).add(served.model)
            if not self._folder.is_there(name):
                raise NotFoundError(str(served.path), "no longer there", "Resolve the version again")

    def drop(self, served: Served) -> None:
        """Hold a version no longer."""
        name = self._name(served)
        with self._lock, self._folder.locked():
            holders = self._holders.get(name, set())
            holders.discard(served.model)
            if not holders and self._holders.pop(name, None) is not None:
                self._lease.note_only(self._holders)

    def _name(self, served: Served) -> str:
        return "/".join(served.path.relative_to(self._folder.root).parts[:2])


def _record(folder: Path, made: Made) -> None:
    """Write served.json, and protect all files against writing."""
    (folder / _RECORD).unlink(missing_ok=True)  # a file of the adapter's own of that name, which no runtime reads
    files = {name: sha256_file(folder / name) for name in _names(folder)}
    (folder / _RECORD).write_text(json.dumps({**asdict(made), "files": files}, indent=2))
    for name in _names(folder):
        (folder / name).chmod(0o444)


def _names(folder: Path) -> list[str]:
    return sorted(str(path) for path, found in walk(folder) if stat.S_ISREG(found.st_mode))


def _verified(folder: Path) -> Made | None:
    """What served.json has, if the files are those that it names, byte for byte; None if not."""
    record: dict[str, Any] = json_file.read_object(folder / _RECORD, follow=False)
    files = record.pop("files", None)
    if not isinstance(files, dict) or {*files, _RECORD} != {*_names(folder)}:
        return None
    if any(sha256_file(folder / name) != digest for name, digest in files.items()):
        return None
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    try:
        return Made(**values)
    except TypeError:  # entries of another version of adapterhub
        return None
