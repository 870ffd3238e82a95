"""Going on with a merge that was interrupted: its finished files are taken over, if they are the same merge's.

A merge of several files notes of each, once it is on the disk, its size and a checksum, beside the hidden folder it writes to
(`files/staging.py`). A run with the same base, adapters and options looks for what a dead one left, compares the checksums,
and computes only what is missing. An interrupted run leaves its finished files for that; one that fails leaves nothing.
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

import numpy as np

from adapterhub.merge.checks import Weighted
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import atomic

from .options import Options

_NOTES = "finished"
_VERSION = 1
_BLOCK = 1 << 20  # bytes


def job(adapters: Weighted, base: Path, options: Options) -> str:
    """A digest of all that the result depends on; of the base's files names, sizes and times."""
    state = hashlib.sha256(f"{_VERSION} {base.resolve()} {options!r}".encode())
    for path in sorted(base.iterdir() if base.is_dir() else [base]):
        with suppress(OSError):
            seen = path.stat()
            state.update(f"{path.name} {seen.st_size} {seen.st_mtime_ns}\n".encode())
    for adapter, weight in adapters:
        state.update(f"{weight!r} {adapter.meta!r}\n".encode())
        _add(state, adapter)
    return state.hexdigest()


def _add(state: hashlib._Hash, adapter: Adapter) -> None:
    for target, delta in sorted(adapter.deltas.items()):
        said = [(one.name, getattr(delta, one.name)) for one in fields(delta) if not hasattr(getattr(delta, one.name), "dtype")]
        state.update(f"{target} {type(delta).__name__} {said!r}\n".encode())
    for target, rows in sorted(adapter.rows.items()):
        state.update(f"{target} {rows.ids}\n".encode())
    for name, tensor in adapter.tensors():
        state.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        state.update(tensor.tobytes())


class Finished:
    """The finished files of a run, each with its note, in the folder `inside`."""

    def __init__(self, name: str, inside: Path) -> None:
        self._job = name
        self.folder = inside
        self._notes = inside.parent / _NOTES
        self._notes.mkdir(exist_ok=True)

    def note(self, path: Path) -> None:
        """That a file is complete, once it is on the disk."""
        atomic.sync(path)
        said = {"job": self._job, "size": path.stat().st_size, "checksum": _checksum(path)}
        (self._notes / path.name).write_text(json.dumps(said))

    def take_over(self, left: Path) -> set[str]:
        """The names of the files of an earlier run that are whole and right, and this run's now; the rest of it is gone."""
        taken = set()
        for note in sorted((left / _NOTES).iterdir()):
            with suppress(OSError, ValueError):
                said, path = json.loads(note.read_text()), left / self.folder.name / note.name
                if said == {"job": self._job, "size": path.stat().st_size, "checksum": _checksum(path)}:
                    path.rename(self.folder / note.name)
                    note.rename(self._notes / note.name)
                    taken.add(note.name)
        shutil.rmtree(left, ignore_errors=True)
        return taken

    def keep(self) -> None:
        """Put what is finished where the next run looks, before the folder goes."""
        done = [path.name for path in self._notes.iterdir()]
        if not done:
            return
        place = self.folder
        kept = Path(tempfile.mkdtemp(prefix=f".{place.name}.kept-", dir=place.parent.parent))
        (kept / place.name).mkdir()
        for name in done:
            (place / name).rename(kept / place.name / name)
        self._notes.rename(kept / _NOTES)


def left_over(out: Path, name: str) -> Path | None:
    """The folder that a dead run of the job left beside `out`; what one of another job kept is removed."""
    place, found = Path(os.path.abspath(out)), None
    for kind in ("partial", "kept"):
        for left in sorted(place.parent.glob(f".{atomic.escaped(place.name)}.{kind}-*")):
            lock = None if left == found else atomic.locked(left)  # found was renamed just now
            if lock is None:
                continue  # a living run's
            if found is None and _is_of(left, name):
                # staging removes what is called partial.
                found = left.rename(left.with_name(left.name.replace(".partial-", ".kept-")))
            elif kind == "kept":
                shutil.rmtree(left, ignore_errors=True)
            os.close(lock)
    return found


def _is_of(left: Path, name: str) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return any(json.loads(note.read_text()).get("job") == name for note in (left / _NOTES).iterdir())
    return False


def _checksum(path: Path) -> str:
    """Of sums and exclusive ors of words, block by block: no accident gets past it, and it costs a tenth of a sha256."""
    state, block = hashlib.sha256(), np.empty(_BLOCK, np.uint8)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block.data):
            block[count : count + -count % 8] = 0
            words = block[: count + -count % 8].view(np.uint64)
            state.update(np.array([count, np.add.reduce(words), np.bitwise_xor.reduce(words)], np.uint64).tobytes())
    return state.hexdigest()
