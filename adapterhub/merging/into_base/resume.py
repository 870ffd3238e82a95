"""Resume an interrupted merge: take over the finished files of an earlier run of the same merge.

A merge of several files records the size and a checksum of each file once it is on disk, next to the hidden folder that it
writes to (`containers/atomic.py`). A run with the same base, adapters and options looks for what a dead run left, compares the
checksums, and computes only what is missing. An interrupted run keeps its finished files for that; a run that fails keeps
nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adapterhub.merging.adapter_checks import WeightedAdapters
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import AdapterhubError

from .merge_options import Options

_RECORDS = "finished"
_VERSION = 1
_BLOCK = 1 << 20  # bytes


def job_digest(adapters: WeightedAdapters, base: Path, options: Options) -> str:
    """Return a digest of everything that the result depends on; for the base, the names, sizes and times of its files."""
    state = hashlib.sha256(f"{_VERSION} {base.resolve()} {options!r}".encode())
    for path in sorted(base.iterdir() if base.is_dir() else [base]):
        # A file that vanishes meanwhile changes the digest, which costs a resumed run and no more.
        with suppress(OSError):
            stat = path.stat()
            state.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for adapter, weight in adapters:
        state.update(f"{weight!r} {adapter.meta!r}\n".encode())
        _hash_adapter(state, adapter)
    return state.hexdigest()


def _hash_adapter(state: hashlib._Hash, adapter: Adapter) -> None:
    """Add the scalars and tensors of an adapter to a digest."""
    for target, delta in sorted(adapter.deltas.items()):
        numbers = [(item.name, getattr(delta, item.name)) for item in fields(delta)]
        scalars = [(name, value) for name, value in numbers if not hasattr(value, "dtype")]
        state.update(f"{target} {type(delta).__name__} {scalars!r}\n".encode())
    for target, rows in sorted(adapter.rows.items()):
        state.update(f"{target} {rows.ids}\n".encode())
    for name, tensor in adapter.tensors():
        state.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        state.update(tensor.tobytes())


class FinishedFiles:
    """The finished files of a run, in its output folder, each with a record of its size and checksum."""

    def __init__(self, name: str, inside: Path) -> None:
        self._job = name
        self.folder = inside
        self._records = inside.parent / _RECORDS
        self._records.mkdir(exist_ok=True)

    def record(self, path: Path) -> None:
        """Flush a complete file to disk and record it."""
        # Flushed first: after a crash, a record must never vouch for bytes that are not on disk.
        atomic.sync_to_disk(path)
        with open_regular(path) as file:
            record = {"job": self._job, "size": os.fstat(file.fileno()).st_size, "checksum": _checksum(file)}
        (self._records / path.name).write_text(json.dumps(record))

    def take_over(self, leftover: Path) -> set[str]:
        """Move the intact files of an earlier run into this one, remove the others, and return the intact names."""
        names, inside = set(), ConfinedFiles(leftover)
        for record in _records(inside):
            with suppress(OSError, AdapterhubError):
                document, path = json_file.read_object(record, follow=False), leftover / self.folder.name / record.name
                with inside.open(path) as file:
                    intact = document == {
                        "job": self._job,
                        "size": os.fstat(file.fileno()).st_size,
                        "checksum": _checksum(file),
                    }
                if intact:
                    # The file before its record, which vouches for it.
                    path.rename(self.folder / record.name)
                    record.rename(self._records / record.name)
                    names.add(record.name)
        shutil.rmtree(leftover, ignore_errors=True)
        return names

    def keep(self) -> None:
        """Move the finished files to where the next run looks for them, before the output folder is removed."""
        names = [path.name for path in self._records.iterdir()]
        if not names:
            return
        place = self.folder
        # Next to the output and on the same file system, so that the moves below are renames.
        kept_folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.kept-", dir=place.parent.parent))
        (kept_folder / place.name).mkdir()
        for name in names:
            (place / name).rename(kept_folder / place.name / name)
        # The records move last: files without a record are never trusted.
        self._records.rename(kept_folder / _RECORDS)


def find_leftover(out: Path, name: str) -> Path | None:
    """Return the folder that a dead run of this job left next to `out`; remove those that runs of other jobs kept."""
    target, leftover = Path(os.path.abspath(out)), None
    for kind in ("partial", "kept"):
        for candidate in sorted(target.parent.glob(f".{atomic.escape_glob(target.name)}.{kind}-*")):
            lock = None if candidate == leftover else atomic.lock_folder(candidate)  # `leftover` was renamed in the loop before
            if lock is None:
                continue  # in use by another run
            if leftover is None and _belongs_to(candidate, name):
                # `atomic` removes folders that are named partial, so rename it.
                leftover = candidate.rename(candidate.with_name(candidate.name.replace(".partial-", ".kept-")))
            elif kind == "kept":
                shutil.rmtree(candidate, ignore_errors=True)
            os.close(lock)
    return leftover


def _records(inside: ConfinedFiles) -> list[Path]:
    """Return the records in a folder that a dead run left, never through a link."""
    with suppress(OSError, AdapterhubError):
        return [path for path in inside.list_folder(inside.root / _RECORDS) if inside.is_file(path)]
    return []


def _belongs_to(leftover: Path, name: str) -> bool:
    """Return whether a leftover folder has a record of this job."""
    with suppress(OSError, AdapterhubError):
        return any(
            json_file.read_object(record, follow=False).get("job") == name for record in _records(ConfinedFiles(leftover))
        )
    return False


def _checksum(file: BinaryIO) -> str:
    """Return a checksum of the sums and exclusive ors of words, block by block.

    It detects any accident at a tenth of the cost of a sha256.
    """
    state, block = hashlib.sha256(), np.empty(_BLOCK, np.uint8)
    while count := file.readinto(block.data):  # type: ignore[attr-defined] # an unbuffered file has this method
        block[count : count + -count % 8] = 0
        words = block[: count + -count % 8].view(np.uint64)
        state.update(np.array([count, np.add.reduce(words), np.bitwise_xor.reduce(words)], np.uint64).tobytes())
    return state.hexdigest()
