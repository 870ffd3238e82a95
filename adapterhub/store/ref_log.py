"""The ref log of a store: each move of a ref is one file, and creating that file exclusively is the compare-and-swap.

refs/<ns>/<name>/<seq>.json   moves of an adapter's refs
bases/<name>/<seq>.json       moves of the name of a base model (`named_documents`)
merges/<name>/<seq>.json      moves of the name of a merge recipe
hub/<ns>/<name>/<seq>.json    moves of a hub's record of a repository
pending/<id>.json             a move that has begun and that registry.db may not contain yet
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import field
from pathlib import Path

from adapterhub.digest import Digest, parse_digest, sha256_bytes
from adapterhub.ref import RefError, is_name, parse_name, parse_tag
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .store_files import MAX_DOCUMENT, StoreFiles, local_errors, random_name, write_all

REFS, BASES, MERGES, HUB = "refs", "bases", "merges", "hub"
DOCUMENTS = (BASES, MERGES, HUB)
"""Logs of names that point at documents."""
MAX_RESTORES = 100
"""Restores of one name: each has a replay apply the whole log again."""
# Operations by the version of the format that introduced them. An adapterhub that does not know a version refuses its entries:
# skipping one would show a state that never was.
_OPS_BY_VERSION = {
    1: {"push", "tag", "untag", "delete"},
    2: {"protect", "unprotect", "deprecate", "undeprecate", "keep", "keep-all", "drop"},
    3: {"evaluate"},
    4: {"restore"},
}
_OPS_BY_VERSION[5] = set().union(*_OPS_BY_VERSION.values())  # each with its author, and a push or a tag with a message
_OPS_BY_VERSION[6] = {"approve", "rollback", "withdraw", "unwithdraw"}
_OPS_BY_VERSION[7] = {"rollout"}
_OPS_BY_VERSION[8] = {"keep"}  # with a time
TAG_MOVES = ("push", "tag", "rollback", "restore")
"""The operations that point the tags of an entry at its version; `untag` removes them."""
_FIELD_SINCE_VERSION = {"message": 2, "numbers": 2, "keep": 2, "author": 5, "ttl": 8}


@dataclass(frozen=True)
class Entry:
    """One move of a name's refs, or one change of its settings.

    Attributes:
        op: `push` (assigns `number` and moves `tags`), `tag`, `untag`, `delete` (the whole name); `protect` and `unprotect`
            (`tags`); `deprecate` and `undeprecate` (version `number`, or the whole name if that is 0); `keep` (gc keeps the
            `keep` newest versions, those younger than `ttl`, and the tagged ones) and `keep-all`; `drop` (gc removed the
            versions `numbers`); `evaluate` (a measurement of version `number`); `restore` (undoes the last `delete`, for
            the versions `numbers`); `approve` (a statement for the move of `tags` to version `number`); `rollback` (a `tag`
            back to an earlier version); `withdraw` and `unwithdraw` (version `number`, which is to be used no more, or
            again); `rollout` (where that of version `number` stands).
        digest: Digest of the manifest that the tags now point to; empty for `untag` and `delete`.
        size: Size of that manifest in bytes.
        time: ISO 8601 in UTC.
        previous: Digest of the preceding entry, so that the log cannot be changed in its middle.
        message: Why a version was pushed, tagged or deprecated; for `evaluate`, the measurement (`manifest.measurement`); for
            `approve` and `withdraw`, a statement (`manifest.release_statement`); for `rollout`, its state
            (`manifest.rollout_state`).
        numbers: Versions that were dropped or restored.
        keep: Number of newest versions to keep.
        author: The user who wrote the entry, as their program names them; empty if unknown.
        ttl: Seconds for which a version is kept after its push; 0 for no such time.
    """

    name: str
    seq: int
    op: str
    time: str
    digest: Digest = ""
    size: int = 0
    number: int = 0
    tags: tuple[str, ...] = field(default_factory=tuple)
    previous: Digest = ""
    message: str = ""
    numbers: tuple[int, ...] = field(default_factory=tuple)
    keep: int = 0
    author: str = ""
    ttl: int = 0

    def dump(self) -> bytes:
        """Return the bytes of the entry's file, in the oldest version of the format that can express it."""
        # The oldest version, so that older programs that share the registry can read as many entries as possible.
        version = min(number for number, ops in _OPS_BY_VERSION.items() if self.op in ops)
        version = max(version, 5) if self.author or (self.message and version == 1) else version
        version = 8 if self.ttl else version
        document = {"version": version, **{key: getattr(self, key) for key in _fields(version)}}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, raw: bytes, location: str) -> Entry:
        """Parse the bytes of an entry's file.

        Raises:
            FormatError: It is malformed.
            RefusedError: It is of a newer format.
        """
        document = parse_object(raw.decode("utf-8", "replace"), location)
        version = document.pop("version", None)
        if isinstance(version, int) and version > max(_OPS_BY_VERSION):
            problem = f"entry version {version} is newer than version {max(_OPS_BY_VERSION)}, the last supported"
            raise RefusedError(location, problem, "Upgrade adapterhub", code="newer-store")
        # Exactly the fields of the version: another field could change what the entry means.
        kinds = {key: type(value) for key, value in document.items()}
        if type(version) is not int or version not in _OPS_BY_VERSION or kinds != _fields(version):
            raise FormatError(location, "not an entry of a ref log")
        # JSON numbers are exact up to 2^53 in every program.
        counts = [
            *(document[key] for key in ("seq", "size", "number", "keep", "ttl") if key in document),
            *document.get("numbers", ()),
        ]
        if document["op"] not in _OPS_BY_VERSION[version] or not all(
            type(count) is int and 0 <= count < 2**53 for count in counts
        ):
            raise FormatError(location, "has an unknown operation, or a number that is out of range")
        if document["digest"]:
            parse_digest(document["digest"], location)
        document["numbers"] = tuple(document.get("numbers", ()))
        try:
            tags = tuple(parse_tag(str(tag), location) for tag in document["tags"])
        except RefError as error:
            raise FormatError(location, error.what) from error
        return cls(**{**document, "tags": tags})


