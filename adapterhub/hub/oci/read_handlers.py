"""Handlers that read manifests, blobs, tags and referrers."""

from __future__ import annotations

import heapq
import json
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest
from adapterhub.hub import commits
from adapterhub.hub.access_control import GatedError, NoTokenError, may_write
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import View
from adapterhub.hub.downloads import OCI
from adapterhub.hub.hub import Hub
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.ref import LATEST
from adapterhub.registry import withdrawals
from adapterhub.registry.repository_documents import Repository
from adapterhub.registry.version_lookup import deprecation
from adapterhub.remotes.layouts.layout_index import INDEX_TYPE
from adapterhub_converters.errors import NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .names_and_digests import name_of, parse_digest, sha256_of, sha512_of, visible_view
from .oci_errors import DIGEST, VERSION, OciError

_MAX_PAGE = 1000  # repositories in a page
_MAX_TAGS = 10_000  # in a page
_IMMUTABLE = "private, max-age=31536000, immutable"  # for requests by digest


@dataclass(frozen=True)
class StoredManifest:
    """A manifest of a repository: its digest as its tag records it, its bytes, its media type, and why it is deprecated, if so.

    `row` is the version behind it, if any.
    """

    digest: str
    raw: bytes
    media_type: str
    deprecated: str | None = None
    row: VersionRow | None = None


async def get_manifest(hub: Hub, request: Request) -> Response:
    """GET and HEAD /v2/{name}/manifests/{reference}."""
    identity, name, reference = hub.identify(request), name_of(request), str(request.path_params["reference"])
    digest = parse_digest(reference) if ":" in reference else ""

    def work(worker: Worker) -> StoredManifest:
        view = visible_view(worker, hub, identity, name)
        found_manifest = find_manifest(hub, worker, view, reference)
        hub.policy_gate.check(worker, identity, view, found_manifest.row)
        if request.method == "GET":
            hub.record_read(view, sha256_of(hub, view.name, found_manifest.digest), OCI)
            if found_manifest.row:
                hub.downloads.count(found_manifest.row, OCI)
        return found_manifest

    found_manifest = await hub.workers.run(work)
    headers = {
        **VERSION,
        DIGEST: digest or found_manifest.digest,
        "etag": f'"{found_manifest.digest}"',
        "content-type": found_manifest.media_type,
    }
    if digest:
        headers["cache-control"] = _IMMUTABLE
    if found_manifest.deprecated is not None:
        headers["warning"] = warning(
            f"{name}:{reference} is deprecated{f': {found_manifest.deprecated}' if found_manifest.deprecated else ''}"
        )
    return Response(found_manifest.raw, headers=headers)


def warning(text: str) -> str:
    """Return the value of a Warning header, which clients print (distribution-spec v1.1, "Warnings")."""
    printable = "".join(letter if letter.isprintable() and letter not in '"\\' else " " for letter in text)[:1000]
    return f'299 - "{printable}"'.encode("latin-1", "replace").decode("latin-1")


def find_manifest(hub: Hub, worker: Worker, view: View, reference: str) -> StoredManifest:
    """Return the manifest that a tag, a number or a digest names: of a version, or another one of the repository.

    Raises:
        OciError: There is no such manifest.
    """
    try:
        row = commits.row_of(worker, view, sha256_of(hub, view.name, reference) if ":" in reference else reference)
    except NotFoundError:
        pass
    else:
        raw = worker.registry.store.read_document(row.digest)
        return StoredManifest(row.digest, raw, MANIFEST_TYPE, deprecation(worker.registry.ledger, row), row)
    # Not a version: look among the other manifests.
    repository = view.repository or Repository()
    digest_in_tag = reference if ":" in reference else repository.tags.get(reference, "")
    digest = sha256_of(hub, view.name, digest_in_tag)
    if digest not in repository.manifests:
        raise OciError(404, "MANIFEST_UNKNOWN", f"{view.name}: no manifest {reference[:140]}")
    return StoredManifest(digest_in_tag, worker.registry.store.read_document(digest), repository.manifests[digest].media_type)


async def get_blob(hub: Hub, request: Request) -> Any:
    """GET and HEAD /v2/{name}/blobs/{digest}."""
    identity, name, requested = hub.identify(request), name_of(request), parse_digest(str(request.path_params["digest"]))

    def work(worker: Worker) -> tuple[Digest, int]:
        digest = sha256_of(hub, name, requested)
        # Another repository may have uploaded under this sha512.
        try:
            size = readable_size(hub, worker, identity, name, digest or requested)
        except RefusedError as error:
            # Clients ask before they send a file, and a mended version has files of the one that was withdrawn.
            is_before_push = request.method == "HEAD" and (identity is None or may_write(identity, name))
            if error.code != withdrawals.CODE or not is_before_push:
                raise
            size = None if identity is None else hub.store.size(digest)
        if size is None and identity is None:  # a client that logs in only when challenged may have just uploaded it
            raise NoTokenError
        if size is None:
            raise OciError(404, "BLOB_UNKNOWN", f"{name}: no blob {requested}")
        if request.method == "GET" and (view := hub.visible(worker, identity, name)):
            hub.record_read(view, digest or requested, OCI)
        return digest, size

    digest, size = await hub.workers.run(work)
    headers = {
        **VERSION, DIGEST: requested, "etag": f'"{digest}"', "content-type": "application/octet-stream",
        "cache-control": _IMMUTABLE, "x-content-type-options": "nosniff",
    }  # fmt: skip
    return hub.blob(digest, size, headers, request.headers.get("range"))


