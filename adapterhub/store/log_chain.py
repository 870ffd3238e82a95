"""The chains of a store's logs: each entry has the digest of its predecessor, so that changing one changes all that follow.

A chain alone shows what was changed, removed or moved within it. Entries that were cut off at its end, or rewritten from some
entry on, only show against an end that was recorded before (`adapterhub.trust.log_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from adapterhub.digest import Digest
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from .ref_log import BASES, HUB, MERGES, REFS, Entry

LOGS = (REFS, BASES, MERGES, HUB)
CHANGED, REMOVED, REORDERED, TRUNCATED, UNREADABLE = "changed", "removed", "reordered", "truncated", "unreadable"

LogEnd = tuple[int, Digest]
"""The number of the last entry of a name's log, and its digest."""
LogEnds = Mapping[str, Mapping[str, LogEnd]]
"""Log to name to the end of its log."""


class Log(Protocol):
    """Logs that can be followed: those of a store (`RefLog`), and those in the database of a hub."""

    def names(self, log: str) -> Sequence[str]:
        """Return every adapter name."""

    def document_names(self, log: str) -> Sequence[str]:
        """Return every name of another log."""

    def entry(self, name: str, seq: int, *, log: str) -> tuple[Entry, Digest] | None:
        """Read an entry and the digest of its bytes; None past the end."""

    def has_entry_after(self, name: str, seq: int, *, log: str) -> bool:
        """Return True if there is an entry with a number above `seq`."""

    def where(self, name: str, seq: int, *, log: str) -> str:
        """Return the location of an entry, for people."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The first entry of a name's log that is not as it was written.

    Attributes:
        where: The path of the entry below the store's folder, or its row in a database.
        kind: CHANGED, REMOVED, REORDERED, TRUNCATED or UNREADABLE.
        what: The fault in words.
    """

    where: str
    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class Chains:
    """The ends of all logs as far as their chains are intact, the first fault of each log, and the number of entries."""

    ends: LogEnds
    faults: tuple[Fault, ...]
    entries: int


def verify_chains(log: Log, recorded_ends: LogEnds | None = None) -> Chains:
    """Read every entry of every log, and compare it with its predecessor and with ends that were recorded before.

    Args:
        log: The logs of a store.
        recorded_ends: Earlier ends of the logs, which must still contain them.
    """
    recorded_ends = recorded_ends or {}
    ends: dict[str, dict[str, LogEnd]] = {}
    faults: list[Fault] = []
    entries = 0
    for kind in LOGS:
        recorded, ends[kind] = recorded_ends.get(kind, {}), {}
        names = log.names(REFS) if kind == REFS else log.document_names(kind)
        # A recorded name must still have its log: a whole log may have been removed.
        for name in sorted({*names, *recorded}):
            end, fault = _verify_log(log, kind, name, recorded.get(name, (0, "")))
            ends[kind][name] = end
            entries += end[0]
            faults += [fault] if fault else []
    return Chains(ends, tuple(faults), entries)


def _verify_log(log: Log, kind: str, name: str, recorded_end: LogEnd) -> tuple[LogEnd, Fault | None]:
    seq, previous_digest = 0, ""

    def fault(number: int, fault_kind: str, problem: str) -> tuple[LogEnd, Fault]:
        return (seq, previous_digest), Fault(log.where(name, number, log=kind), fault_kind, problem)

    while True:
        try:
            logged = log.entry(name, seq + 1, log=kind)
        except AdapterhubError as error:
            return fault(seq + 1, REORDERED if error.code == "misplaced" else UNREADABLE, error.what)
        if logged is None:
            break
        entry, digest = logged
        if entry.previous != previous_digest:
            # The digests cannot tell which of the two entries was changed, so the earlier one is reported; the first entry has
            # no predecessor.
            return fault(
                max(seq, 1), CHANGED, f"entry {seq + 1} follows another entry than this one" if seq else "follows an entry"
            )
        seq, previous_digest = seq + 1, digest
        if seq == recorded_end[0] and digest != recorded_end[1]:
            return fault(seq, CHANGED, "is not the entry that the checkpoint has, or follows other entries")
    if log.has_entry_after(name, seq, log=kind):
        return fault(seq + 1, REMOVED, "is missing, and later entries are there")
    if seq < recorded_end[0]:
        return fault(seq + 1, TRUNCATED, f"is missing, and the checkpoint has {recorded_end[0]} entries")
    return (seq, previous_digest), None
