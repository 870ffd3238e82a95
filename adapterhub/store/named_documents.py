"""What a registry knows by a name of one word: each name has a log of its own in the store, like the refs of adapters.

    bases/<name>/<seq>.json     one move each, created exclusively: `push` points the name at a document, `delete` frees it
    merges/<name>/<seq>.json    the same

The document, a blob, says what a base is (`adapterhub.bases.record` reads it), or is the recipe of a merged model
(`adapterhub.registry.merge_recipe`). All that has to be known of it here are the adapters that a recipe needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from adapterhub.digest import Digest, parse_digest
from adapterhub.ref import parse_name
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import FormatError, IntegrityError

from .store import BASES, Entry, Store

MAX_RECIPE = 4 << 20  # bytes


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


def current(store: Store, name: str, *, log: str = BASES) -> Shelved:
    """Where `name` stands; IntegrityError for a log that was changed."""
    found = Shelved(name)
    while step := store.entry(name, (found.entry.seq if found.entry else 0) + 1, log=log):
        entry, digest = step
        if entry.previous != found.head or entry.op not in ("push", "delete"):
            where = str(store.entry_path(name, entry.seq, log=log))
            raise IntegrityError(where, "does not follow the entry before it: the log was changed", "Run `adapterhub fsck`")
        found = Shelved(name, entry, digest)
    return found


def move(
    store: Store,
    locked: Callable[[], AbstractContextManager[None]],
    name: str,
    decide: Callable[[Shelved], Entry | None],
    *,
    log: str = BASES,
) -> None:
    """Commit the entry that `decide` makes of where the name stands; decide again when another writer was first."""
    while True:
        with locked():  # which alone decides where there are no hard links
            entry = decide(current(store, name, log=log))
            if entry is None or store.append(entry, log=log):
                return


def adapters(store: Store, document: Digest) -> dict[Digest, str]:
    """The manifests that a recipe needs, and where each was had from; FormatError where it doesn't say that."""
    raw = store.read_document(document, limit=MAX_RECIPE)
    listed = parse_object(raw.decode("utf-8", "replace"), document).get("adapters")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise FormatError(document, "is not the recipe of a merge")
    return {parse_digest(one.get("digest"), document): str(one.get("ref", "")) for one in listed}
