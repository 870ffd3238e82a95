"""The seam: anything with blobs, manifests and tags, here or elsewhere.

A source is read from, a target written to as well. An object stands for one adapter's name; which of its versions is meant
is said by a reference, a tag or a digest. `tests/remotes/test_contract.py` holds every implementation to it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from adapterhub.manifest.oci_manifest import Descriptor, Manifest

Progress = Callable[[int, int], None]
"""Is told bytes done and bytes in all."""


class Reader(Protocol):
    """An unbuffered file."""

    def readinto(self, buffer: Any, /) -> Any:
        """Fill as much of `buffer` as comes; how many bytes that is, 0 at the end."""


class Source(Protocol):
    """Where an adapter can be had."""

    @property
    def where(self) -> str:
        """What errors call it."""

    def manifest(self, reference: str) -> Manifest:
        """The checked manifest of a tag or a digest; NotFoundError when there is none.

        Raises:
            IntegrityError: The bytes are not those of the digest, or no manifest that is to be trusted.
        """

    def open_blob(self, blob: Descriptor, start: int = 0) -> AbstractContextManager[Reader]:
        """The bytes of a blob from `start` on; whoever reads checks the digest. NotFoundError when it isn't there."""

    def tags(self) -> list[str]:
        """Every tag, sorted; NotFoundError when there is no such name."""


class Target(Source, Protocol):
    """Where an adapter can be put."""

    def has(self, blob: Descriptor) -> bool:
        """Whether a blob of this digest and size is there and stays until the manifest is put."""

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Have a blob of `source`; how many bytes were sent for that.

        Raises:
            IntegrityError: Its bytes are not the right ones, and there is no such blob here.
        """

    def put_manifest(self, made: Manifest, tag: str | None) -> None:
        """Have a manifest whose blobs are all here, and point a tag at it; an error when one of them is not."""
