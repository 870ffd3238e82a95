"""Manifests, blobs, tags and referrers for those who read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest
from adapterhub.hub import commits
from adapterhub.hub.access import NoTokenError, writes
from adapterhub.hub.commits import View
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.registry.repositories import Repository
from adapterhub.registry.versions import deprecation
from adapterhub.remotes.layouts.index import INDEX_TYPE
from adapterhub_converters.errors import NotFoundError, RefusedError

from .answers import DIGEST, VERSION, OciError
from .references import found, known_as, name_of, parse_digest, stored

_MOST = 1000  # repositories of a page
_FOR_EVER = "private, max-age=31536000, immutable"  # what is asked for by its digest


@dataclass(frozen=True)
class Found:
    """A manifest of a repository: its digest as its tag has it, its bytes, its media type, why it is deprecated, if it is.

    `row` is the version that it is, if any.
    """

    digest: str
    raw: bytes
    media_type: str
    deprecated: str | None = None
    row: Row | None = None


async def get_manifest(hub: Hub, request: Request) -> Response:
    """GET and HEAD /v2/{name}/manifests/{reference}."""
    who, name, reference = hub.identify(request), name_of(request), str(request.path_params["reference"])
    asked = parse_digest(reference) if ":" in reference else ""

    def work(worker: Worker) -> Found:
        one = manifest(hub, worker, found(hub, worker, who, name), reference)
        hub.releases.check(worker, who, one.row)
        return one

    one = await hub.workers.run(work)
    headers = {**VERSION, DIGEST: asked or one.digest, "etag": f'"{one.digest}"', "content-type": one.media_type}
    if asked:
        headers["cache-control"] = _FOR_EVER
    if one.deprecated is not None:
        headers["warning"] = warning(f"{name}:{reference} is deprecated{f': {one.deprecated}' if one.deprecated else ''}")
    return Response(one.raw, headers=headers)


def warning(text: str) -> str:
    """The value of a Warning header, which clients print (distribution-spec v1.1, "Warnings")."""
    shown = "".join(letter if letter.isprintable() and letter not in '"\\' else " " for letter in text)[:1000]
    return f'299 - "{shown}"'.encode("latin-1", "replace").decode("latin-1")


def manifest(hub: Hub, worker: Worker, of: View, reference: str) -> Found:
    """The manifest that a tag, a number or a digest names: of a version, else of those that are none; OciError without it."""
    try:
        row = commits.row_of(worker, of, stored(hub, reference) if ":" in reference else reference)
    except NotFoundError:
        pass
    else:
        raw = worker.registry.store.read_document(row.digest)
        return Found(row.digest, raw, MANIFEST_TYPE, deprecation(worker.registry.ledger, row), row)
    repository = of.repository or Repository()
    named = reference if ":" in reference else repository.tags.get(reference, "")
    digest = stored(hub, named)
    if digest not in repository.manifests:
        raise OciError(404, "MANIFEST_UNKNOWN", f"{of.name}: no manifest {reference[:140]}")
    return Found(named, worker.registry.store.read_document(digest), repository.manifests[digest].media_type)


async def get_blob(hub: Hub, request: Request) -> Any:
    """GET and HEAD /v2/{name}/blobs/{digest}."""
    who, name, asked = hub.identify(request), name_of(request), parse_digest(str(request.path_params["digest"]))

    def work(worker: Worker) -> tuple[Digest, int]:
        digest = stored(hub, asked)
        size = readable(hub, worker, who, name, digest or asked)  # others may have sent something under this sha512
        if size is None and who is None:  # clients that log in when they are told to may have uploaded it just now
            raise NoTokenError
        if size is None:
            raise OciError(404, "BLOB_UNKNOWN", f"{name}: no blob {asked}")
        return digest, size

    digest, size = await hub.workers.run(work)
    headers = {
        **VERSION, DIGEST: asked, "etag": f'"{digest}"', "content-type": "application/octet-stream", "cache-control": _FOR_EVER,
        "x-content-type-options": "nosniff",
    }  # fmt: skip
    return hub.blob(digest, size, headers, request.headers.get("range"))


def readable(hub: Hub, worker: Worker, who: Identity | None, name: str, digest: Digest) -> int | None:
    """The bytes of a blob that somebody may read through a repository; None without it.

    Who may write sees what was uploaded too, even before there is a repository.

    Raises:
        RefusedError: The policy allows no version that has it.
    """
    of = _seen(hub, worker, who, name)
    size = hub.has_blob(worker, of, of.name if of else name, digest, uploads=writes(who, name))
    if of and size is not None:
        hub.releases.check_blob(worker, who, of, digest)
    return size


def _seen(hub: Hub, worker: Worker, who: Identity | None, name: str) -> View | None:
    """As `found`; None for a missing repository that the account may create."""
    if writes(who, name) and hub.visible(worker, who, name) is None:
        return None
    return found(hub, worker, who, name)


async def tags(hub: Hub, request: Request) -> Response:
    """GET /v2/{name}/tags/list, in pages: `n` of them after `last`."""
    who, name, asked = hub.identify(request), name_of(request), request.query_params

    def work(worker: Worker) -> list[str]:
        of = found(hub, worker, who, name)
        listed = {"latest"} if of.frozen else set(of.repository.tags) if of.repository else set()
        for row in commits.rows(worker, of):
            listed.update((f"v{row.number}", *(() if of.frozen else row.tags)))
        return sorted(tag for tag in listed if tag > asked.get("last", ""))

    listed, headers = _page(request, await hub.workers.run(work), _most(request))
    return JSONResponse({"name": name, "tags": listed}, headers=headers)


def _most(request: Request) -> int | None:
    """How many entries a client wants."""
    text = request.query_params.get("n", "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _page(request: Request, listed: list[str], most: int | None) -> tuple[list[str], dict[str, str]]:
    """The first of some entries, and the headers with where the others are."""
    if most is None or most >= len(listed):
        return listed, VERSION
    listed = listed[:most]
    link = {"link": f'<{request.url.path}?n={most}&last={quote(listed[-1])}>; rel="next"'} if listed else {}
    return listed, {**VERSION, **link}


async def catalog(hub: Hub, request: Request) -> Response:
    """GET /v2/_catalog, as docker's registry has it: the repositories that the client may see, in pages."""
    who, last, most = hub.identify(request), request.query_params.get("last", ""), min(_most(request) or _MOST, _MOST)
    if who is None and "authorization" not in request.headers:
        raise NoTokenError

    def work(worker: Worker) -> list[str]:
        names = {one.name for one in queries.names(worker.registry.index) if not one.deleted} | set(worker.repositories.names())
        seen = (hub.visible(worker, who, name) for name in sorted(names) if name > last)
        return [
            of.name for of in islice((of for of in seen if of and not (of.repository and of.repository.moved_to)), most + 1)
        ]

    listed, headers = _page(request, await hub.workers.run(work), most)
    return JSONResponse({"repositories": listed}, headers=headers)


