"""What a gc has read of logs and manifests, kept in `gc.json` for the next one, which reads only what is new.

Logs only grow, and manifests are named by their digests, so what was read of them stays true. The last entry that was read of a
log is read again: if it is another one, as in a registry that was restored from a backup, so is the whole log. The file begins
with the digest of the rest: one that is damaged, or of another version, counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import field
from pathlib import Path
from typing import Any

from adapterhub.digest import Digest
from adapterhub.store.store import Entry, Store
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError
from adapterhub_converters.lazy_dataclass import dataclass

_VERSION = 1
_MAX_FILE = 1 << 30  # bytes; a version takes some 500


@dataclass
class LogMarks:
    """What was read of a log: its versions, and all digests it has ever named.

    `released` has the digests of former versions, each with number and time of the entry that dropped or removed it; `removed`,
    the versions that the last removal of the name took, which may be restored. A base or a recipe has one version, number 1,
    whose digest is that of its document.
    """

    seq: int = 0
    head: Digest = ""
    versions: dict[int, Digest] = field(default_factory=dict)
    removed: dict[int, Digest] = field(default_factory=dict)
    named: set[Digest] = field(default_factory=set)
    released: list[tuple[int, str, Digest]] = field(default_factory=list)

    def apply(self, entry: Entry) -> None:
        """Apply the next entry of a name's log."""
        if entry.op == "push":
            self.versions[entry.number] = entry.digest
            self.named.add(entry.digest)
        elif entry.op == "delete":
            self.removed = dict(self.versions)
        elif entry.op == "restore":
            self.versions = {number: digest for number, digest in self.removed.items() if number in entry.numbers}
        released_numbers = list(self.versions) if entry.op == "delete" else entry.numbers if entry.op == "drop" else ()
        for number in released_numbers:
            if number in self.versions:
                self.released.append((entry.seq, entry.time, self.versions.pop(number)))

    def apply_to_document(self, entry: Entry) -> None:
        """Apply the next entry of a document's log; the document is released when its name is freed or gets another."""
        self.released += [(entry.seq, entry.time, digest) for digest in self.versions.values()]
        self.versions = {1: entry.digest} if entry.op == "push" else {}

    def dump(self) -> list[Any]:
        """Return the marks as JSON values, of which `parse` is the inverse."""
        versions, removed = ([[number, digest] for number, digest in part.items()] for part in (self.versions, self.removed))
        return [self.seq, self.head, versions, removed, sorted(self.named), self.released]

    @classmethod
    def parse(cls, values: list[Any]) -> LogMarks:
        """Return the marks that were dumped."""
        last, head, versions, removed, named, released = values
        return cls(
            last, head, dict(versions), dict(removed), set(named), [(seq, time, digest) for seq, time, digest in released]
        )


@dataclass
class Marks:
    """What was read of a store.

    Attributes:
        logs: By kind of log and name.
        blobs: The blobs that a manifest or a record of a repository needs, itself included, by its digest.
        raw: The file that they were read from; empty without one.
    """

    logs: dict[tuple[str, str], LogMarks] = field(default_factory=dict)
    blobs: dict[Digest, set[Digest]] = field(default_factory=dict)
    raw: bytes = b""


def read(store: Store) -> Marks:
    """Return the marks of the last gc; none if their file is missing or damaged."""
    with contextlib.suppress(AdapterhubError, OSError, ValueError, TypeError, KeyError, AttributeError):
        raw = store.files.read(_path(store), _MAX_FILE)
        digest, _, text = raw.partition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() == digest:
            document = json_file.parse_object(text, str(_path(store)), memory=None)
            if document["version"] == _VERSION:
                logs = {(kind, name): LogMarks.parse(values) for kind, name, values in document["logs"]}
                return Marks(logs, {digest: set(blobs) for digest, blobs in document["blobs"].items()}, raw)
    return Marks()


def write(store: Store, marks: Marks, needed: set[Digest]) -> None:
    """Keep marks for the next gc, of the manifests in `needed` alone, unless they are those of the last one."""
    logs = [[kind, name, log.dump()] for (kind, name), log in sorted(marks.logs.items())]
    blobs = {digest: sorted(blobs) for digest, blobs in sorted(marks.blobs.items()) if digest in needed}
    text = json.dumps({"version": _VERSION, "logs": logs, "blobs": blobs}, separators=(",", ":")).encode()
    raw = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
    if raw != marks.raw:
        with contextlib.suppress(LocalIOError):  # without it, as on a full disk, the next gc reads everything
            store.files.replace(_path(store), raw)


def _path(store: Store) -> Path:
    return store.root / "gc.json"
