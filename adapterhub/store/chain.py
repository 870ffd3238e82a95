"""The chains of a store's logs: each entry has the digest of the one before it, so that changing one changes all that follow.

A chain alone shows what was changed, removed or moved within it. Entries that were cut off at its end, or rewritten from some
entry on, only show against an end that was recorded before (`adapterhub.trust.checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapterhub.digest import Digest
from adapterhub_converters.errors import AdapterhubError

from .ref_log import BASES, HUB, MERGES, REFS, Entry

LOGS = (REFS, BASES, MERGES, HUB)
CHANGED, REMOVED, REORDERED, TRUNCATED, UNREADABLE = "changed", "removed", "reordered", "truncated", "unreadable"

End = tuple[int, Digest]
"""The number of the last entry of a name's log, and its digest."""
Ends = Mapping[str, Mapping[str, End]]
"""Log to name to the end of its log."""


class Log(Protocol):
    """Logs that can be followed: those of a store (`RefLog`), and those in the database of a hub."""

    def names(self, log: str) -> Sequence[str]:
        """List every adapter name."""

    def document_names(self, log: str) -> Sequence[str]:
        """List every name of another log."""

    def entry(self, name: str, seq: int, *, log: str) -> tuple[Entry, Digest] | None:
        """Read an entry and the digest of its bytes; None past the end."""

    def has_entry_after(self, name: str, seq: int, *, log: str) -> bool:
        """Return True if there is an entry with a number above `seq`."""

    def where(self, name: str, seq: int, *, log: str) -> str:
        """Return the place of an entry, for people."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The first entry of a name's log that is not as it was written.

    Attributes:
        where: The path of the entry below the store's folder, or the row.
        kind: CHANGED, REMOVED, REORDERED, TRUNCATED or UNREADABLE.
    """

    where: str
    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class Chains:
    """The ends of all logs as far as their chains are whole, the first fault of each log, and the number of entries."""

    ends: Ends
    faults: tuple[Fault, ...]
    entries: int


def follow(log: Log, known: Ends | None = None) -> Chains:
    """Read every entry of every log, and compare it with the one before it and with ends that were recorded before.

    Args:
        log: The logs of a store.
        known: Earlier ends of the logs, which must still contain them.
    """
    known = known or {}
    ends: dict[str, dict[str, End]] = {}
    faults: list[Fault] = []
    entries = 0
    for kind in LOGS:
        noted, ends[kind] = known.get(kind, {}), {}
        names = log.names(REFS) if kind == REFS else log.document_names(kind)
        for name in sorted({*names, *noted}):
            end, fault = _follow(log, kind, name, noted.get(name, (0, "")))
            ends[kind][name] = end
            entries += end[0]
            faults += [fault] if fault else []
    return Chains(ends, tuple(faults), entries)


def _follow(log: Log, kind: str, name: str, noted: End) -> tuple[End, Fault | None]:
    seq, before = 0, ""

    def fault(number: int, how: str, what: str) -> tuple[End, Fault]:
        return (seq, before), Fault(log.where(name, number, log=kind), how, what)

    while True:
        try:
            found = log.entry(name, seq + 1, log=kind)
        except AdapterhubError as error:
            return fault(seq + 1, REORDERED if error.code == "misplaced" else UNREADABLE, error.what)
        if found is None:
            break
        entry, digest = found
        if entry.previous != before:
            # The digests do not tell which of the two was changed; the first entry follows nothing.
            return fault(
                max(seq, 1), CHANGED, f"entry {seq + 1} follows another entry than this one" if seq else "follows an entry"
            )
        seq, before = seq + 1, digest
        if seq == noted[0] and digest != noted[1]:
            return fault(seq, CHANGED, "is not the entry that the checkpoint has, or follows other entries")
    if log.has_entry_after(name, seq, log=kind):
        return fault(seq + 1, REMOVED, "is missing, and later entries are there")
    if seq < noted[0]:
        return fault(seq + 1, TRUNCATED, f"is missing, and the checkpoint has {noted[0]} entries")
    return (seq, before), None