def readable_size(hub: Hub, worker: Worker, identity: Identity | None, name: str, digest: Digest) -> int | None:
    """Return the size in bytes of a blob that a client may read through a repository; None if there is no such blob.

    A client that may write also sees uploads, even before the repository exists.

    Raises:
        GatedError: The client may not read the files of the repository.
        RefusedError: Every version with the blob is refused by the policy.
    """
    view = _visible_or_new(hub, worker, identity, name)
    size = hub.blob_size(worker, view, view.name if view else name, digest, uploads=may_write(identity, name))
    if view and size is not None:
        hub.policy_gate.check_blob(worker, identity, view, digest)
    return size


def _visible_or_new(hub: Hub, worker: Worker, identity: Identity | None, name: str) -> View | None:
    """Return a visible repository; None for a missing one that the account may create."""
    if may_write(identity, name) and hub.visible(worker, identity, name) is None:
        return None
    return visible_view(worker, hub, identity, name)


async def tags(hub: Hub, request: Request) -> Response:
    """GET /v2/{name}/tags/list, in pages: `n` tags after `last`."""
    identity, name, last = hub.identify(request), name_of(request), request.query_params.get("last", "")
    requested = _page_limit(request)
    limit = _MAX_TAGS if requested is None else min(requested, _MAX_TAGS)

    def work(worker: Worker) -> list[str]:
        view = visible_view(worker, hub, identity, name)
        if view.frozen:
            listed = {LATEST, *commits.tags(worker, view)}
        else:
            listed = {*(view.repository.tags if view.repository else ())}
            listed.update(queries.tag_names(worker.registry.index, view.name, last, limit + 1))
        return heapq.nsmallest(limit + 1, (tag for tag in listed if tag > last))

    listed, headers = _page(request, await hub.workers.run(work), limit)
    return JSONResponse({"name": name, "tags": listed}, headers=headers)


def _page_limit(request: Request) -> int | None:
    """Return how many entries the client wants; None for as many as there may be."""
    text = request.query_params.get("n", "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _page(request: Request, listed: list[str], limit: int) -> tuple[list[str], dict[str, str]]:
    """Return the first entries, and headers with a link to the next page."""
    if limit >= len(listed):
        return listed, VERSION
    listed = listed[:limit]
    link = {"link": f'<{request.url.path}?n={limit}&last={quote(listed[-1])}>; rel="next"'} if listed else {}
    return listed, {**VERSION, **link}


async def catalog(hub: Hub, request: Request) -> Response:
    """GET /v2/_catalog, as docker's registry has it: the repositories the client may see, in pages."""
    identity, last, limit = (
        hub.identify(request),
        request.query_params.get("last", ""),
        min(_page_limit(request) or _MAX_PAGE, _MAX_PAGE),
    )
    # Challenge first: clients send their token only when asked, and would see public repositories only.
    if identity is None and "authorization" not in request.headers:
        raise NoTokenError

    def work(worker: Worker) -> list[str]:
        listed: list[str] = []
        position, may_read = last, hub.reader(worker, identity)
        while len(listed) <= limit:
            names = hub.names_after(worker, identity, position, limit + 1)
            listed += [name for name in names if commits.is_listed(worker, name, may_read)]
            if len(names) <= limit:
                break
            position = names[-1]
        return listed[: limit + 1]

    listed, headers = _page(request, await hub.workers.run(work), limit)
    return JSONResponse({"repositories": listed}, headers=headers)


async def referrers(hub: Hub, request: Request) -> Response:
    """GET /v2/{name}/referrers/{digest}: an index of the manifests about a manifest, which need not exist yet."""
    identity, name, subject = hub.identify(request), name_of(request), parse_digest(str(request.path_params["digest"]))
    kind = request.query_params.get("artifactType", "")

    def work(worker: Worker) -> list[dict[str, Any]]:
        view = _visible_or_new(hub, worker, identity, name)
        digest = sha256_of(hub, name, subject)
        # An attachment may name its subject by sha256 or by sha512.
        subjects = {subject, digest, sha512_of(hub, name, digest)} - {""}
        listed = []
        for manifest_digest, manifest in (view.repository.manifests if view and view.repository else {}).items():
            if manifest.subject in subjects and kind in ("", manifest.artifact_type):
                sha512 = subject.startswith("sha512:") and sha512_of(hub, name, manifest_digest)
                entry: dict[str, Any] = {
                    "mediaType": manifest.media_type,
                    "digest": sha512 or manifest_digest,
                    "size": manifest.size,
                }
                entry |= {"artifactType": manifest.artifact_type} if manifest.artifact_type else {}
                listed.append(entry | ({"annotations": dict(manifest.annotations)} if manifest.annotations else {}))
        return listed

    listed = await hub.workers.run(work)
    headers = {**VERSION, "content-type": INDEX_TYPE}
    if kind:
        headers["oci-filters-applied"] = "artifactType"
    answer = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": listed}
    return Response(json.dumps(answer, separators=(",", ":")), headers=headers)


def mountable_size(hub: Hub, worker: Worker, identity: Identity | None, name: str, digest: Digest) -> int | None:
    """Like `readable_size`, for a mount: None also if the source repository is missing or its blob hidden from the client."""
    try:
        return readable_size(hub, worker, identity, name, digest)
    except (OciError, NoTokenError, GatedError, RefusedError):
        return None
