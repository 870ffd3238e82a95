"""Resume an interrupted merge: take over the finished files of an earlier run of the same merge.

A merge of several files records the size and a checksum of each file once it is on the disk, next to the hidden folder that
it writes to (`containers/atomic.py`). A run with the same base, adapters and options looks for what a dead run left,
compares the checksums, and computes only what is missing. An interrupted run keeps its finished files for that; a run that
fails keeps nothing.
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

from adapterhub.merging.checks import Weighted
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import atomic, json_file
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import AdapterhubError

from .options import Options

_RECORDS = "finished"
_VERSION = 1
_BLOCK = 1 << 20  # bytes


def job(adapters: Weighted, base: Path, options: Options) -> str:
    """A digest of everything that the result depends on; for the base, the names, sizes and times of its files."""
    state = hashlib.sha256(f"{_VERSION} {base.resolve()} {options!r}".encode())
    for path in sorted(base.iterdir() if base.is_dir() else [base]):
        with suppress(OSError):
            stat = path.stat()
            state.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for adapter, weight in adapters:
        state.update(f"{weight!r} {adapter.meta!r}\n".encode())
        _add(state, adapter)
    return state.hexdigest()


def _add(state: hashlib._Hash, adapter: Adapter) -> None:
    for target, delta in sorted(adapter.deltas.items()):
        numbers = [(one.name, getattr(delta, one.name)) for one in fields(delta)]
        plain = [(name, value) for name, value in numbers if not hasattr(value, "dtype")]
        state.update(f"{target} {type(delta).__name__} {plain!r}\n".encode())
    for target, rows in sorted(adapter.rows.items()):
        state.update(f"{target} {rows.ids}\n".encode())
    for name, tensor in adapter.tensors():
        state.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        state.update(tensor.tobytes())


class Finished:
    """The finished files of a run in the folder `inside`, each with a record."""

    def __init__(self, name: str, inside: Path) -> None:
        self._job = name
        self.folder = inside
        self._records = inside.parent / _RECORDS
        self._records.mkdir(exist_ok=True)

    def record(self, path: Path) -> None:
        """Flush a complete file to the disk and record it."""
        atomic.sync(path)
        with open_regular(path) as file:
            record = {"job": self._job, "size": os.fstat(file.fileno()).st_size, "checksum": _checksum(file)}
        (self._records / path.name).write_text(json.dumps(record))

    def take_over(self, left: Path) -> set[str]:
        """Move the intact files of an earlier run into this one and remove the rest; returns the names of those files."""
        taken, inside = set(), Inside(left)
        for record in _records(inside):
            with suppress(OSError, AdapterhubError):
                document, path = json_file.read_object(record, follow=False), left / self.folder.name / record.name
                with inside.open(path) as file:
                    same = document == {"job": self._job, "size": os.fstat(file.fileno()).st_size, "checksum": _checksum(file)}
                if same:
                    path.rename(self.folder / record.name)
                    record.rename(self._records / record.name)
                    taken.add(record.name)
        shutil.rmtree(left, ignore_errors=True)
        return taken

    def keep(self) -> None:
        """Move the finished files to where the next run looks for them, before the folder is removed."""
        done = [path.name for path in self._records.iterdir()]
        if not done:
            return
        place = self.folder
        kept = Path(tempfile.mkdtemp(prefix=f".{place.name}.kept-", dir=place.parent.parent))
        (kept / place.name).mkdir()
        for name in done:
            (place / name).rename(kept / place.name / name)
        self._records.rename(kept / _RECORDS)


def left_over(out: Path, name: str) -> Path | None:
    """The folder that a dead run of this job left next to `out`; those that runs of other jobs kept are removed."""
    place, found = Path(os.path.abspath(out)), None
    for kind in ("partial", "kept"):
        for left in sorted(place.parent.glob(f".{atomic.escaped(place.name)}.{kind}-*")):
            lock = None if left == found else atomic.locked(left)  # `found` was renamed in the loop before
            if lock is None:
                continue  # in use by another run
            if found is None and _belongs_to(left, name):
                # `atomic` removes folders that are named partial.
                found = left.rename(left.with_name(left.name.replace(".partial-", ".kept-")))
            elif kind == "kept":
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    return found


def _records(inside: Inside) -> list[Path]:
    """The records in a folder that a dead run left; none behind a link."""
    with suppress(OSError, AdapterhubError):
        return [path for path in inside.listed(inside.root / _RECORDS) if inside.is_file(path)]
    return []


def _belongs_to(left: Path, name: str) -> bool:
    with suppress(OSError, AdapterhubError):
        return any(json_file.read_object(record, follow=False).get("job") == name for record in _records(Inside(left)))
    return False


def _checksum(file: BinaryIO) -> str:
    """A checksum of the sums and exclusive ors of words, by block: it detects any accident at a tenth of the cost of a
    sha256."""
    state, block = hashlib.sha256(), np.empty(_BLOCK, np.uint8)
    while count := file.readinto(block.data):  # type: ignore[attr-defined] # an unbuffered file has this method
        block[count : count + -count % 8] = 0
        words = block[: count + -count % 8].view(np.uint64)
        state.update(np.array([count, np.add.reduce(words), np.bitwise_xor.reduce(words)], np.uint64).tobytes())
    return state.hexdigest()
