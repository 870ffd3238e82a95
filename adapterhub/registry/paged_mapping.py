"""Long mappings of a document in pages, so that a change writes what is new and not everything again.

A mapping in the order in which it grew is cut at places that depend on its length only: pages of FAN entries, of FAN² and so
on, the largest and oldest first; fewer than FAN entries are left for the document. A page names the one before it, and the
document the last. n entries that are added one by one are written once for each size of page, thus log(n) times; a change of an
old entry writes the pages from there on. An entry of more than MAX_ENTRY bytes is a blob of its own, which its page names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from adapterhub.digest import Digest, parse_digest, sha256_bytes
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

T = TypeVar("T")
FAN = 16
MAX_ENTRY = 1024
"""Bytes of an entry in a page, and in a document."""
_BLOB = "blob"  # the only key of an entry that is a blob of its own


@dataclass(frozen=True, slots=True)
class Page:
    """Some entries of a mapping.

    Attributes:
        end: The number of entries up to its last one.
        digest: Its blob.
        size: Its bytes, with those of the blobs that its entries are.
        blobs: These blobs.
    """

    end: int
    digest: Digest
    size: int
    blobs: tuple[Digest, ...] = ()


@dataclass(frozen=True)
class Pages:
    """The part of a mapping outside its document.

    Attributes:
        pages: Its pages, oldest first.
        rest_size: Bytes of those entries of the document that are blobs of their own.
        rest_blobs: Those blobs.
    """

    pages: tuple[Page, ...] = ()
    rest_size: int = 0
    rest_blobs: tuple[Digest, ...] = ()

    @property
    def size(self) -> int:
        """The bytes of all of it."""
        return self.rest_size + sum(page.size for page in self.pages)

    @property
    def blobs(self) -> set[Digest]:
        """All blobs of it."""
        return {*self.rest_blobs, *(blob for page in self.pages for blob in (page.digest, *page.blobs))}

    @property
    def last(self) -> Digest:
        """The newest page; empty without one."""
        return self.pages[-1].digest if self.pages else ""


@dataclass(frozen=True)
class SplitMapping:
    """A mapping, divided.

    Attributes:
        rest: The entries for the document.
        pages: Everything else.
        new_blobs: The blobs that were not there before.
    """

    rest: dict[str, Any]
    pages: Pages
    new_blobs: dict[Digest, bytes]


def page_ends(count: int) -> list[int]:
    """Return where the pages of a mapping end, oldest first."""
    ends, end, size = [], 0, FAN
    while size * FAN <= count:
        size *= FAN
    while size >= FAN:
        while end + size <= count:
            end += size
            ends.append(end)
        size //= FAN
    return ends


def split(
    mapping: Mapping[str, T], before: Mapping[str, T], pages_before: Pages, jsonable: Callable[[T], Any] = lambda value: value
) -> SplitMapping:
    """Divide a mapping.

    Args:
        mapping: The mapping.
        before: The mapping before a change.
        pages_before: Its pages; those that stay the same are used again.
        jsonable: Returns a value as JSON.
    """
    entries, entries_before = list(mapping.items()), list(before.items())
    new_blobs: dict[Digest, bytes] = {}
    pages: list[Page] = []
    start, is_same = 0, True
    for end in page_ends(len(entries)):
        old = pages_before.pages[len(pages)] if is_same and len(pages) < len(pages_before.pages) else None
        # A page has the digest of the one before, so that all pages after the first changed one are new.
        is_same = old is not None and old.end == end and entries[start:end] == entries_before[start:end]
        if old is not None and is_same:
            pages.append(old)
        else:
            packed, size, blobs = _pack(entries[start:end], jsonable, new_blobs)
            raw = _dump({"before": pages[-1].digest if pages else "", "entries": packed})
            new_blobs[sha256_bytes(raw)] = raw
            pages.append(Page(end, sha256_bytes(raw), len(raw) + size, blobs))
        start = end
    rest, rest_size, rest_blobs = _pack(entries[start:], jsonable, new_blobs)
    known_blobs = pages_before.blobs
    new_blobs = {digest: raw for digest, raw in new_blobs.items() if digest not in known_blobs}
    return SplitMapping(rest, Pages(tuple(pages), rest_size, rest_blobs), new_blobs)


def join(
    rest: Mapping[str, Any], last: Digest, read: Callable[[Digest], bytes], location: str, limit: int
) -> tuple[dict[str, Any], Pages]:
    """Return a divided mapping and its pages.

    Raises:
        FormatError: A page is malformed, or they have more than `limit` bytes together.
    """
    size = 0

    def read_blob(digest: Digest) -> dict[str, Any]:
        nonlocal size
        raw = read(digest)
        # Counted while the chain is followed: nothing in the document says how long it is.
        size += len(raw)
        if size > limit:
            raise FormatError(location, f"its pages have more than {limit:,} bytes")
        return json_file.parse_object(raw, location)

    def unpack(entries: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Digest, ...]]:
        blobs = {key: parse_digest(value[_BLOB], location) for key, value in entries.items() if _is_blob(value)}
        return {key: read_blob(blobs[key]) if key in blobs else value for key, value in entries.items()}, tuple(blobs.values())

    parts: list[tuple[dict[str, Any], Page]] = []
    while last:
        before = size
        document = read_blob(parse_digest(last, location))
        if not isinstance(document.get("entries"), dict):
            raise FormatError(location, "not a page of a document")
        entries, blobs = unpack(document["entries"])
        # Its end is known once the older pages are: the chain leads from the newest back.
        parts.append((entries, Page(0, last, size - before, blobs)))
        last = str(document.get("before", ""))
    mapping: dict[str, Any] = {}
    pages = []
    for entries, page in reversed(parts):
        mapping.update(entries)
        pages.append(Page(len(mapping), page.digest, page.size, page.blobs))
    before = size
    entries, rest_blobs = unpack(rest)
    return {**mapping, **entries}, Pages(tuple(pages), size - before, rest_blobs)


def _pack(
    entries: Sequence[tuple[str, T]], jsonable: Callable[[T], Any], blobs: dict[Digest, bytes]
) -> tuple[dict[str, Any], int, tuple[Digest, ...]]:
    """Return entries for a page; put those that are too large for it into `blobs`, and return their bytes and digests."""
    packed: dict[str, Any] = {}
    size, digests = 0, []
    for key, value in entries:
        packed[key] = jsonable(value)
        raw = _dump(packed[key])
        if len(raw) > MAX_ENTRY:
            digest = sha256_bytes(raw)
            blobs[digest], packed[key] = raw, {_BLOB: digest}
            digests.append(digest)
            size += len(raw)
    return packed, size, tuple(digests)


def _is_blob(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {_BLOB}


def _dump(value: object) -> bytes:
    # Always in the same form, so that the same entries have the same digest.
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
