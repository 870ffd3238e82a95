"""Rehearse changes of a registry: they are decided, refused and returned as if they were made, and none is made.

Entries are kept in memory, in front of the log, and the index is rolled back in the end. Blobs are not rehearsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.store.ref_log import REFS, Entry, RefLog
from adapterhub.store.store_files import StoreFiles

from .registry import Registry


class _RehearsedLog(RefLog):
    """A log with entries that only this process sees, after those of the log that it stands before."""

    def __init__(self, log: RefLog, files: StoreFiles) -> None:
        super().__init__(files)
        self._log = log
        self._rehearsed: dict[tuple[str, str, int], Entry] = {}

    def append(self, entry: Entry, *, log: str = REFS) -> bool:
        self._rehearsed[log, entry.name, entry.seq] = entry
        return True

    def entry(self, name: str, seq: int, *, log: str = REFS) -> tuple[Entry, Digest] | None:
        entry = self._rehearsed.get((log, name, seq))
        return (entry, sha256_bytes(entry.dump())) if entry else self._log.entry(name, seq, log=log)

    def ends_at(self, name: str, seq: int, *, log: str = REFS) -> bool:
        return (log, name, seq + 1) not in self._rehearsed and self._log.ends_at(name, seq, log=log)

    def files_after(self, name: str, seq: int, *, log: str = REFS) -> list[Path]:
        rehearsed = (self.path(*key[1:], log=log) for key in self._rehearsed if key[:2] == (log, name) and key[2] > seq)
        return [*self._log.files_after(name, seq, log=log), *rehearsed]

    def begin_move(self, name: str) -> Path:
        return self.root / "pending" / "rehearsed.json"  # no such file


class _RollbackError(Exception):
    """Rolls the index back at the end of a rehearsal."""


@contextmanager
def rehearsal(registry: Registry, *, can_start_over: bool = False) -> Iterator[None]:
    """Rehearse every change in the block, under the write lock of the registry.

    Raises:
        StartOverError: A change takes what would hold the lock for long; only with `can_start_over`.
    """
    ledger, log = registry.ledger, registry.store.log
    verified_heads = dict(ledger.verified_heads)
    try:
        with ledger.write_lock():
            ledger.rehearses, ledger.can_start_over = True, can_start_over
            ledger.store.log = _RehearsedLog(log, registry.store.files)
            yield
            raise _RollbackError
    except _RollbackError:
        pass
    finally:
        ledger.rehearses = ledger.can_start_over = False
        ledger.store.log, ledger.verified_heads = log, verified_heads
