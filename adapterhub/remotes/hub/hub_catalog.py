"""The catalog of a hub that runs adapterhub, over the hub's own API (`hub_api`).

An answer is untrusted: every value in it is checked (`answer_fields`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from adapterhub.bases.hub_address import MAIN
from adapterhub.digest import Digest
from adapterhub.identity import Identity
from adapterhub.index.queries import VersionRow
from adapterhub.index.version_search import Bounds, Query
from adapterhub.manifest.keep_rule import KeepRule, keep_rule
from adapterhub.ref import LATEST, Ref, RefError
from adapterhub.registry.content_search import Bar
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.releases.release_moves import Withdrawal
from adapterhub.registry.releases.withdrawal_rights import WithdrawalClaim
from adapterhub.registry.shown_version import VersionDocument
from adapterhub.registry.version_lookup import RestoreResult, Version
from adapterhub.remotes import content_documents, release_documents, version_documents
from adapterhub.remotes.answer_fields import Fields
from adapterhub.remotes.catalog import Catalog, ContentAnswer, ContentQuery, DiskUsage, Listing, SearchAnswer, no_bar
from adapterhub.remotes.release_documents import PromotionReport
from adapterhub.store.ref_log import Entry
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError

from .hub_api import DRY_RUN, HubApi, api_description, check_release, open_wire, reference_text
from .hub_client import HubAddress

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub
    from adapterhub.manifest.measurement import Evaluation
    from adapterhub.manifest.oci_manifest import Manifest


def connect(address: HubAddress, hub: Hub) -> HubCatalog | None:
    """Open the catalog of the hub of an address, with the user's token for it; None if the hub is not one of ours.

    Raises:
        RemoteError: It runs an adapterhub without the API, or does not answer.
    """
    location = f"{address.scheme}://{address.host}" if address.endpoint else hub.endpoint
    wire = open_wire(address, hub.endpoint, hub.checked_token(), hub.proxy)
    try:
        if api_description(hub.endpoint, wire, location):
            return HubCatalog(HubApi(hub.endpoint, wire, location))
        check_release(hub.endpoint, wire, location)
    except BaseException:
        wire.close()
        raise
    wire.close()
    return None


def ref_at(address: HubAddress) -> Ref:
    """Return the ref of an address in the registry of its hub; RefError if it can be none there."""
    if address.digest:
        return Ref.parse(f"{address.name}@{address.digest}")
    return Ref.parse(address.name if address.tag in (None, MAIN) else f"{address.name}:{address.tag}")


class HubCatalog(Catalog):
    """The names of a hub that runs adapterhub, as far as the user may see them."""

    def __init__(self, api: HubApi) -> None:
        self.api, self.location = api, api.location
        self._dry_run: dict[str, str] = {}

    def close(self) -> None:
        """Close the connections."""
        self.api.wire.close()

    # ---- reading

    def list(self, prefix: str | None = None) -> Listing:
        """Return all versions, or those of one name or namespace."""
        rows: list[VersionRow] = []
        deprecations: dict[tuple[str, int], str] = {}
        for document in self.api.pages("versions", {"prefix": prefix} if prefix else {}):
            listing = version_documents.read_listing(document, self.location)
            rows += listing.rows
            deprecations |= listing.deprecations
        return Listing(rows, deprecations)

    def versions_with(self, digest: Digest) -> Sequence[VersionRow]:
        """Return the versions with this manifest."""
        return version_documents.read_listing(self.api.request("GET", "versions", {"digest": digest}), self.location).rows

    def search(self, query: Query, *, facets: bool) -> SearchAnswer:
        """Return the versions that match, best first."""
        pairs = [("words", query.words), ("namespace", query.namespace), *query.facets, *(("tag", tag) for tag in query.tags)]
        pairs += [("rank" if column == "r" else column, _bounds_text(bounds)) for column, bounds in query.bounds]
        pairs += [("metric", f"{name}{_bounds_text((bound,))}") for name, bounds in query.metrics for bound in bounds]
        pairs += [("all_versions", str(query.all_versions)), ("facets", str(facets)), ("limit", str(query.limit))]
        document = self.api.request("GET", "search", [(key, value) for key, value in pairs if value])
        return version_documents.read_search(document, self.location)

    def log(self, ref: Ref) -> Sequence[Entry]:
        """Return the log of a name, newest entry first."""
        reference = reference_text(ref)
        pages = self.api.pages(f"{_name_path(ref.name)}/log", {"reference": reference} if reference else {})
        return [entry for document in pages for entry in version_documents.read_log(document, self.location)]

    def lineage(self, ref: Ref) -> dict[str, Any]:
        """Return what a version was made from, and what was made from it."""
        return content_documents.read_lineage(self.api.request("GET", f"{_version_path(ref)}/lineage"), self.location)

    def find(self, content_queries: Sequence[ContentQuery], bar: Bar = no_bar) -> ContentAnswer:
        """Return the versions that contain files, folders or digests; only digests are sent."""
        matches, unlisted = [], 0
        deprecations: dict[tuple[str, int], str] = {}
        for query in content_queries:
            document = self.api.request("POST", "find", body=content_documents.content_query_document(query))
            content_matches, reasons = content_documents.read_content_answer(document, self.location, query.name)
            matches.append(content_matches)
            deprecations |= reasons
            unlisted = content_documents.read_unlisted(document, self.location)
        return ContentAnswer(matches, deprecations, unlisted)

    def show(self, ref: Ref) -> VersionDocument:
        """Return everything that is known of a version."""
        return version_documents.read_shown(self.api.request("GET", _version_path(ref)), self.location)

    def usage(self, prefix: str | None = None, bar: Bar = no_bar) -> DiskUsage:
        """Return the disk usage of the versions of a name or namespace, or of all."""
        document = self.api.request("GET", "usage", {"prefix": prefix} if prefix else {})
        return content_documents.read_usage(document, self.location)

    # ---- changing

    def rehearse(self) -> None:
        """Only rehearse the changes from here on: they are answered as if they were made.

        Raises:
            RefusedError: The hub cannot, and would make them.
        """
        if not self.api.takes_dry_run():
            problem = "this hub runs an adapterhub that cannot try a change without making it"
            raise RefusedError(self.location, problem, "Ask its operator to upgrade it", code="older-hub")
        self._dry_run = {DRY_RUN: "true"}

    def _change(self, method: str, path: str, query: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
        return self.api.request(method, path, {**(query or {}), **self._dry_run}, **options)

    def publish(
        self,
        name: str,
        manifest: Manifest,
        *,
        tags: Sequence[str],
        expect: Digest | None,
        message: str,
        metrics: Mapping[str, float],
    ) -> Version:
        """Make a version of a manifest whose blobs the hub has, or move tags to the one that it is; latest moves to a new one.

        Args:
            name: The name.
            manifest: The manifest.
            tags: The tags to move.
            expect: The digest that the first of them must still have, or `absent`; without tags, that of `latest`.
            message: The reason, for the log.
            metrics: Results of other programs, to be recorded.
        """
        body = {"manifest": manifest.raw.decode(), "tags": list(tags), "message": message, "metrics": dict(metrics)}
        path, retry = f"{_name_path(name)}/versions", expect is None
        document = self.api.request("POST", path, body=body, headers=_conditions(expect), retry=retry)
        return version_documents.read_version(document, self.location)

    def check_publish(self, name: str, manifest: Manifest | None, *, tags: Sequence[str], expect: Digest | None) -> bool:
        """Raise the error with which `publish` would be refused, whatever the files are; return whether the hub says.

        The hub must rehearse changes, but need not have the blobs. Without a manifest, the version is a new one.
        """
        body = {"manifest": manifest.raw.decode() if manifest else "", "tags": list(tags)}
        path, query = f"{_name_path(name)}/versions", {DRY_RUN: "true"}
        try:
            self.api.request("POST", path, query, body=body, headers=_conditions(expect))
        except UsageError as error:
            if error.where != DRY_RUN:
                raise
            return False  # an earlier release, which rehearses no push
        return True

    def check_writable(self, name: str) -> None:
        """Raise the error with which the hub refuses a push to a name, if it does.

        Raises:
            DeniedError: The user may not write there.
        """
        with suppress(UsageError):  # the manifest is missing: it has looked at the role before
            self.api.request("POST", f"{_name_path(name)}/versions", body={})

    def tag(self, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
        """Point a tag at a version."""
        path, body, retry = _tag_path(ref.name, tag), {"reference": reference_text(ref) or LATEST}, expect is None
        document = self._change("PUT", path, body=body, headers=_conditions(expect), retry=retry)
        return version_documents.read_version(document, self.location, tag)

    def restore_tag(self, ref: Ref, seq: int | None = None) -> Version:
        """Point a tag where it pointed before."""
        document = self._change("POST", f"{_tag_path(ref.name, _tag_of(ref))}/restore", body={"seq": seq}, retry=False)
        return version_documents.read_version(document, self.location, ref.tag)

    def protect(self, ref: Ref, *, on: bool = True) -> Version:
        """Keep a tag from being moved or removed, or lift that protection."""
        document = self._change("PUT" if on else "DELETE", f"{_tag_path(ref.name, _tag_of(ref))}/protection")
        return version_documents.read_version(document, self.location, ref.tag)

    def deprecate(self, ref: Ref, message: str = "", *, undo: bool = False) -> int:
        """Mark a version, or all of a bare name, as deprecated."""
        path = _name_path(ref.name) if ref == Ref(ref.name) else _version_path(ref)
        body = None if undo else {"message": message}
        return version_documents.read_number(
            self._change("DELETE" if undo else "PUT", f"{path}/deprecation", body=body), self.location
        )

    def rm(self, ref: Ref, *, expect: Digest | None = None, force: bool = False) -> None:
        """Remove a tag, or a name with all its versions."""
        if ref.number or ref.digest:
            hint = f"Withdraw it, or remove the name {ref.name}, or a tag"
            address, name = (self.api.wire.address_of(text) for text in (str(ref), ref.name))
            problem = "a version cannot be removed alone"
            raise RefusedError(str(ref), problem, hint, code="version-stays", name=name, ref=address)
        path = _tag_path(ref.name, _tag_of(ref)) if ref != Ref(ref.name) else _name_path(ref.name)
        self._change("DELETE", path, {"force": "true"} if force else {}, headers=_conditions(expect), retry=False)

    def mv(self, name: str, new: str) -> int:
        """Rename a name, which then leads to the new one."""
        fields = Fields(self._change("POST", f"{_name_path(name)}/move", body={"to": new}), self.location)
        return fields.count("versions")

    def keep(self, name: str, rule: KeepRule | None) -> None:
        """Set which versions of a name a gc keeps, besides those with tags; None for all."""
        body = None if rule is None else {"keep": rule.last} | ({"ttl": rule.ttl} if rule.ttl else {})
        self._change("DELETE" if rule is None else "PUT", f"{_name_path(name)}/retention", body=body)

    def retention(self, name: str) -> KeepRule | None:
        """Return which versions of a name a gc keeps; None for all."""
        fields = Fields(self.api.request("GET", f"{_name_path(name)}/retention"), self.location)
        return keep_rule(fields.optional_count("keep"), fields.optional_count("ttl"))

    def restore(self, name: str) -> RestoreResult:
        """Undo the removal of a name."""
        return version_documents.read_restore(self._change("POST", f"{_name_path(name)}/restore", retry=False), self.location)

    def make_private(self, name: str) -> None:
        """Hide a name from all but who has a role in its namespace; one that is not there is created."""
        namespace, _, repository = name.partition("/")
        url, body = f"{self.api.endpoint}/api/models/{quote(name)}/settings", {"private": True}
        with suppress(NotFoundError):
            self.api.send("PUT", url, body)
            return
        created = {"name": repository, "organization": namespace, "private": True}
        self.api.send("POST", f"{self.api.endpoint}/api/repos/create", created)

    # ---- releases

    def assess(self, ref: Ref, tag: str) -> PromotionReport:
        """Compare a version with the requirements of a tag."""
        query = {"reference": reference_text(ref) or LATEST}
        return release_documents.read_promotion(
            self.api.request("GET", f"{_tag_path(ref.name, tag)}/promotion", query), self.location
        )

    def promote(self, ref: Ref, tag: str, message: str = "") -> PromotionReport:
        """Point a tag at a version that meets its requirements."""
        body = {"reference": reference_text(ref) or LATEST, "message": message}
        document = self._change("POST", f"{_tag_path(ref.name, tag)}/promotion", body=body, retry=False)
        return release_documents.read_promotion(document, self.location)

    def record_evaluation(self, ref: Ref, evaluation: Evaluation) -> Version:
        """Record an evaluation of a version in its log."""
        document = self._change("POST", f"{_version_path(ref)}/evaluations", body=evaluation.document())
        return version_documents.read_version(document, self.location)

    def approve(self, ref: Ref, tag: str, text: str, bundle: bytes = b"") -> Version:
        """Approve a version for a tag, by the account that is logged in and, with a bundle, its signature."""
        body = {"tag": tag, "message": text, "bundle": bundle.decode()}
        document = self._change("POST", f"{_version_path(ref)}/approvals", body=body, retry=False)
        return version_documents.read_version(document, self.location)

    def rollback(self, ref: Ref, message: str = "") -> tuple[Version, Version]:
        """Point a tag at the version it had before."""
        path = f"{_tag_path(ref.name, _tag_of(ref))}/rollback"
        fields = Fields(self._change("POST", path, body={"message": message}, retry=False), self.location)
        left, current = (
            version_documents.read_version(fields.values.get(key), self.location, ref.tag) for key in ("left", "current")
        )
        return left, current

    def withdraw(
        self, ref: Ref, reason: str, claim: WithdrawalClaim | None = None, *, everywhere: bool = False
    ) -> Sequence[Withdrawal]:
        """Withdraw a version; a signed one as its signer or as an admin of the namespace."""
        body: dict[str, Any] = {"message": reason, "everywhere": everywhere}
        if claim is not None:
            if isinstance(claim.signer, Identity):
                raise UsageError(str(ref), "a hub takes the key of a signer, and no identity", "Ask an admin of the hub")
            body |= {"bundle": claim.bundle.decode(), "key": claim.signer.pem.decode()}
        fields = Fields(self._change("PUT", f"{_version_path(ref)}/withdrawal", body=body), self.location)
        return [release_documents.read_withdrawal(entry) for entry in fields.objects("withdrawn")]

    def undo_withdrawal(self, ref: Ref) -> Version:
        """Let a withdrawn version be used again."""
        document = self._change("DELETE", f"{_version_path(ref)}/withdrawal")
        return version_documents.read_version(document, self.location)


def _name_path(name: str) -> str:
    return f"names/{quote(name)}"


def _version_path(ref: Ref) -> str:
    return f"{_name_path(ref.name)}/versions/{quote(reference_text(ref) or LATEST, safe=':')}"


def _tag_path(name: str, tag: str) -> str:
    return f"{_name_path(name)}/tags/{quote(tag, safe='')}"


def _tag_of(ref: Ref) -> str:
    """Return the tag of a ref; RefError if it names a version in another way."""
    if ref.tag is None:
        raise RefError(str(ref), "has no tag", f"Write {ref.name}:TAG")
    return ref.tag


def _conditions(expect: Digest | None) -> dict[str, str]:
    """Return the headers under which the hub moves a tag only if it is where `expect` says."""
    if expect is None:
        return {}
    return {"If-None-Match": "*"} if expect == ABSENT else {"If-Match": f'"{expect}"'}


def _bounds_text(bounds: Bounds) -> str:
    """Return bounds as `version_search.parse_bounds` reads them: one comparison, or a range."""
    if len(bounds) == 1:
        return f"{bounds[0].operator}{_number_text(bounds[0].value)}"
    low, high = bounds
    return f"{_number_text(low.value)}..{_number_text(high.value)}"


def _number_text(value: float) -> str:
    return f"{value:.17g}".replace("e+", "e")
