"""Version numbers in an OCI registry: the tags v1, v2 …, which a push adds and nobody moves.

A registry keeps no log: once `latest` moves on, the previous version could be found only by its digest. So a push lists the
tags, puts the manifest under the next free number, then under the requested tag, and reads the number back. If two writers took
the same number, the one that finds the other's version there takes the next. A registry cannot compare and write in one step,
so a writer that stalls between looking and writing can still replace a number; the digest of that version stays valid. An
adapterhub hub assigns the number itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from adapterhub.digest import Digest
from adapterhub.http.http_errors import DeniedError
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.registry import version_selection
from adapterhub.remotes.protocol import PutResult
from adapterhub_converters.errors import ConflictError, NotFoundError

_MAX_TRIES = 20
_THREADS = 8


class TaggedRepository(Protocol):
    """A repository whose tags are listed, read and written one by one."""

    notes: list[str]

    @property
    def location(self) -> str:
        """The repository's name in errors."""

    def tags(self) -> list[str]:
        """Return all tags."""

    def digest_of(self, reference: str) -> Digest | None:
        """Return the digest of the manifest that a tag or digest refers to now."""

    def put_reference(self, manifest: Manifest, reference: str) -> int | None:
        """Put a manifest under its digest or a tag.

        Returns:
            The number that a hub gives it, 0 if the hub gives none; None from a registry that is no hub.
        """


def put_numbered(repository: TaggedRepository, manifest: Manifest, tag: str | None) -> PutResult:
    """Store a manifest under its digest, a number and a tag; a number that was requested stays at that version for good.

    Raises:
        ConflictError: The requested number is another version's.
    """
    tags = _list_tags(repository)
    previous_digest = repository.digest_of(tag) if tag and (tags is None or tag in tags) else None
    requested_number = version_selection.number(tag) if tag else None
    if tag and requested_number and previous_digest not in (None, manifest.digest):
        problem = f"is {previous_digest}, and a version number does not move"
        raise ConflictError(
            f"{repository.location}:{tag}", problem, f"Push to {repository.location}, which takes the next number"
        )
    # A version that is there already keeps its number, unless another number was requested.
    is_new = repository.digest_of(manifest.digest) is None
    number = requested_number if requested_number or is_new or tags is None else _number_of(repository, manifest.digest, tags)
    hub_number = repository.put_reference(manifest, manifest.digest)
    number = number if hub_number is None else hub_number or None
    needs_number = tag is not None and tags is not None and hub_number is None
    if not number and needs_number:
        number = _take_number(repository, manifest, tags or ())
    if tag and (requested_number or previous_digest != manifest.digest):
        repository.put_reference(manifest, tag)
    # Read the number back: another writer may have taken it since the tags were listed.
    if number and needs_number and repository.digest_of(f"v{number}") != manifest.digest:
        if requested_number:
            raise ConflictError(
                f"{repository.location}:{tag}",
                "another writer took this number",
                "Review that version, or push without a number",
            )
        number = _take_number(repository, manifest, repository.tags())
    return PutResult(new=is_new, moved=tag is not None and previous_digest != manifest.digest, number=number)


def digests_by_tag(repository: TaggedRepository, tags: Sequence[str]) -> dict[str, Digest]:
    """Return the digest of each tag that exists."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return {tag: digest for tag, digest in zip(tags, pool.map(repository.digest_of, tags), strict=True) if digest}


def _list_tags(repository: TaggedRepository) -> list[str] | None:
    """Return all tags; None from a registry that does not list them to this user."""
    try:
        return repository.tags()
    except NotFoundError:
        return []
    except DeniedError:
        repository.notes.append("no version number: this registry does not list its tags to you")
        return None


def _numbers(tags: Iterable[str]) -> list[int]:
    """Return the numbers among tags, newest first."""
    return sorted((number for tag in tags if (number := version_selection.number(tag))), reverse=True)


def _number_of(repository: TaggedRepository, digest: Digest, tags: Sequence[str]) -> int | None:
    """Return the number of a version; None without one, as other tools push it."""
    numbered_digests = digests_by_tag(repository, [f"v{number}" for number in _numbers(tags)])
    return next(
        (version_selection.number(tag) for tag, version_digest in numbered_digests.items() if version_digest == digest), None
    )


def _take_number(repository: TaggedRepository, manifest: Manifest, tags: Iterable[str]) -> int:
    """Put a version under the next free number, and return the number."""
    for _ in range(_MAX_TRIES):
        number = next(iter(_numbers(tags)), 0) + 1
        tag = f"v{number}"
        # Look before writing, since a registry would replace the tag, and after it, since another writer may have done so.
        if repository.digest_of(tag) is None:
            repository.put_reference(manifest, tag)
        if repository.digest_of(tag) == manifest.digest:
            return number
        tags = [*repository.tags(), tag]
    raise ConflictError(repository.location, f"others took {_MAX_TRIES} numbers in the meantime", "Try again")
