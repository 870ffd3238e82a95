"""The log of a name's refs in an object store: the entries of a local registry's log (`store/ref_log.py`), an object each.

They are read by number, and each contains the digest of the one before. A listing only tells how many to request at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adapterhub import references
from adapterhub.digest import Digest, sha256_bytes
from adapterhub.ref import LATEST, Ref
from adapterhub.store.store import REFS, Entry
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError

from .bucket import Bucket

_MAX_ENTRY = 4 << 20
# Entries of one name and bytes of them all: a store answers for any number that it is asked for. Further entries are refused,
# also to our own pushes, after which nobody could read the log.
MAX_ENTRIES, _MAX_LOG = 100_000, 256 << 20
_AT_ONCE, _WAITING = 8, 64

K = TypeVar("K")


@dataclass
class State:
    """The state of a name: versions by number, with digest and size of their manifests, and the numbers of its tags."""

    seq: int = 0
    head: Digest = ""
    number: int = 0
    deleted: bool = False
    versions: dict[int, tuple[Digest, int]] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    _removed: tuple[dict[int, tuple[Digest, int]], dict[str, int], set[str]] = field(default_factory=lambda: ({}, {}, set()))

    def apply(self, entry: Entry) -> None:
        """Apply one entry."""
        self.number = max(self.number, entry.number)
        if entry.op == "delete":
            self.deleted = True
            self._removed = self.versions, self.tags, self.protected
            self.versions, self.tags, self.protected = {}, {}, set()
        elif entry.op == "restore":
            self.deleted = False
            versions, tags, protected = self._removed
            self.versions = {number: versions[number] for number in sorted(versions.keys() & set(entry.numbers))}
            self.tags = {tag: number for tag, number in tags.items() if number in self.versions}
            self.protected = protected & set(self.tags)
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
        if entry.op in ("push", "tag"):
            self.tags |= dict.fromkeys(entry.tags, entry.number)

    def number_of(self, digest: Digest) -> int:
        """The number of the version with this manifest, 0 for none."""
        return next((number for number, found in self.versions.items() if found[0] == digest), 0)


def _discard(found: dict[K, Any], keys: Iterable[K]) -> None:
    """Remove keys one by one: a copy without them, for every entry of a long log, would be quadratic."""
    for key in keys:
        found.pop(key, None)


class Log:
    """The log of one name, up to the entry that was read last."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name = bucket, name
        self._folder = f"{REFS}/{name}"
        self._listed = False
        self.state = State()
        self.entries: list[Entry] = []
        self._size = 0

    def key(self, seq: int) -> str:
        """The key of an entry."""
        return f"{self._folder}/{seq:08}.json"

    def refresh(self) -> State:
        """Read the log to its end."""
        if not self._listed:
            self._read_listed()
            self._listed = True
        while raw := self.raw(self.state.seq + 1):
            self._apply(raw)
        return self.state

    def raw(self, seq: int) -> bytes | None:
        """The bytes of an entry."""
        return self._bucket.read(self.key(seq), _MAX_ENTRY)

    def _read_listed(self) -> None:
        listed = self._bucket.numbers(self._folder, MAX_ENTRIES)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for first in range(1, len(listed) + 1, _WAITING):
                read = [*pool.map(self.raw, range(first, min(first + _WAITING, len(listed) + 1)))]
                for raw in read:
                    if raw is None:
                        break
                    self._apply(raw)
                if None in read:
                    break
        if listed and listed[-1] > self.state.seq and self.raw(self.state.seq + 1) is None:
            where = f"{self._bucket.where}/{self.key(self.state.seq + 1)}"
            raise IntegrityError(where, f"missing, but entry {listed[-1]} follows it", "Restore it from a backup")

    def _apply(self, raw: bytes) -> None:
        seq = self.state.seq + 1
        where = f"{self._bucket.where}/{self.key(seq)}"
        self.check_room(seq)
        self._size += len(raw)
        entry = Entry.parse(raw, where)
        if (entry.name, entry.seq) != (self._name, seq):
            raise FormatError(where, f"is entry {entry.seq} of {entry.name[:80]}", "Restore it from a backup")
        if entry.previous != self.state.head:
            raise IntegrityError(where, "does not follow the entry before it: the log was changed", "Restore it from a backup")
        self.state.apply(entry)
        self.entries.append(entry)
        self.state.seq, self.state.head = seq, sha256_bytes(raw)

    def check_room(self, seq: int) -> None:
        """Refuse an entry beyond the limits of a log."""
        if seq > MAX_ENTRIES or self._size > _MAX_LOG:
            what = f"the log of this name has more than {MAX_ENTRIES:,} entries or {_MAX_LOG >> 20} MiB"
            raise RefusedError(f"{self._bucket.where}/{self._name}", what, "Copy its versions to another name")

    # ---- references

    def version(self, reference: str, where: str) -> tuple[Digest, int]:
        """Digest and size of the manifest that a reference names."""
        ref = Ref.parse(f"{self._name}{'@' if ':' in reference else ':'}{reference}")
        state = self.there()
        if ref.digest:
            sizes = dict(state.versions.values())
            if found := references.begins(ref.digest, sizes, where):
                return found, sizes[found]
        elif (number := ref.number or _tagged(state, ref, where)) in state.versions:
            return state.versions[number]
        repository = f"{self._bucket.where}/{self._name}"
        raise NotFoundError(where, "no such version", code="no-such-tag", repository=repository)

    def there(self) -> State:
        """The state of the name; NotFoundError if there is no such name."""
        state = self.refresh()
        if not state.seq or state.deleted:
            what = "was removed" if state.deleted else "no such adapter"
            raise NotFoundError(f"{self._bucket.where}/{self._name}", what, "Check the address")
        return state


def _tagged(state: State, ref: Ref, where: str) -> int:
    """The number of the version that a tag or a range selects, 0 for none. A missing tag, like `1.2`, may be a range."""
    tag = ref.tag or LATEST
    if not ref.range and tag in state.tags:
        return state.tags[tag]
    found = references.in_range(ref.range or tag, lambda: state.tags, state.tags.get, where)
    return state.tags[found] if found else 0
