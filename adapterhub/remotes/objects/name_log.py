"""The log of a name's refs in an object store: the entries of a local registry's log (`store/ref_log.py`), an object each.

Entries are read by number, and each contains the digest of the one before. A listing only tells how many to request at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from typing import Any, TypeVar

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.ref import LATEST, Ref
from adapterhub.registry import version_selection
from adapterhub.store.ref_log import TAG_MOVES
from adapterhub.store.store import REFS, Entry
from adapterhub.store.store_files import MAX_DOCUMENT
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .bucket import Bucket

# Limits for the entries of one name and their bytes in total: a store could answer for any number that it is asked for. Entries
# beyond them are refused, even our own pushes, since nobody could read the log afterwards.
MAX_ENTRIES, _MAX_LOG = 100_000, 256 << 20
_THREADS, _BATCH = 8, 64

K = TypeVar("K")


@dataclass
class NameState:
    """The state of a name: versions by number, with digest and size of their manifests, and the numbers of its tags."""

    seq: int = 0
    head: Digest = ""
    number: int = 0
    deleted: bool = False
    versions: dict[int, tuple[Digest, int]] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    _before_deletion: tuple[dict[int, tuple[Digest, int]], dict[str, int], set[str]] = field(
        default_factory=lambda: ({}, {}, set())
    )

    def apply(self, entry: Entry) -> None:
        """Apply one entry."""
        self.number = max(self.number, entry.number)
        if entry.op == "delete":
            self.deleted = True
            # A later entry may restore the name: keep what was deleted.
            self._before_deletion = self.versions, self.tags, self.protected
            self.versions, self.tags, self.protected = {}, {}, set()
        elif entry.op == "restore":
            self.deleted = False
            versions, tags, protected = self._before_deletion
            self.versions = {number: versions[number] for number in sorted(versions.keys() & set(entry.numbers))}
            self.tags = {tag: number for tag, number in tags.items() if number in self.versions}
            self.protected = protected & set(self.tags)
            self.tags |= dict.fromkeys(entry.tags, entry.number)
        elif entry.op == "push":
            self.deleted = False
            self.versions[entry.number] = (entry.digest, entry.size)
        elif entry.op == "drop":
            _discard(self.versions, entry.numbers)
        elif entry.op == "untag":
            _discard(self.tags, entry.tags)
        elif entry.op == "protect":
            self.protected |= set(entry.tags)
        elif entry.op == "unprotect":
            self.protected -= set(entry.tags)
        if entry.op in TAG_MOVES and entry.op != "restore":
            self.tags |= dict.fromkeys(entry.tags, entry.number)

    def number_of(self, digest: Digest) -> int:
        """Return the number of the version with this manifest, 0 if there is none."""
        return next((number for number, version in self.versions.items() if version[0] == digest), 0)


def _discard(mapping: dict[K, Any], keys: Iterable[K]) -> None:
    """Remove keys in place: copying the rest for every entry of a long log would take quadratic time."""
    for key in keys:
        mapping.pop(key, None)


class NameLog:
    """The log of one name, up to the entry that was read last."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._folder = f"{REFS}/{name}"
        self._was_listed = False
        self.state = NameState()
        self.entries: list[Entry] = []
        self._size = 0

    def key(self, seq: int) -> str:
        """Return the key of an entry."""
        return f"{self._folder}/{seq:08}.json"

    def refresh(self) -> NameState:
        """Read the log to its end, and return the state of the name."""
        if not self._was_listed:
            self._read_listed()
            self._was_listed = True
        # The listing may be out of date, so ask for the next number until there is none.
        while raw := self.read_entry(self.state.seq + 1):
            self._apply(raw)
        return self.state

    def read_entry(self, seq: int) -> bytes | None:
        """Return the bytes of an entry, None without it."""
        return self._bucket.read(self.key(seq), MAX_DOCUMENT)

    def _read_listed(self) -> None:
        numbers = self._bucket.numbers(self._folder, MAX_ENTRIES)
        with ThreadPoolExecutor(_THREADS) as pool:
            for batch_start in range(1, len(numbers) + 1, _BATCH):
                # In batches, so that a long log is not held in memory as bytes and entries at once.
                batch = [*pool.map(self.read_entry, range(batch_start, min(batch_start + _BATCH, len(numbers) + 1)))]
                for raw in batch:
                    if raw is None:
                        break
                    self._apply(raw)
                if None in batch:
                    break
        # A listing may lag behind, but it does not invent entries: a gap before a listed one is damage.
        if numbers and numbers[-1] > self.state.seq and self.read_entry(self.state.seq + 1) is None:
            label = f"{self._bucket.location}/{self.key(self.state.seq + 1)}"
            raise IntegrityError(label, f"missing, but entry {numbers[-1]} follows it", "Restore it from a backup")

    def _apply(self, raw: bytes) -> None:
        seq = self.state.seq + 1
        label = f"{self._bucket.location}/{self.key(seq)}"
        self.check_room(seq)
        self._size += len(raw)
        entry = Entry.parse(raw, label)
        if (entry.name, entry.seq) != (self._name, seq):
            raise FormatError(label, f"is entry {entry.seq} of {entry.name[:80]}", "Restore it from a backup")
        # Each entry has the digest of the one before: a removed or replaced entry shows here.
        if entry.previous != self.state.head:
            raise IntegrityError(label, "does not follow the entry before it: the log was changed", "Restore it from a backup")
        self.state.apply(entry)
        self.entries.append(entry)
        self.state.seq, self.state.head = seq, sha256_bytes(raw)

    def check_room(self, seq: int) -> None:
        """Refuse an entry beyond the limits of a log."""
        if seq > MAX_ENTRIES or self._size > _MAX_LOG:
            problem = f"the log of this name has more than {MAX_ENTRIES:,} entries or {_MAX_LOG >> 20} MiB"
            raise RefusedError(f"{self._bucket.location}/{self._name}", problem, "Copy its versions to another name")

    # ---- references

    def version(self, reference: str, location: str) -> tuple[Digest, int]:
        """Return the digest and size of the manifest that a reference names."""
        ref = Ref.parse(f"{self._name}{'@' if ':' in reference else ':'}{reference}")
        state = self.existing_state()
        if ref.digest:
            sizes = dict(state.versions.values())
            if digest := version_selection.matching_digest(ref.digest, sizes, location):
                return digest, sizes[digest]
        elif (number := ref.number or _selected_number(state, ref, location)) in state.versions:
            return state.versions[number]
        repository = f"{self._bucket.location}/{self._name}"
        raise NotFoundError(location, "no such version", code="no-such-tag", repository=repository)

    def existing_state(self) -> NameState:
        """Return the state of the name; NotFoundError if there is no such name."""
        state = self.refresh()
        if not state.seq or state.deleted:
            problem = "was removed" if state.deleted else "no such adapter"
            raise NotFoundError(f"{self._bucket.location}/{self._name}", problem, "Check the address")
        return state


def _selected_number(state: NameState, ref: Ref, location: str) -> int:
    """Return the number of the version that a tag or a range selects, 0 for none. A missing tag, like `1.2`, may be a range."""
    tag = ref.tag or LATEST
    if not ref.range and tag in state.tags:
        return state.tags[tag]
    selected = version_selection.highest_tag_in_range(ref.range or tag, lambda: state.tags, state.tags.get, location)
    return state.tags[selected] if selected else 0
