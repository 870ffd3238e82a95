"""The catalog of a registry on this machine; a hub answers its API with one that shows what its client may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest
from adapterhub.index import queries, tensor_search, version_search
from adapterhub.index.queries import VersionRow
from adapterhub.index.version_search import Query
from adapterhub.maintenance import retention
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.ref import Ref
from adapterhub.registry import content_search
from adapterhub.registry.content_search import Bar
from adapterhub.registry.registry import Registry, Version
from adapterhub.registry.releases import release_moves, withdrawal_rights
from adapterhub.registry.releases.release_moves import Withdrawal
from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
from adapterhub.registry.shown_version import VersionDocument
from adapterhub.registry.version_lookup import RestoreResult
from adapterhub.store.store import Entry
from adapterhub.user_files import is_mine
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .catalog import Catalog, ContentAnswer, ContentQuery, DiskUsage, Listing, SearchAnswer, SizedModel, no_bar
from .release_documents import PromotionReport, report_of

if TYPE_CHECKING:
    from adapterhub.manifest.keep_rule import KeepRule


@dataclass(frozen=True)
class Visibility:
    """What a client may see.

    Attributes:
        sees: Returns whether it may see an existing name.
        without: Names that it may not see, as of some seconds ago, to leave out of counts; `sees` decides about each.
        max_unlisted: Bytes of weights that are read for it to list their tensors.
    """

    sees: Callable[[str], bool]
    without: frozenset[str] = frozenset()
    max_unlisted: int = 0


class LocalCatalog(Catalog):
    """The names of a registry; those that a client may see if there is a `visibility`."""

    def __init__(self, registry: Registry, visibility: Visibility | None = None) -> None:
        self._registry, self._visibility = registry, visibility
        self.location = str(registry.root)

    def close(self) -> None:
        """Close the registry."""
        self._registry.close()

    # ---- reading

    def list(self, prefix: str | None = None) -> Listing:
        """Return all versions, or those of one name or namespace."""
        with self._registry.index.snapshot():
            return self._listing(self._visible(self._registry.list(prefix)))

    def page(self, prefix: str | None, after: Ref | None, limit: int) -> tuple[Listing, Ref | None]:
        """Return at most `limit` versions after a numbered one, and the last one looked at; None at the end of the list."""
        without = self._visibility.without if self._visibility else frozenset()
        with self._registry.index.snapshot():
            rows = queries.versions_after(self._registry.index, prefix, after, limit, without)
            return self._listing(self._visible(rows)), rows[-1].ref if len(rows) == limit else None

    def versions_with(self, digest: Digest) -> Sequence[VersionRow]:
        """Return the versions with this manifest."""
        return self._visible(self._registry.versions_with(digest))

    def search(self, query: Query, *, facets: bool) -> SearchAnswer:
        """Return the versions that match, best first."""
        visible_query = replace(query, without=self._visibility.without) if self._visibility else query
        with self._registry.index.snapshot():
            result = version_search.search(self._registry.index, visible_query, facets=facets)
            listing = self._listing(self._visible(result.rows))
        return SearchAnswer(replace(result, rows=list(listing.rows)), listing.deprecations)

    def log(self, ref: Ref) -> Sequence[Entry]:
        """Return the log of a name, newest entry first."""
        return self._registry.log(ref)

    def lineage(self, ref: Ref) -> dict[str, Any]:
        """Return what a version was made from, and what was made from it."""
        from adapterhub.registry import lineage_graph  # which lists do without

        from .content_documents import lineage_document

        graph = lineage_graph.trace(self._registry, ref)
        return lineage_document(lineage_graph.visible(graph, self._visibility.sees) if self._visibility else graph)

    def find(self, content_queries: Sequence[ContentQuery], bar: Bar = no_bar) -> ContentAnswer:
        """Return the versions that contain files, folders or digests."""
        registry = self._registry
        # Each as of one moment: a search may list tensors in between, which writes.
        matches = [
            content_search.matching(registry, *query, self._list_tensors(bar), self._sees_row) for query in content_queries
        ]
        with registry.index.snapshot():
            unlisted = tensor_search.unlisted_files(registry.index)
            if self._visibility:
                # Whoever asks learns nothing about the files of names that they may not see.
                without = self._visibility.without
                unlisted = {
                    digest: size for digest, size in unlisted.items() if queries.names_with(registry.index, digest, without)
                }
            names = {holder.row.name for match in matches for holder in match.holders}
            names |= {share.row.name for match in matches for share in match.shares}
            return ContentAnswer(matches, registry.deprecations(names), len(unlisted))

    def show(self, ref: Ref) -> VersionDocument:
        """Return everything that is known of a version."""
        return self._registry.show(ref)

    def usage(self, prefix: str | None = None, bar: Bar = no_bar) -> DiskUsage:
        """Return the disk usage of the versions of a name or namespace, or of all."""
        from adapterhub.bases import registered_bases  # numpy, which lists do without
        from adapterhub.maintenance import disk_usage

        self._list_tensors(bar, prefix)()
        report = disk_usage.usage_of_versions(self._registry, self._visible(self._registry.list(prefix)))
        # An unreadable base is no error here: fsck reports it.
        specs = [(base.name, base.spec) for base in registered_bases.all_bases(self._registry)[0]]
        return DiskUsage(
            report, [SizedModel(name, spec.repo, spec.fingerprint, spec.size) for name, spec in specs if spec.size]
        )

    def _list_tensors(self, bar: Bar, prefix: str | None = None) -> Callable[[], None]:
        """Return what lists the tensors of weights that were not read yet, unless they are too large for a client."""

        def list_tensors() -> None:
            missing = tensor_search.unlisted_files(self._registry.index, prefix)
            if self._visibility and sum(missing.values()) > self._visibility.max_unlisted:
                return
            with bar("listing tensors") as progress:
                self._registry.list_tensors(progress, prefix=prefix)

        return list_tensors

    def _listing(self, rows: Sequence[VersionRow]) -> Listing:
        return Listing(rows, self._registry.deprecations({row.name for row in rows}))

    def _visible(self, rows: Sequence[VersionRow]) -> Sequence[VersionRow]:
        return [row for row in rows if self._sees_row(row)] if self._visibility else rows

    def _sees_row(self, row: VersionRow) -> bool:
        return self._visibility is None or self._visibility.sees(row.name)

    # ---- changing

    def tag(self, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
        """Point a tag at a version."""
        return self._registry.tag(ref, tag, expect=expect)

    def restore_tag(self, ref: Ref, seq: int | None = None) -> Version:
        """Point a tag where it pointed before."""
        return self._registry.restore_tag(ref, seq)

    def protect(self, ref: Ref, *, on: bool = True) -> Version:
        """Keep a tag from being moved or removed, or lift that protection."""
        return self._registry.protect(ref, on=on)

    def deprecate(self, ref: Ref, message: str = "", *, undo: bool = False) -> int:
        """Mark a version, or all of a bare name, as deprecated."""
        return self._registry.deprecate(ref, message, undo=undo)

    def rm(self, ref: Ref, *, expect: Digest | None = None, force: bool = False) -> None:
        """Remove a tag, or a name with all its versions."""
        self._registry.rm(ref, expect=expect, force=force)

    def mv(self, name: str, new: str) -> int:
        """Rename a name, with its versions and what was recorded of them."""
        from adapterhub.maintenance import name_moves  # nothing else moves a name

        return name_moves.move(self._registry, name, new)

    def keep(self, name: str, rule: KeepRule | None) -> None:
        """Set which versions of a name a gc keeps, besides those with tags; None for all."""
        retention.keep(self._registry, Ref(name), rule)

    def retention(self, name: str) -> KeepRule | None:
        """Return which versions of a name a gc keeps; None for all."""
        return retention.chosen_rule(self._registry, Ref(name))

    def restore(self, name: str) -> RestoreResult:
        """Undo the removal of a name."""
        return self._registry.restore(name)

    # ---- releases

    def assess(self, ref: Ref, tag: str) -> PromotionReport:
        """Compare a version with the requirements of a tag."""
        return report_of(self._registry.assess(ref, tag))

    def promote(self, ref: Ref, tag: str, message: str = "") -> PromotionReport:
        """Point a tag at a version that meets its requirements."""
        assessment, version = self._registry.promote(ref, tag, message)
        return report_of(assessment, moved=assessment.candidate.current != version.number)

    def approve(self, ref: Ref, tag: str, text: str, bundle: bytes = b"") -> Version:
        """Approve a version for a tag by a signed claim: without one, anybody could write any name into the log."""
        if not bundle:
            raise UsageError(str(ref), "an approval in a registry of files must be signed", code="keys-to-approve")
        return release_moves.approve(self._registry.ledger, ref, tag, ReleaseStatement(text, bundle.decode()))

    def rollback(self, ref: Ref, message: str = "") -> tuple[Version, Version]:
        """Point a tag at the version it had before."""
        return release_moves.rollback(self._registry.ledger, ref, message)

    def withdraw(
        self, ref: Ref, reason: str, claim: WithdrawalClaim | None = None, *, everywhere: bool = False
    ) -> Sequence[Withdrawal]:
        """Withdraw a version; the owner of the registry's folder is its admin."""
        registry, row = self._registry, self._withdrawable_row(ref, claim)
        rows = registry.versions_with(row.digest) if everywhere else [row]
        statement = ReleaseStatement(reason, claim.bundle.decode() if claim else "")
        return [release_moves.withdraw(registry.ledger, version.ref, statement) for version in rows]

    def undo_withdrawal(self, ref: Ref) -> Version:
        """Let a withdrawn version be used again."""
        return release_moves.undo_withdrawal(self._registry.ledger, self._withdrawable_row(ref, None).ref)

    def _withdrawable_row(self, ref: Ref, claim: WithdrawalClaim | None) -> VersionRow:
        """Return a version; RefusedError if it is signed, the folder is another user's, and the claim is not its signer's."""
        registry = self._registry
        row = registry.row(ref)
        if not is_mine(registry.store.root):
            manifest = oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref))
            signatures = registry.gate.read_signatures(row.name, row.digest)
            withdrawal_rights.check(row.name, row.number, manifest, signatures, claim)
        return row
