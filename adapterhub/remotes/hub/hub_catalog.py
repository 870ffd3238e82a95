"""The catalog of a hub that runs adapterhub, over the hub's own API (`adapterhub.hub.api`).

An answer is untrusted: every value in it is checked (`answer_fields`), and an error is raised again as one of the classes
here, with the hub's words as one printable line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from adapterhub.bases.hub_address import MAIN, SCHEME
from adapterhub.digest import Digest
from adapterhub.http.client import PAUSES, Response
from adapterhub.http.http_errors import DeniedError, RetryableError
from adapterhub.http.urls import ProxyOf
from adapterhub.identity import Identity
from adapterhub.index.queries import VersionRow
from adapterhub.index.version_search import Bounds, Query
from adapterhub.ref import LATEST, Ref, RefError
from adapterhub.registry.content_search import Bar
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.registry import VersionDocument
from adapterhub.registry.release_moves import Withdrawal
from adapterhub.registry.version_lookup import RestoreResult, Version
from adapterhub.registry.withdrawal_rights import Claim
from adapterhub.remotes import content_documents, release_documents, version_documents
from adapterhub.remotes.answer_fields import DENIED, ERROR_KINDS, Fields
from adapterhub.remotes.catalog import Catalog, ContentAnswer, ContentQuery, DiskUsage, Listing, SearchAnswer, no_bar
from adapterhub.remotes.release_documents import PromotionReport
from adapterhub.store.ref_log import Entry
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import (
    FormatError,
    RefusedError,
    RemoteError,
    UsageError,
)
from adapterhub_converters.lazy_dataclass import dataclass

from .hub_client import HubAddress, HubWire

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub
    from adapterhub.manifest.oci_manifest import Manifest

_API, _VERSION = "/api/adapterhub", 1
_HINT_FIELDS = ("name", "ref", "repository", "meant")  # fields of an error, of refs, that a hint may show in a command
_MAX_ANSWER = 16 << 20  # bytes; a lineage may have thousands of adapters
_MAX_SMALL = 64 << 10  # bytes of an answer that says what a server is
_NO_API = (401, 403, 404, 405, 410, 501)  # statuses of servers without the API


class _ApiWire(HubWire):
    """An HTTP connection to the API; `address_prefix` makes an address of a ref in an error."""

    address_prefix = ""

    def _refusal(self, response: Response, location: str) -> Exception:
        with suppress(FormatError):
            document = json_file.parse_object(response.body, location)
            if document.get("kind") == DENIED:
                return DeniedError(location, self.clean(str(document.get("what", ""))) or "the hub denies it")
            if (error_class := ERROR_KINDS.get(str(document.get("kind")))) is not None:
                fields = document.get("fields")
                named = fields if isinstance(fields, dict) else {}
                where, what, hint = (self.clean(str(document.get(key, ""))) for key in ("where", "what", "hint"))
                error = error_class(self._address_of(where), what or "the hub refuses it", hint)
                error.code = self.clean(str(document.get("code", ""))) or error.code
                # No other fields: a hub must not fill in the host of a login that a hint shows.
                texts = {key: self.clean(named[key]) for key in _HINT_FIELDS if isinstance(named.get(key), str)}
                error.fields |= {key: self._address_of(text) for key, text in texts.items()}
                error.fields["registry"] = self.address_prefix.rstrip("/")
                return error
        return super()._refusal(response, location)

    def _address_of(self, text: str) -> str:
        """Return the address of a ref on the hub; any other text unchanged."""
        with suppress(RefError):
            ref = Ref.parse(text)
            version = _reference(ref)
            return f"{self.address_prefix}{ref.name}{f'@{version}' if version else ''}"
        return text


def has_api(endpoint: str, wire: HubWire, location: str) -> bool:
    """Return whether a hub runs adapterhub, with the API that this program knows."""
    document = _document_at(f"{endpoint}{_API}", wire, location) or {}
    versions = document.get("api")
    return document.get("program") == "adapterhub" and isinstance(versions, list) and _VERSION in versions


def check_release(endpoint: str, wire: HubWire, location: str) -> None:
    """Raise RemoteError if a hub without the API runs adapterhub all the same: an earlier or a later one."""
    description = _document_at(f"{endpoint}/api/openapi.json", wire, location, limit=_MAX_ANSWER)
    info = description.get("info") if description else None
    if isinstance(info, dict) and info.get("title") == "adapterhub":
        problem = "this hub runs an adapterhub without the API that this command needs"
        raise RemoteError(location, problem, "Upgrade the older of the two", code="older-hub")


def _document_at(url: str, wire: HubWire, location: str, limit: int = _MAX_SMALL) -> dict[str, Any] | None:
    """Return the JSON object at a URL; None from a server that has none there."""
    response = wire.request("GET", url, location, good=(200, *_NO_API), limit=limit, redirects=False)
    with suppress(FormatError):
        return json_file.parse_object(response.body, location) if response.status == 200 else None
    return None


def open_wire(
    address: HubAddress, endpoint: str, token: str | None, proxy: ProxyOf, pauses: Sequence[float] = PAUSES
) -> HubWire:
    """Open a connection to the API of the hub of an address."""
    wire = _ApiWire.open(endpoint, token, pauses, proxy, address.login)
    wire.address_prefix = f"{address.scheme}://{address.host}/" if address.endpoint else SCHEME
    return wire


def connect(address: HubAddress, hub: Hub) -> HubCatalog | None:
    """Open the catalog of the hub of an address, with the user's token for it; None if the hub is not one of ours.

    Raises:
        RemoteError: It runs an adapterhub without the API, or does not answer.
    """
    location = f"{address.scheme}://{address.host}" if address.endpoint else hub.endpoint
    wire = open_wire(address, hub.endpoint, hub.checked_token(), hub.proxy)
    try:
        if has_api(hub.endpoint, wire, location):
            return HubCatalog(hub.endpoint, wire, location)
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


@dataclass
class HubCatalog(Catalog):
    """The names of a hub that runs adapterhub, as far as the user may see them."""

    endpoint: str
    wire: HubWire
    location: str

    def close(self) -> None:
        """Close the connections."""
        self.wire.close()

    # ---- reading

    def list(self, prefix: str | None = None) -> Listing:
        """Return all versions, or those of one name or namespace."""
        rows: list[VersionRow] = []
        deprecations: dict[tuple[str, int], str] = {}
        for document in self._pages("versions", {"prefix": prefix} if prefix else {}):
            listing = version_documents.read_listing(document, self.location)
            rows += listing.rows
            deprecations |= listing.deprecations
        return Listing(rows, deprecations)

    def versions_with(self, digest: Digest) -> Sequence[VersionRow]:
        """Return the versions with this manifest."""
        return version_documents.read_listing(self._request_document("GET", "versions", {"digest": digest}), self.location).rows

    def search(self, query: Query, *, facets: bool) -> SearchAnswer:
        """Return the versions that match, best first."""
        pairs = [("words", query.words), ("namespace", query.namespace), *query.facets, *(("tag", tag) for tag in query.tags)]
        pairs += [("rank" if column == "r" else column, _bounds_text(bounds)) for column, bounds in query.bounds]
        pairs += [("metric", f"{name}{_bounds_text((bound,))}") for name, bounds in query.metrics for bound in bounds]
        pairs += [("all_versions", str(query.all_versions)), ("facets", str(facets)), ("limit", str(query.limit))]
        document = self._request_document("GET", "search", [(key, value) for key, value in pairs if value])
        return version_documents.read_search(document, self.location)

    def log(self, ref: Ref) -> Sequence[Entry]:
        """Return the log of a name, newest entry first."""
        reference = _reference(ref)
        pages = self._pages(f"{_name_path(ref.name)}/log", {"reference": reference} if reference else {})
        return [entry for document in pages for entry in version_documents.read_log(document, self.location)]

    def lineage(self, ref: Ref) -> dict[str, Any]:
        """Return what a version was made from, and what was made from it."""
        return content_documents.read_lineage(self._request_document("GET", f"{_version_path(ref)}/lineage"), self.location)

    def find(self, content_queries: Sequence[ContentQuery], bar: Bar = no_bar) -> ContentAnswer:
        """Return the versions that contain files, folders or digests; only digests are sent."""
        matches, unlisted = [], 0
        deprecations: dict[tuple[str, int], str] = {}
        for query in content_queries:
            document = self._request_document("POST", "find", body=content_documents.content_query_document(query))
            content_matches, reasons = content_documents.read_content_answer(document, self.location, query.name)
            matches.append(content_matches)
            deprecations |= reasons
            unlisted = content_documents.read_unlisted(document, self.location)
        return ContentAnswer(matches, deprecations, unlisted)

    def show(self, ref: Ref) -> VersionDocument:
        """Return everything that is known of a version."""
        return version_documents.read_shown(self._request_document("GET", _version_path(ref)), self.location)

    def usage(self, prefix: str | None = None, bar: Bar = no_bar) -> DiskUsage:
        """Return the disk usage of the versions of a name or namespace, or of all."""
        document = self._request_document("GET", "usage", {"prefix": prefix} if prefix else {})
        return content_documents.read_usage(document, self.location)

    # ---- changing

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
        document = self._request_document("POST", path, body=body, headers=_conditions(expect), retry=retry)
        return version_documents.read_version(document, self.location)

    def check_writable(self, name: str) -> None:
        """Raise the error with which the hub refuses a push to a name, if it does.

        Raises:
            DeniedError: The user may not write there.
        """
        with suppress(UsageError):  # the manifest is missing: it has looked at the role before
            self._request_document("POST", f"{_name_path(name)}/versions", body={})

    def tag(self, ref: Ref, tag: str, *, expect: Digest | None = None) -> Version:
        """Point a tag at a version."""
        path, body, retry = _tag_path(ref.name, tag), {"reference": _reference(ref) or LATEST}, expect is None
        document = self._request_document("PUT", path, body=body, headers=_conditions(expect), retry=retry)
        return version_documents.read_version(document, self.location, tag)

    def restore_tag(self, ref: Ref, seq: int | None = None) -> Version:
        """Point a tag where it pointed before."""
        document = self._request_document(
            "POST", f"{_tag_path(ref.name, _tag_of(ref))}/restore", body={"seq": seq}, retry=False
        )
        return version_documents.read_version(document, self.location, ref.tag)

    def protect(self, ref: Ref, *, on: bool = True) -> Version:
        """Keep a tag from being moved or removed, or lift that protection."""
        document = self._request_document("PUT" if on else "DELETE", f"{_tag_path(ref.name, _tag_of(ref))}/protection")
        return version_documents.read_version(document, self.location, ref.tag)

    def deprecate(self, ref: Ref, message: str = "", *, undo: bool = False) -> int:
        """Mark a version, or all of a bare name, as deprecated."""
        path = _name_path(ref.name) if ref == Ref(ref.name) else _version_path(ref)
        body = None if undo else {"message": message}
        return version_documents.read_number(
            self._request_document("DELETE" if undo else "PUT", f"{path}/deprecation", body=body), self.location
        )

    def rm(self, ref: Ref, *, expect: Digest | None = None, force: bool = False) -> None:
        """Remove a tag, or a name with all its versions."""
        if ref.number or ref.digest:
            raise RefusedError(str(ref), "a version cannot be removed alone", f"Remove the name {ref.name}, or a tag")
        path = _tag_path(ref.name, _tag_of(ref)) if ref != Ref(ref.name) else _name_path(ref.name)
        self._request_document("DELETE", path, {"force": "true"} if force else {}, headers=_conditions(expect), retry=False)

    def restore(self, name: str) -> RestoreResult:
        """Undo the removal of a name."""
        return version_documents.read_restore(
            self._request_document("POST", f"{_name_path(name)}/restore", retry=False), self.location
        )

    # ---- releases

    def assess(self, ref: Ref, tag: str) -> PromotionReport:
        """Compare a version with the requirements of a tag."""
        query = {"reference": _reference(ref) or LATEST}
        return release_documents.read_promotion(
            self._request_document("GET", f"{_tag_path(ref.name, tag)}/promotion", query), self.location
        )

    def promote(self, ref: Ref, tag: str, message: str = "") -> PromotionReport:
        """Point a tag at a version that meets its requirements."""
        body = {"reference": _reference(ref) or LATEST, "message": message}
        document = self._request_document("POST", f"{_tag_path(ref.name, tag)}/promotion", body=body, retry=False)
        return release_documents.read_promotion(document, self.location)

    def approve(self, ref: Ref, tag: str, text: str, bundle: bytes = b"") -> Version:
        """Approve a version for a tag, by the account that is logged in and, with a bundle, its signature."""
        body = {"tag": tag, "message": text, "bundle": bundle.decode()}
        document = self._request_document("POST", f"{_version_path(ref)}/approvals", body=body, retry=False)
        return version_documents.read_version(document, self.location)

    def rollback(self, ref: Ref, message: str = "") -> tuple[Version, Version]:
        """Point a tag at the version it had before."""
        path = f"{_tag_path(ref.name, _tag_of(ref))}/rollback"
        fields = Fields(self._request_document("POST", path, body={"message": message}, retry=False), self.location)
        left, current = (
            version_documents.read_version(fields.values.get(key), self.location, ref.tag) for key in ("left", "current")
        )
        return left, current

    def withdraw(self, ref: Ref, reason: str, claim: Claim | None = None, *, everywhere: bool = False) -> Sequence[Withdrawal]:
        """Withdraw a version; a signed one as its signer or as an admin of the namespace."""
        body: dict[str, Any] = {"message": reason, "everywhere": everywhere}
        if claim is not None:
            if isinstance(claim.signer, Identity):
                raise UsageError(str(ref), "a hub takes the key of a signer, and no identity", "Ask an admin of the hub")
            body |= {"bundle": claim.bundle.decode(), "key": claim.signer.pem.decode()}
        fields = Fields(self._request_document("PUT", f"{_version_path(ref)}/withdrawal", body=body), self.location)
        return [release_documents.read_withdrawal(item) for item in fields.objects("withdrawn")]

    def undo_withdrawal(self, ref: Ref) -> Version:
        """Let a withdrawn version be used again."""
        document = self._request_document("DELETE", f"{_version_path(ref)}/withdrawal")
        return version_documents.read_version(document, self.location)

    # ---- requests

    def _request_document(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        retry: bool = True,
    ) -> dict[str, Any]:
        """Return the JSON object that the hub answers; the errors of an answer are raised as those of a registry are.

        Without `retry`, a request whose answer is lost is not sent again: it may have been obeyed, and would not be twice. Nor
        would its condition, which is no longer met, tell a change of its own from one by somebody else.
        """
        try:
            response = self._send(method, self._url(path, query), body, headers, retry=retry)
        except RetryableError as error:
            problem = f"no answer came ({error.reason}); the change may have been made"
            raise RemoteError(self.location, problem, "Look, then try again") from error
        return json_file.parse_object(response.body, self.location)

    def _send(
        self, method: str, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str] | None, *, retry: bool
    ) -> Response:
        return self.wire.request(
            method,
            url,
            self.location,
            good=(200, 201),
            headers={**(headers or {}), **({"Content-Type": "application/json"} if body is not None else {})},
            body=json_file.canonical_bytes(body) if body is not None else None,
            limit=_MAX_ANSWER,
            retry=retry,
        )

    def _pages(self, path: str, query: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        for response in self.wire.pages(self._url(path, query), self.location, limit=_MAX_ANSWER):
            yield json_file.parse_object(response.body, self.location)

    def _url(self, path: str, query: Mapping[str, str] | Sequence[tuple[str, str]]) -> str:
        url = f"{self.endpoint}{_API}/v{_VERSION}/{path}"
        return f"{url}?{urlencode(query)}" if query else url


def _name_path(name: str) -> str:
    return f"names/{quote(name)}"


def _version_path(ref: Ref) -> str:
    return f"{_name_path(ref.name)}/versions/{quote(_reference(ref) or LATEST, safe=':')}"


def _tag_path(name: str, tag: str) -> str:
    return f"{_name_path(name)}/tags/{quote(tag, safe='')}"


def _tag_of(ref: Ref) -> str:
    """Return the tag of a ref; RefError if it names a version in another way."""
    if ref.tag is None:
        raise RefError(str(ref), "has no tag", f"Write {ref.name}:TAG")
    return ref.tag


def _reference(ref: Ref) -> str:
    """Return the version in a ref; empty for a bare name."""
    return str(ref)[len(ref.name) + 1 :]


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
