"""The interface of everything that has blobs, manifests and tags, on this machine or elsewhere.

A source is read, and a target is written to as well. `OpenRemote` is an open remote, whose methods show what its kind can do
beyond that. An object represents one adapter's name; a reference, which is a tag or a digest, selects one of its versions.
`tests/remotes/test_protocol.py` runs the same tests on every implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from adapterhub.digest import Digest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub_converters.errors import IntegrityError, ParameterError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.store.store import Entry

Progress = Callable[[int, int], None]
"""Called with the number of bytes done, and the total."""


class Reader(Protocol):
    """An unbuffered file."""

    def readinto(self, buffer: Any, /) -> Any:
        """Read up to `len(buffer)` bytes into `buffer`; return how many, 0 at the end."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """The changes made by storing a manifest.

    Attributes:
        new: The name had no such version before.
        moved: The tag was at another version before, or did not exist.
        number: The number of the version, in remotes that have numbers.
    """

    new: bool
    moved: bool
    number: int | None = None


class Source(Protocol):
    """A place that an adapter can be read from."""

    @property
    def location(self) -> str:
        """The place's name in errors."""

    def manifest(self, reference: str) -> Manifest:
        """Return the checked manifest of a tag, a range of tags, or a digest or its first digits.

        Raises:
            NotFoundError: There is no such version.
            RefError: The first digits match several versions.
            IntegrityError: The bytes do not have the digest, or are not a valid manifest.
        """

    def open_blob(self, blob: Descriptor, start: int = 0) -> AbstractContextManager[Reader]:
        """Open a blob for reading from `start` on, without verifying its bytes; NotFoundError without it."""

    def tags(self) -> list[str]:
        """Return all tags, sorted; NotFoundError if there is no such name."""

    def stop(self, *, on: bool = True) -> None:
        """Make waiting threads fail at once, until called again with `on` False."""


class Target(Source, Protocol):
    """A place that an adapter can be written to."""

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether the target has a blob of this digest and size, and keeps it until the manifest is stored."""

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Store a blob of `source`, and return how many bytes were sent.

        Raises:
            IntegrityError: The source has other bytes; they are not stored.
        """

    def put_manifest(self, manifest: Manifest, tag: str | None) -> PutResult:
        """Store a manifest, and point a tag at it.

        Raises:
            IntegrityError: The target lacks one of its blobs.
        """


class ReferringTarget(Target, Protocol):
    """A target that stores manifests of any kind, and may list them by their subject."""

    def read_document(self, reference: str) -> bytes:
        """Return the bytes of a manifest or an index, verified; NotFoundError without one."""

    def put_document(self, raw: bytes, digest: Digest, name: str | None = None) -> bool:
        """Store a manifest or an index under its digest, or a name; return whether the target will list it by its subject."""

    def referrers(self, digest: Digest) -> list[dict[str, Any]] | None:
        """Return the descriptors of the manifests about a manifest; None if the target has no such list."""


class UnnamedBlobTarget(Target, Protocol):
    """A target that takes a blob before its digest is known, so that the blob is hashed while it is sent."""

    def is_new(self) -> bool:
        """Return whether the target is empty, so that it cannot have any blob already."""

    def put_unnamed(self, size: int, path: str, source: Source) -> Digest:
        """Send a blob of `size` bytes, and return its digest."""


def damaged_error(
    location: str, size: int, digest: Digest, blob: Descriptor, hint: str = "Nothing was stored"
) -> IntegrityError:
    """Return the error for a source whose bytes, so many and of this digest, are not those of `blob`."""
    problem = f"{size} bytes of {digest} were read instead of {blob.size} of {blob.digest}"
    return IntegrityError(location, problem, hint, code="source-damaged")


def check_complete(blobs: Iterable[Descriptor], has_blob: Callable[[Descriptor], bool], location: str) -> None:
    """Raise an IntegrityError unless a place has all blobs of a manifest that is to be stored there."""
    missing = [blob for blob in blobs if not has_blob(blob)]
    if missing:
        others_text = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        problem = f"{missing[0].path or 'its config'}, blob {missing[0].digest}, is missing there{others_text}"
        raise IntegrityError(location, problem, "Try again")


