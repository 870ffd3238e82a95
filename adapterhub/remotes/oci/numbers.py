"""Version numbers in an OCI registry: the tags v1, v2 …, which a push adds and nobody moves.

A registry keeps no log: the version that `latest` leaves would be found by its digest alone. So a push lists the tags, puts the
manifest under the next free number, then under the tag that was asked for, and reads the number back. Of two writers that took
one number, the one that finds the other's version there takes the next. A registry cannot compare and write in one step, so a
writer that stalls between looking and writing can still replace a number; the digest of that version stays valid. A hub gives
the number itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from adapterhub import references
from adapterhub.digest import Digest
from adapterhub.http.errors import DeniedError
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.remotes.protocol import Put
from adapterhub_converters.errors import ConflictError, NotFoundError

_TRIES = 20
_AT_ONCE = 8


class Tagged(Protocol):
    """A repository whose tags are listed, read and written one by one."""

    notes: list[str]

    @property
    def where(self) -> str:
        """Its name in errors."""

    def tags(self) -> list[str]:
        """All tags."""

    def digest_of(self, reference: str) -> Digest | None:
        """The digest of the manifest that a tag or a digest is at now."""

    def point(self, made: Manifest, reference: str) -> int | None:
        """Put a manifest under its digest or a tag; return the number that a hub gives it, 0 for none; None elsewhere."""


def put(place: Tagged, made: Manifest, tag: str | None) -> Put:
    """Store a manifest under its digest, a number and a tag; a number that is asked for is at that version for good.

    Raises:
        ConflictError: The number is another version's.
    """
    tags = _tags(place)
    before = place.digest_of(tag) if tag and (tags is None or tag in tags) else None
    asked = references.number(tag) if tag else None
    if tag and asked and before not in (None, made.digest):
        what = f"is {before}, and a version number does not move"
        raise ConflictError(f"{place.where}:{tag}", what, f"Push to {place.where}, which takes the next number")
    new = place.digest_of(made.digest) is None
    number = asked if asked or new or tags is None else _number_of(place, made.digest, tags)
    given = place.point(made, made.digest)
    number = number if given is None else given or None
    wanted = tag is not None and tags is not None and given is None
    if not number and wanted:
        number = _taken(place, made, tags or ())
    if tag and (asked or before != made.digest):
        place.point(made, tag)
    if number and wanted and place.digest_of(f"v{number}") != made.digest:
        if asked:
            raise ConflictError(
                f"{place.where}:{tag}", "another writer took this number", "Review that version, or push without a number"
            )
        number = _taken(place, made, place.tags())
    return Put(new=new, moved=tag is not None and before != made.digest, number=number)


def digests(place: Tagged, tags: Sequence[str]) -> dict[str, Digest]:
    """The digest of each tag that is there."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return {tag: digest for tag, digest in zip(tags, pool.map(place.digest_of, tags), strict=True) if digest}


def _tags(place: Tagged) -> list[str] | None:
    """All tags; None from a registry that does not list them to us."""
    try:
        return place.tags()
    except NotFoundError:
        return []
    except DeniedError:
        place.notes.append("no version number: this registry does not list its tags to you")
        return None


def _numbers(tags: Iterable[str]) -> list[int]:
    """The numbers among tags, the newest first."""
    return sorted((found for tag in tags if (found := references.number(tag))), reverse=True)


def _number_of(place: Tagged, digest: Digest, tags: Sequence[str]) -> int | None:
    """The number of a version; None for a version without one, as other tools push it."""
    there = digests(place, [f"v{number}" for number in _numbers(tags)])
    return next((references.number(tag) for tag, found in there.items() if found == digest), None)


def _taken(place: Tagged, made: Manifest, tags: Iterable[str]) -> int:
    """Put a version under the next free number; return the number."""
    for _ in range(_TRIES):
        number = next(iter(_numbers(tags)), 0) + 1
        tag = f"v{number}"
        if place.digest_of(tag) is None:
            place.point(made, tag)
        if place.digest_of(tag) == made.digest:
            return number
        tags = [*place.tags(), tag]
    raise ConflictError(place.where, f"others took {_TRIES} numbers in the meantime", "Try again")
