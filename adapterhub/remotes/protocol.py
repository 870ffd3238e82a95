"""The interface of everything that has blobs, manifests and tags, on this machine or elsewhere.

A source is read, a target is written to as well; `Connected` is an open remote, whose methods tell what its kind can do beyond
that. An object stands for one adapter's name; a reference, a tag or a digest, selects one of its versions.
`tests/remotes/test_contract.py` runs the same tests on every implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub_converters.errors import IntegrityError, ParameterError, UsageError

if TYPE_CHECKING:
    from adapterhub.store.store import Entry

Progress = Callable[[int, int], None]
"""Called with the bytes that are done, and all bytes."""


class Reader(Protocol):
    """An unbuffered file."""

    def readinto(self, buffer: Any, /) -> Any:
        """Read up to `len(buffer)` bytes into `buffer`; return how many, 0 at the end."""


@dataclass(frozen=True, slots=True)
class Put:
    """What has changed by putting a manifest.

    Attributes:
        new: The name had no such version before.
        moved: The tag was at another version before, or at none.
        number: The number of the version, where places of this kind have numbers.
    """

    new: bool
    moved: bool
    number: int | None = None


class Source(Protocol):
    """A place that an adapter can be read from."""

    @property
    def where(self) -> str:
        """Its name in errors."""

    def manifest(self, reference: str) -> Manifest:
        """The checked manifest of a tag, a range of tags, or a digest or the first digits of one.

        Raises:
            NotFoundError: There is none.
            RefError: The first digits are those of several versions.
            IntegrityError: The bytes do not have the digest, or are not a valid manifest.
        """

    def open_blob(self, blob: Descriptor, start: int = 0) -> AbstractContextManager[Reader]:
        """The bytes of a blob from `start` on, unverified: the reader compares the digest. NotFoundError without the blob."""

    def tags(self) -> list[str]:
        """All tags, sorted; NotFoundError if there is no such name."""

    def stop(self, *, on: bool = True) -> None:
        """Have what other threads wait for here fail at once, until called with `on` False."""


class Target(Source, Protocol):
    """A place that an adapter can be written to."""

    def has(self, blob: Descriptor) -> bool:
        """Tell whether a blob of this digest and size is there, and stays until the manifest is put."""

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Store a blob of `source`; return how many bytes were sent.

        Raises:
            IntegrityError: The source has other bytes; they are not stored.
        """

    def put_manifest(self, made: Manifest, tag: str | None) -> Put:
        """Store a manifest, and point a tag at it.

        Raises:
            IntegrityError: One of its blobs is not here.
        """


class Referring(Target, Protocol):
    """A target that stores manifests of any kind, and may list them by the manifest that they are about."""

    def document(self, reference: str) -> bytes:
        """The bytes of a manifest or an index, verified; NotFoundError without one."""

    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index under its digest, or a name; return whether it is going to be listed by its subject."""

    def referrers(self, digest: Digest) -> list[dict[str, Any]] | None:
        """The descriptors of the manifests about a manifest; None if the place has no such list."""


class Unnamed(Target, Protocol):
    """A target that takes a blob before its digest is known, so that it is hashed while it is sent."""

    def is_new(self) -> bool:
        """Tell whether nothing is there, so that no blob can be there already."""

    def put_unnamed(self, size: int, path: str, source: Source) -> Digest:
        """Send a blob of `size` bytes; return its digest."""


def damaged(where: str, size: int, digest: Digest, blob: Descriptor, hint: str = "Nothing was stored") -> IntegrityError:
    """Return the error for other bytes of a source than those of `blob`: so many, of this digest."""
    what = f"{size} bytes of {digest} were read instead of {blob.size} of {blob.digest}"
    return IntegrityError(where, what, hint, code="source-damaged")


def check_complete(blobs: Iterable[Descriptor], has: Callable[[Descriptor], bool], where: str) -> None:
    """IntegrityError unless a place `has` all blobs of a manifest that is to be stored there."""
    missing = [blob for blob in blobs if not has(blob)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        what = f"{missing[0].path or 'its config'}, blob {missing[0].digest}, is missing there{more}"
        raise IntegrityError(where, what, "Try again")


class Connected(Target, ABC):
    """An open remote, a context manager that closes it. The methods with a body are those that some kinds of remotes lack.

    Attributes:
        kind: The words for places of this kind.
        at_once: How many threads may read manifests at the same time.
        notes: Remarks for the user.
        commit_id: The commit that was read or made last, in a remote that has commits.
        commits: The commit of each tag, after `tags`, in a remote that has commits.
    """

    kind: ClassVar[str]
    at_once: ClassVar[int] = 1
    commit_id = ""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.commits: dict[str, str] = {}

    @abstractmethod
    def find(self, digest: Digest) -> Any:
        """An unbuffered file with the unverified bytes of a digest, blob or manifest, to be closed; None without one."""

    @abstractmethod
    def close(self) -> None:
        """Close its connections and files."""

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: no thread waits long."""

    def expect(self, digest: str) -> None:
        """Write the tag only if it is at this digest, its first digits, or `absent`.

        Raises:
            ParameterError: The remote cannot compare and write in one step.
        """
        what = f"{self.kind} cannot compare and move a tag in one step"
        raise ParameterError("expect", what, "Leave it out", code="expect-unsupported")

    def annotate(self, message: str) -> None:
        """Record a message with the version or the tag that is written next.

        Raises:
            ParameterError: The remote keeps no messages.
        """
        raise ParameterError("message", f"{self.kind} keeps no messages", "Leave it out")

    def make_private(self) -> None:
        """Create the repository as private, if it has to be created.

        Raises:
            ParameterError: The remote has no repositories that are private or public.
        """
        raise ParameterError("private", "only a repository on a hub, hf://ORG/NAME, can be private", "Leave it out")

    def lacking(self, what: str, hint: str = "") -> UsageError:
        """The error for something that this kind of place does not have, and without a hint the local registry alone."""
        what = f"{self.kind} has no {what}"
        if hint:
            return UsageError(self.where, what, hint)
        return UsageError(self.where, f"{what}; this works on the local registry", code="local-only", address=self.where)

    def untag(self, tag: str) -> None:
        """Remove a tag; the version stays.

        Raises:
            NotFoundError: There is no such tag.
            UsageError: This kind of remote cannot.
        """
        raise self.lacking("removal of tags from here", "Remove it with the tools of that place")

    def history(self) -> list[Entry]:
        """The moves of the name's tags, the oldest first.

        Raises:
            UsageError: This kind of remote keeps none.
        """
        raise self.lacking("log")

    def referring(self) -> Referring | None:
        """The remote itself, if it can store attachments."""
        return None

    def unnamed(self) -> Unnamed | None:
        """The remote itself, if it takes blobs before their digests are known."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