class OpenRemote(Target, ABC):
    """An open remote; a context manager that closes it.

    The methods with a body are those that some kinds of remotes lack.

    Attributes:
        kind: What errors call this kind of remote.
        max_readers: How many threads may read manifests at the same time.
        hides_signature_tags: Whether `tags` leaves out those under which cosign looks for signatures.
        notes: Remarks for the user.
        commit_id: The commit that was read or made last, in a remote that has commits.
        commits: The commit of each tag, after `tags`, in a remote that has commits.
    """

    kind: ClassVar[str]
    max_readers: ClassVar[int] = 1
    hides_signature_tags: ClassVar[bool] = False
    commit_id = ""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.commits: dict[str, str] = {}

    @abstractmethod
    def open_digest(self, digest: Digest) -> Any:
        """Open a blob or manifest by digest as an unbuffered file of unverified bytes; None if absent."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections and files."""

    # The methods below have a default for remotes that lack the feature.
    def resolve(self, reference: str) -> Digest:
        """Return the digest of the version that a reference names now: the remote is asked, whatever was read before.

        It takes the references of `manifest`, and raises its errors. A remote that counts downloads counts none.
        """
        return self.manifest(reference).digest

    def stop(self, *, on: bool = True) -> None:
        """Do nothing: no thread waits long."""

    def expect(self, digest: str) -> None:
        """Write the tag only if it is at this digest, its first digits, or `absent`.

        Raises:
            ParameterError: The remote cannot compare and write in one step.
        """
        problem = f"{self.kind} cannot compare and move a tag in one step"
        raise ParameterError("expect", problem, "Leave it out", code="expect-unsupported")

    def annotate(self, message: str) -> None:
        """Record a message with the version or the tag that is written next.

        Raises:
            ParameterError: The remote keeps no messages.
        """
        raise ParameterError("message", f"{self.kind} keeps no messages", "Leave it out")

    def record_metrics(self, metrics: Mapping[str, float]) -> None:
        """Record results of other programs with the version that is written next.

        Raises:
            ParameterError: The remote keeps no metrics.
        """
        problem = f"{self.kind} keeps no metrics; registries and hubs of adapterhub do"
        raise ParameterError("metric", problem, "Leave it out")

    def tag_too(self, tags: Sequence[str]) -> bool:
        """Point more tags at the version that is written next; return False from a remote that takes one tag at a time."""
        return not tags

    def check_push(self, manifest: Manifest | None, tag: str | None) -> bool:
        """Raise the error with which the remote would refuse a version and its tags, before bytes are sent.

        Args:
            manifest: The version; None for a new one whose files are not known yet.
            tag: The tag that is to be pointed at it.

        Returns:
            Whether the remote was asked, which most decide only when they get the manifest.
        """
        return False

    def make_private(self) -> None:
        """Create the repository as private, if it has to be created.

        Raises:
            ParameterError: The remote has no repositories that are private or public.
        """
        raise ParameterError("private", "only a repository on a hub, hf://ORG/NAME, can be private", "Leave it out")

    def unsupported_error(self, feature: str, hint: str = "") -> UsageError:
        """Return the error for a feature that this kind of remote lacks; without a hint, one of the local registry only."""
        feature = f"{self.kind} has no {feature}"
        if hint:
            return UsageError(self.location, feature, hint)
        return UsageError(
            self.location, f"{feature}; this works on the local registry", code="local-only", address=self.location
        )

    def untag(self, tag: str) -> None:
        """Remove a tag; the version stays.

        Raises:
            NotFoundError: There is no such tag.
            UsageError: This kind of remote cannot remove tags.
        """
        raise self.unsupported_error("removal of tags from here", "Remove it with the tools of that place")

    def history(self) -> list[Entry]:
        """Return the moves of the name's tags, oldest first.

        Raises:
            UsageError: This kind of remote keeps no log.
        """
        raise self.unsupported_error("log")

    def as_referring_target(self) -> ReferringTarget | None:
        """Return the remote itself if it can store attachments, else None."""
        return None

    def file_signature(self, digest: Digest) -> bytes | None:
        """Return the `model.sig` beside the files of a version, unverified; None without one, or where none is kept."""
        return None

    def put_file_signature(self, manifest: Manifest, raw: bytes) -> bool:
        """Write `model.sig` beside the files of a version; return False where none is kept, or where the version is not."""
        return False

    def as_unnamed_target(self) -> UnnamedBlobTarget | None:
        """Return the remote itself if it takes blobs before their digests are known, else None."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
