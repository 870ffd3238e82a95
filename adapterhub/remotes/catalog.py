"""The interface behind commands about names, which list, search, log, tag, deprecate and remove them.

A local registry and a hub of ours both implement it (`local_catalog`, `hub.hub_catalog`), so that a command does the same in
both places. `version_documents` and `content_documents` have the values as JSON: that of `--json`, and of the hub's API.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.index.queries import VersionRow
    from adapterhub.index.version_search import Query, SearchResult
    from adapterhub.maintenance.disk_usage import BaseUsage, UsageReport
    from adapterhub.manifest.keep_rule import KeepRule
    from adapterhub.ref import Ref
    from adapterhub.registry.content_search import Bar, ContentMatches, FileContents
    from adapterhub.registry.registry import Version
    from adapterhub.registry.releases.release_moves import Withdrawal
    from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
    from adapterhub.registry.shown_version import VersionDocument
    from adapterhub.registry.version_lookup import RestoreResult
    from adapterhub.store.store import Entry, Progress

    from .release_documents import PromotionReport

Deprecations = Mapping[tuple[str, int], str]
"""The reason of each deprecation by name and version number; number 0 means the whole name."""


def no_bar(_title: str) -> AbstractContextManager[Progress | None]:
    """Show no progress."""
    return nullcontext()


@dataclass(frozen=True)
class Listing:
    """Versions, sorted by name, newest first, and the deprecations among them."""

    rows: Sequence[VersionRow]
    deprecations: Deprecations = field(default_factory=dict)


@dataclass(frozen=True)
class SearchAnswer:
    """The result of a search, and the deprecations of the versions in it."""

    result: SearchResult
    deprecations: Deprecations


@dataclass(frozen=True)
class ContentAnswer:
    """The versions that contain something.

    Attributes:
        matches: The result for each file, folder or digest that was searched for.
        deprecations: The deprecations of the versions.
        unlisted: Number of weight files whose tensors could not be searched.
    """

    matches: Sequence[ContentMatches]
    deprecations: Deprecations
    unlisted: int


@dataclass(frozen=True)
class SizedModel:
    """A model whose size is known: its path or name, its identity, and the bytes of its weights."""

    location: str
    repo: str | None
    fingerprint: str | None
    size: int

    def fits(self, base: BaseUsage) -> bool:
        """Return whether this is the base of some versions."""
        if base.fingerprint:
            return base.fingerprint == self.fingerprint
        return base.repo is not None and base.repo == self.repo


@dataclass(frozen=True)
class DiskUsage:
    """The disk usage of versions, and the sizes of the bases that are registered beside them."""

    report: UsageReport
    models: Sequence[SizedModel]


class ContentQuery(NamedTuple):
    """Something to search for: its name in the answer, and the first digits of a digest, or the digests of a file or folder."""

    name: str
    contents: str | FileContents


class Catalog(ABC):
    """The names of one registry; a context manager that closes it.

    Every method that takes a ref or a name may raise RefError, NotFoundError or IntegrityError; one on another machine may
    also raise RemoteError.

    Attributes:
        location: The registry in messages: a path or a URL.
    """

    location: str

    @abstractmethod
    def list(self, prefix: str | None = None) -> Listing:
        """Return all versions, or those of one name or namespace."""

    @abstractmethod
    def versions_with(self, digest: Digest) -> Sequence[VersionRow]:
        """Return the versions with this manifest."""

    @abstractmethod
    def search(self, query: Query, *, facets: bool) -> SearchAnswer:
        """Return the versions that match, best first."""

    @abstractmethod
    def log(self, ref: Ref) -> Sequence[Entry]:
        """Return the log of a name, removed or not, newest entry first; for a tag or version, only the entries about it."""

    @abstractmethod
    def lineage(self, ref: Ref) -> dict[str, Any]:
        """Return what a version was made from, and what was made from it (`content_documents.lineage_document`)."""

    @abstractmethod
    def find(self, content_queries: Sequence[ContentQuery], bar: Bar = no_bar) -> ContentAnswer:
        """Return the versions that contain files, folders or digests."""

    @abstractmethod
    def show(self, ref: Ref) -> VersionDocument:
        """Return everything that is known of a version."""

    @abstractmethod
    def usage(self, prefix: str | None = None, bar: Bar = no_bar) -> DiskUsage:
        """Return the disk usage of the versions of a name or namespace, or of all."""

    @abstractmethod
    def tag(self, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
        """Point a tag at a version; with `expect`, only if it is at that digest, or `absent`."""

    @abstractmethod
    def restore_tag(self, ref: Ref, seq: int | None = None) -> Version:
        """Point a tag where it pointed before its last move or removal, or after entry `seq` of the log."""

    @abstractmethod
    def protect(self, ref: Ref, *, on: bool = True) -> Version:
        """Keep a tag from being moved or removed, or lift that protection."""

    @abstractmethod
    def deprecate(self, ref: Ref, message: str = "", *, undo: bool = False) -> int:
        """Mark a version, or all of a bare name, as deprecated; return its number, 0 for all."""

    @abstractmethod
    def rm(self, ref: Ref, *, expect: Digest | None = None, force: bool = False) -> None:
        """Remove a tag, or a name with all its versions."""

    @abstractmethod
    def mv(self, name: str, new: str) -> int:
        """Rename a name, with its versions and what was recorded of them; return the number of versions.

        Raises:
            ConflictError: The new name exists.
            RefusedError: The new name was removed, the policy does not allow it, or a tag is protected or has requirements.
        """

    @abstractmethod
    def keep(self, name: str, rule: KeepRule | None) -> None:
        """Set which versions of a name a gc keeps, besides those with tags; None for all."""

    @abstractmethod
    def retention(self, name: str) -> KeepRule | None:
        """Return which versions of a name a gc keeps, besides those with tags; None for all."""

    @abstractmethod
    def restore(self, name: str) -> RestoreResult:
        """Undo the removal of a name."""

    @abstractmethod
    def assess(self, ref: Ref, tag: str) -> PromotionReport:
        """Compare a version with the requirements of a tag; nothing moves."""

    @abstractmethod
    def promote(self, ref: Ref, tag: str, message: str = "") -> PromotionReport:
        """Point a tag at a version that meets its requirements.

        Raises:
            RefusedError: It does not (code `requirements-unmet`).
            ConflictError: The tag moved in the meantime.
        """

    @abstractmethod
    def approve(self, ref: Ref, tag: str, text: str, bundle: bytes = b"") -> Version:
        """Approve a version for a tag, by a signed claim or, at a hub, by the account that is logged in."""

    @abstractmethod
    def rollback(self, ref: Ref, message: str = "") -> tuple[Version, Version]:
        """Point a tag at the version it had before; return the version it left, and the one it has now."""

    @abstractmethod
    def withdraw(
        self, ref: Ref, reason: str, claim: WithdrawalClaim | None = None, *, everywhere: bool = False
    ) -> Sequence[Withdrawal]:
        """Withdraw a version; `everywhere` under every name that has it and that the user may change."""

    @abstractmethod
    def undo_withdrawal(self, ref: Ref) -> Version:
        """Let a withdrawn version be used again."""

    @abstractmethod
    def close(self) -> None:
        """Close the registry, or the connections to it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