def parse_entry_at(raw: bytes, name: str, seq: int, location: str) -> tuple[Entry, Digest]:
    """Parse the bytes of entry `seq` of a name's log; return the entry and the digest of the bytes.

    Raises as `Entry.parse` does, and FormatError with the code `misplaced` for the entry of another name or number.
    """
    entry = Entry.parse(raw, location)
    if (entry.name, entry.seq) != (name, seq):
        raise FormatError(location, f"is entry {entry.seq} of {entry.name[:80]}", code="misplaced")
    return entry, sha256_bytes(raw)


def _fields(version: int) -> dict[str, type]:
    """Return the fields of an entry in that version of the format, with their JSON types."""
    kinds = {"seq": int, "size": int, "number": int, "keep": int, "ttl": int, "tags": list, "numbers": list}
    return {key: kinds.get(key, str) for key in Entry.__dataclass_fields__ if version >= _FIELD_SINCE_VERSION.get(key, 1)}


def entries_in_force(entries: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Return the entries of a name that are in force, and those that its last removal undid, each oldest first.

    A push of a version that a `restore` could not bring back is in neither list.
    """
    current: list[Entry] = []
    removed: list[Entry] = []
    for entry in entries:
        if entry.op == "delete":
            current, removed = [], current
        elif entry.op == "restore":
            current = [undone for undone in removed if undone.op != "push" or undone.number in entry.numbers]
            current += [entry] if entry.tags else []
        else:
            current.append(entry)
    return current, removed


class RefLog:
    """The logs below the root of a store, one per name."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self.root = files.root

    def names(self, log: str = REFS, namespace: str = "") -> list[str]:
        """Return the adapter names in the log REFS or HUB, sorted, including removed ones: all, or those in a namespace."""
        return sorted(name for name, _ in self._folders(log, namespace) if is_name(name))

    def stray_folders(self) -> list[Path]:
        """Return the folders among the logs whose names are not valid adapter names."""
        return sorted(path for name, path in self._folders(REFS) if not is_name(name))

    def _folders(self, log: str, namespace: str = "") -> Iterator[tuple[str, Path]]:
        root = self.root / log
        with local_errors(root), contextlib.suppress(FileNotFoundError):  # created with the first name
            for space in [root / namespace] if namespace else self._files.list_subfolders(root):
                yield from ((f"{space.name}/{name.name}", name) for name in self._files.list_subfolders(space))

    def document_names(self, log: str = BASES) -> list[str]:
        """Return every name in one of DOCUMENTS, including freed ones, sorted."""
        if log == HUB:
            return self.names(HUB)
        folder = self.root / log
        with local_errors(folder), contextlib.suppress(FileNotFoundError):  # created with the first name
            return [item.name for item in self._files.list_subfolders(folder)]
        return []

    def path(self, name: str, seq: int, *, log: str = REFS) -> Path:
        """Return the path of an entry's file."""
        return self.root / log / name / f"{seq:08}.json"

    def where(self, name: str, seq: int, *, log: str = REFS) -> str:
        """Return the path of an entry's file below the root, for people."""
        return self.path(name, seq, log=log).relative_to(self.root).as_posix()

    def entry(self, name: str, seq: int, *, log: str = REFS) -> tuple[Entry, Digest] | None:
        """Read entry `seq` (from 1) of a name's log and the digest of its bytes; None past the end of the log."""
        if self.ends_at(name, seq - 1, log=log):
            return None
        path = self.path(name, seq, log=log)
        with local_errors(path), contextlib.suppress(FileNotFoundError):
            raw = self._files.read(path, MAX_DOCUMENT)
            try:
                return parse_entry_at(raw, name, seq, str(path))
            except FormatError as error:
                code = error.own_code or "check-registry"
                raise FormatError(error.where, error.what, "Check the registry", code=code) from error
        return None

    def ends_at(self, name: str, seq: int, *, log: str = REFS) -> bool:
        """Return True if there is no entry after `seq`.

        This is called far more often than an entry is read, so it is one system call. It may follow a link on the way, which
        does no harm: reading an entry refuses links.
        """
        try:
            os.lstat(os.path.join(self.root, log, name, f"{seq + 1:08}.json"))
        except FileNotFoundError:
            return True
        except OSError:
            pass  # reported when the entry is read
        return False

    def has_entry_after(self, name: str, seq: int, *, log: str = REFS) -> bool:
        """Return True if there is an entry with a number above `seq`.

        If the log ends at `seq` nevertheless, an entry in between was lost.
        """
        return bool(self.files_after(name, seq, log=log))

    def files_after(self, name: str, seq: int, *, log: str = REFS) -> list[Path]:
        """Return the files of entries with a number above `seq`, sorted."""
        folder = self.root / log / name
        with local_errors(folder), contextlib.suppress(FileNotFoundError):
            files = [path for path in self._files.list_folder(folder) if path.suffix == ".json"]
            return [path for path in files if path.stem.isdecimal() and int(path.stem) > seq]
        return []

    def entries(self, name: str) -> Iterator[Entry]:
        """Yield the entries of a name's log, oldest first."""
        seq = 1
        while logged := self.entry(name, seq):
            yield logged[0]
            seq += 1

    def append(self, entry: Entry, *, log: str = REFS) -> bool:
        """Commit an entry, flushed; return False if another writer took its number first."""
        return self._write(entry.dump(), entry, log)

    def mirror(self, raw: bytes, entry: Entry, *, log: str = REFS) -> None:
        """Write an entry that was committed elsewhere, with the bytes it has there, unless it is here already."""
        self._write(raw, entry, log)

    def _write(self, raw: bytes, entry: Entry, log: str) -> bool:
        final = self.path(entry.name, entry.seq, log=log)
        with local_errors(final), self._files.temporary() as (path, file):
            self._files.make_dir(final.parent)
            write_all(file, raw)
            os.fsync(file.fileno())
            file.close()
            # Flushed before it gets its name, as taking the name commits the entry.
            if not self._files.claim(path, final):
                return False
            self._files.sync(final.parent)
        return True

    def begin_move(self, name: str) -> Path:
        """Record, flushed, that a ref of `name` is about to move; the caller removes the file once registry.db has the move."""
        final = self.root / "pending" / f"{random_name()}.json"
        with local_errors(final):
            self._files.replace(final, json.dumps({"name": name}).encode())
        return final

    def pending_moves(self) -> list[tuple[Path, str]]:
        """Return the files of unfinished moves and the names they are about; their writers may be running or killed."""
        moves = []
        with local_errors(self.root):
            for path in self._files.list_folder(self.root / "pending"):
                # The writer may have finished just now. An unreadable file, or a folder, is left for fsck to report.
                with contextlib.suppress(FileNotFoundError, IsADirectoryError, AdapterhubError):
                    moves.append(
                        (path, parse_name(str(parse_object(self._files.read(path, MAX_DOCUMENT), "").get("name")), ""))
                    )
        return moves