async def referrers(hub: Hub, request: Request) -> Response:
    """GET /v2/{name}/referrers/{digest}: an index of the manifests about a manifest, be that there or not."""
    who, name, asked = hub.identify(request), name_of(request), parse_digest(str(request.path_params["digest"]))
    kind = request.query_params.get("artifactType", "")

    def work(worker: Worker) -> list[dict[str, Any]]:
        of = _seen(hub, worker, who, name)
        digest = stored(hub, asked)
        subjects = {asked, digest, known_as(hub, digest)} - {""}
        listed = []
        for one, other in (of.repository.manifests if of and of.repository else {}).items():
            if other.subject in subjects and kind in ("", other.artifact_type):
                shown = asked.startswith("sha512:") and known_as(hub, one)
                entry: dict[str, Any] = {"mediaType": other.media_type, "digest": shown or one, "size": other.size}
                entry |= {"artifactType": other.artifact_type} if other.artifact_type else {}
                listed.append(entry | ({"annotations": dict(other.annotations)} if other.annotations else {}))
        return listed

    listed = await hub.workers.run(work)
    headers = {**VERSION, "content-type": INDEX_TYPE}
    if kind:
        headers["oci-filters-applied"] = "artifactType"
    answer = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": listed}
    return Response(json.dumps(answer, separators=(",", ":")), headers=headers)


def check_readable(hub: Hub, worker: Worker, who: Identity | None, name: str, digest: Digest) -> int | None:
    """As `readable`, for a mount: None also from a repository that is not there, or whose blob `who` may not have."""
    try:
        return readable(hub, worker, who, name, digest)
    except (OciError, NoTokenError, RefusedError):
        return None
