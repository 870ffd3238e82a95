"""The logs of a store: every move of a ref is a file of its own, whose exclusive creation is the compare-and-swap.

refs/<ns>/<name>/<seq>.json   one move each
bases/<name>/<seq>.json       the same for the names of bases (`shelf`)
merges/<name>/<seq>.json      the same for those of models kept as recipes
pending/<id>.json             a writer that has begun to move a ref and hasn't told the catalog yet
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub.digest import Digest, parse_digest, sha256_bytes
from adapterhub.ref import parse_name, parse_tag
from adapterhub_converters.containers.atomic import sync
from adapterhub_converters.containers.json_file import parse_object
from adapterhub_converters.errors import AdapterhubError, FormatError, LocalIOError, RefusedError

from .atomic import Files, link, local_errors, random_name, write_all

REFS, BASES, MERGES = "refs", "bases", "merges"  # the logs there are
MAX_ENTRY = 4 << 20  # bytes
# Operations by the version of the entry's format: an adapterhub that doesn't know one says so instead of passing it over.
_OPS = {
    1: {"push", "tag", "untag", "delete"},
    2: {"protect", "unprotect", "deprecate", "undeprecate", "keep", "keep-all", "drop"},
    3: {"evaluate"},
}
_SINCE_2 = ("message", "numbers", "keep")


@dataclass(frozen=True)
class Entry:
    """One move of a name's refs, or a word about them.

    Attributes:
        op: `push` (allots `number` and moves `tags`), `tag`, `untag`, or `delete` of the whole name; `protect` and `unprotect`
            of `tags`; `deprecate` and `undeprecate` of version `number`, or of the name if that is 0; `keep` (the newest, and
            what has a tag) and `keep-all`; `drop` of the versions `numbers` that were not kept;
            `evaluate`: what was measured of version `number`.
        digest: Of the manifest that the tags now point to; empty for `untag` and `delete`.
        size: Bytes of the manifest.
        time: When, ISO 8601 in UTC.
        previous: Digest of the entry before this one, so that the log cannot be changed in its middle.
        message: Why a version is deprecated; what was measured of it (`evaluation`).
        numbers: Versions that were dropped.
        keep: How many of the newest versions are kept.
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

    def dump(self) -> bytes:
        """The bytes of the entry's file."""
        version = next((number for number, ops in _OPS.items() if self.op in ops), 1)
        document = {"version": version, **{key: getattr(self, key) for key in _fields(version)}}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Entry:
        """The entry in the bytes of a file."""
        document = parse_object(raw.decode("utf-8", "replace"), where)
        version = document.pop("version", None)
        if isinstance(version, int) and version > max(_OPS):
            what = f"entry version {version} is newer than the {max(_OPS)} known here"
            raise RefusedError(where, what, "Upgrade adapterhub")
        if version not in _OPS or {key: type(value) for key, value in document.items()} != _fields(version):
            raise FormatError(where, "not an entry of a ref's log")
        counts = [
            *(document[key] for key in ("seq", "size", "number", "keep") if key in document),
            *document.get("numbers", ()),
        ]
        if document["op"] not in _OPS[version] or not all(type(count) is int and 0 <= count < 2**53 for count in counts):
            raise FormatError(where, "an operation or a number that makes no sense")
        if document["digest"]:
            parse_digest(document["digest"], where)
        document["numbers"] = tuple(document.get("numbers", ()))
        return cls(**{**document, "tags": tuple(parse_tag(str(tag), where) for tag in document["tags"])})


def _fields(version: int) -> dict[str, type]:
    """The fields of an entry's document in that version of the format."""
    kinds = {"seq": int, "size": int, "number": int, "keep": int, "tags": list, "numbers": list}
    return {key: kinds.get(key, str) for key in Entry.__dataclass_fields__ if version > 1 or key not in _SINCE_2}


class Logs(Files):
    """The logs below `root`."""

    # ---- the log of a name's refs

    def names(self) -> list[str]:
        """Every name that has ever had a ref, sorted."""
        refs = self.root / "refs"
        with local_errors(refs):
            spaces = [space for space in refs.iterdir() if space.is_dir()]
            return sorted(f"{space.name}/{name.name}" for space in spaces for name in space.iterdir() if name.is_dir())

    def base_names(self) -> list[str]:
        """Every name that has ever meant a base, sorted."""
        return self.shelved(BASES)

    def shelved(self, log: str) -> list[str]:
        """Every name that has a log among the bases or the merges, sorted."""
        folder = self.root / log
        with local_errors(folder), contextlib.suppress(FileNotFoundError):  # the first one makes it
            return sorted(item.name for item in folder.iterdir() if item.is_dir())
        return []

    def entry_path(self, name: str, seq: int, *, log: str = REFS) -> Path:
        """The file of one entry."""
        return self.root / log / name / f"{seq:08}.json"

    def entry(self, name: str, seq: int, *, log: str = REFS) -> tuple[Entry, Digest] | None:
        """Entry `seq` (from 1) of a name's log and the digest of its bytes; None when the log ends before it."""
        path = self.entry_path(name, seq, log=log)
        try:
            with open(path, "rb") as file:
                raw = file.read(MAX_ENTRY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LocalIOError(str(path), error.strerror or str(error)) from error
        entry = Entry.parse(raw, str(path))
        if (entry.name, entry.seq) != (name, seq):
            raise FormatError(str(path), f"belongs to {entry.name[:80]} {entry.seq}, not here")
        return entry, sha256_bytes(raw)

    def has_entry_after(self, name: str, seq: int, *, log: str = REFS) -> bool:
        """Whether there is an entry of a number beyond `seq`: where the log ends before it, one in between was lost."""
        files = (path.stem for path in (self.root / log / name).glob("*.json"))
        return any(stem.isdecimal() and int(stem) > seq for stem in files)

    def log(self, name: str) -> Iterator[Entry]:
        """Every entry of a name's log, the first one first."""
        seq = 1
        while found := self.entry(name, seq):
            yield found[0]
            seq += 1

    def append(self, entry: Entry, *, log: str = REFS) -> bool:
        """Commit an entry, flushed; False when another writer had that number first."""
        final = self.entry_path(entry.name, entry.seq, log=log)
        with local_errors(final), self._temporary() as (path, file):
            self._make_dir(final.parent)
            write_all(file, entry.dump())
            os.fsync(file.fileno())
            file.close()
            if not link(path, final):
                return False
            sync(final.parent)
        return True

    # ---- intents

    def begin(self, name: str) -> Path:
        """Say that a ref of `name` is about to move, flushed; unlink what is returned once the catalog knows."""
        final = self.root / "pending" / f"{random_name()}.json"
        with local_errors(final):
            self._replace(final, json.dumps({"name": name}).encode())
        return final

    def pending(self) -> list[tuple[Path, str]]:
        """Intents that were left or are at work now, with their names."""
        found = []
        with local_errors(self.root):
            for path in sorted((self.root / "pending").iterdir()):
                # Its writer may have finished just now. One that can't be read is left for fsck to report.
                with contextlib.suppress(FileNotFoundError, UnicodeDecodeError, AdapterhubError):
                    found.append((path, parse_name(str(parse_object(path.read_text(), "").get("name")), "")))
        return found
