"""The bases that a registry knows by name: each name has a log of its own in the store, like the refs of adapters.

    bases/<name>/<seq>.json    one move each, created exclusively: `push` points the name at a document, `delete` frees it

The document, a blob, says what the base is; `adapterhub.bases.record` reads it. Nothing here needs to know what is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_converters.errors import IntegrityError

from .digest import Digest
from .ref import parse_name
from .store import BASES, Entry, Store


@dataclass(frozen=True, slots=True)
class Shelved:
    """Where a name stands: the last entry of its log (None when there is none) and that entry's digest."""

    name: str
    entry: Entry | None = None
    head: Digest = ""

    @property
    def there(self) -> bool:
        """Whether the name means a base now."""
        return self.entry is not None and self.entry.op == "push"

    def next(self, op: str, time: str, digest: Digest = "", size: int = 0) -> Entry:
        """The entry that would follow."""
        seq = self.entry.seq + 1 if self.entry else 1
        return Entry(self.name, seq, op, time, digest, size, previous=self.head)


def parse_base_name(name: str, where: str) -> str:
    """`name` itself if a base may have it: one word as the parts of a ref are."""
    parse_name(f"base/{name}", where)
    return name


def current(store: Store, name: str) -> Shelved:
    """Where `name` stands; IntegrityError for a log that was changed."""
    found = Shelved(name)
    while step := store.entry(name, (found.entry.seq if found.entry else 0) + 1, log=BASES):
        entry, digest = step
        if entry.previous != found.head or entry.op not in ("push", "delete"):
            where = str(store.entry_path(name, entry.seq, log=BASES))
            raise IntegrityError(where, "does not follow the entry before it: the log was changed", "Run `adapterhub fsck`")
        found = Shelved(name, entry, digest)
    return found
