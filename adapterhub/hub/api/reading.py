"""Handlers that list, search and show versions and their logs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.downloads import download_counts
from adapterhub.hub.hf.reading import query_number
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub.index.version_search import Bounds, Query, parse_bounds, parse_metric
from adapterhub.maintenance.retention import chosen_rule
from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.ref import Ref
from adapterhub.registry.version_lookup import Version, never_set
from adapterhub.remotes import content_documents, version_documents
from adapterhub.remotes.catalog import Listing
from adapterhub.version import __version__
from adapterhub_converters.errors import UsageError

from .api_requests import (
    DRY_RUN,
    catalog_for,
    check_known,
    check_reader,
    is_set,
    name_of,
    ref_of,
    ref_to,
    tag_of,
    visible_view,
)

_MAX_COUNTS = 10_000  # versions, days and protocols
_PAGE, _MAX_RESULTS, _MAX_CONDITIONS = 500, 1000, 50
_MAX_READ = 2_000  # entries of a log that are read for a page
_MAX_CHARACTERS = 1 << 20  # of their messages: an approval has up to 64 KiB
MAX_CONTENT_QUERY = 8 << 20
"""Bytes of a body with digests to search for."""
MAX_TENSORS = 50_000
"""Tensors to search for in one request."""


async def about(_hub: Hub, _request: Request) -> Response:
    """GET /api/adapterhub: that this is a hub of ours, with which versions of the API, whose changes can be rehearsed."""
    return JSONResponse({"program": "adapterhub", "version": __version__, "api": [1], DRY_RUN: True})


async def versions(hub: Hub, request: Request) -> Response:
    """GET …/versions: those of a name or a namespace (`prefix`), with a manifest (`digest`), or all; in pages."""
    identity, params = hub.identify(request), request.query_params
    check_reader(hub, identity)
    prefix, digest, cursor = params.get("prefix") or None, params.get("digest"), params.get("cursor")
    after = Ref.parse(cursor) if cursor else None
    if after and not after.number:
        raise UsageError("cursor", "is not one of this list", "Begin without a cursor")

    def work(worker: Worker) -> tuple[dict[str, Any], Ref | None]:
        catalog = catalog_for(worker, hub, identity)
        if digest is not None:
            return version_documents.listing_document(Listing(catalog.versions_with(digest))), None
        listing, last = catalog.page(prefix, after, _PAGE)
        return version_documents.listing_document(listing), last

    document, last = await hub.workers.run(work)
    return JSONResponse(document, headers=_next_page(hub, request, str(last) if last else ""))


def _next_page(hub: Hub, request: Request, cursor: str) -> dict[str, str]:
    """Return the header that leads to the next page; none without a cursor."""
    if not cursor:
        return {}
    kept_params = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
    query = urlencode([*kept_params, ("cursor", cursor)])
    return {"link": f'<{hub.url(request)}{request.url.path}?{query}>; rel="next"'}


async def search(hub: Hub, request: Request) -> Response:
    """GET …/search: by words and fields, the best match first."""
    identity, params = hub.identify(request), request.query_params
    check_reader(hub, identity)
    facets = [(kind, value) for kind in ("base", "method", "license", "target", "language") for value in params.getlist(kind)]
    bounds = [
        (column, _bounds(text, kind)) for column, kind in (("r", "rank"), ("size", "size")) for text in params.getlist(kind)
    ]
    metrics, tags = tuple(parse_metric(text, "metric") for text in params.getlist("metric")), tuple(params.getlist("tag"))
    if len(facets) + len(bounds) + len(metrics) + len(tags) > _MAX_CONDITIONS:
        raise UsageError("search", f"more than {_MAX_CONDITIONS} conditions")
    query = Query(
        words=params.get("words", ""),
        facets=tuple(facets),
        tags=tags,
        namespace=params.get("namespace", ""),
        bounds=tuple(bounds),
        metrics=metrics,
        all_versions=is_set(request, "all_versions"),
        limit=min(query_number(request, "limit", 20), _MAX_RESULTS),
    )

    def work(worker: Worker) -> dict[str, Any]:
        answer = catalog_for(worker, hub, identity).search(query, facets=is_set(request, "facets"))
        return {**version_documents.search_document(answer), "has_more": answer.result.has_more}

    return JSONResponse(await hub.workers.run(work))


def _bounds(text: str, kind: str) -> Bounds:
    return parse_bounds(text, kind, size=kind == "size")


async def find(hub: Hub, request: Request) -> Response:
    """POST …/find: the versions that contain a file, a folder or a digest, for clients with a token."""
    identity = hub.identify(request)
    if identity is None:
        raise NoTokenError
    query = content_documents.read_content_query(await read_object(request, MAX_CONTENT_QUERY), "find")
    if not isinstance(query.contents, str) and len(query.contents.tensors) > MAX_TENSORS:
        raise UsageError("find", f"more than {MAX_TENSORS:,} tensors", "Search for a part of them")

    def work(worker: Worker) -> dict[str, Any]:
        answer = catalog_for(worker, hub, identity).find([query])
        return {**content_documents.content_answer_document(answer), "unlisted": answer.unlisted}

    return JSONResponse(await hub.workers.run(work))


async def usage(hub: Hub, request: Request) -> Response:
    """GET …/usage: the disk usage of versions that the client may see, for clients with a token."""
    identity, prefix = hub.identify(request), request.query_params.get("prefix") or None
    if identity is None:
        raise NoTokenError

    def work(worker: Worker) -> dict[str, Any]:
        answer = catalog_for(worker, hub, identity).usage(prefix)
        return {**content_documents.usage_document(answer), "models": content_documents.models_document(answer.models)}

    return JSONResponse(await hub.workers.run(work))


# ---- one name


async def show(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/versions/{reference}: everything that is known of a version."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> Any:
        visible_view(worker, hub, identity, name)
        return catalog_for(worker, hub, identity).show(ref_of(request, name))

    return JSONResponse(await hub.workers.run(work))


async def lineage(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/versions/{reference}/lineage."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> dict[str, Any]:
        visible_view(worker, hub, identity, name)
        return catalog_for(worker, hub, identity).lineage(ref_of(request, name))

    return JSONResponse(await hub.workers.run(work))


async def log(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/log: of a name, removed or not, or of one version (`reference`); in pages, newest entry first."""
    identity, name = hub.identify(request), name_of(request)
    reference, before = request.query_params.get("reference", ""), query_number(request, "cursor")

    def work(worker: Worker) -> tuple[dict[str, Any], int]:
        check_known(worker, hub, identity, name)
        ref = ref_to(name, reference) if reference else Ref(name)
        entries, cursor = worker.registry.log_page(
            ref, before=before, limit=_PAGE, most_read=_MAX_READ, most_characters=_MAX_CHARACTERS
        )
        if ref.tag and not before and not cursor and not any(entry.tags for entry in entries):
            raise never_set(ref)
        return version_documents.log_document(name, entries), cursor

    document, last = await hub.workers.run(work)
    return JSONResponse(document, headers=_next_page(hub, request, str(last) if last else ""))


async def retention(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/retention: how many of the newest versions a gc keeps, and for how many seconds; null for all."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> KeepRule | None:
        visible_view(worker, hub, identity, name)
        return chosen_rule(worker.registry, Ref(name))

    return JSONResponse(version_documents.retention_document(name, await hub.workers.run(work)))


async def downloads(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/downloads: by version, day and protocol, the last day first, and those of the last 30 days."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> dict[str, Any]:
        visible_view(worker, hub, identity, name)
        hub.downloads.write()
        counts = [asdict(count) for count in download_counts(worker.database, name, _MAX_COUNTS)]
        return {"name": name, "recent": hub.downloads.recent([name])[name], "counts": counts}

    return JSONResponse(await hub.workers.run(work))


async def tag(hub: Hub, request: Request) -> Response:
    """GET …/names/{name}/tags/{tag}: the version that a tag is at, whose digest is the ETag."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> Version:
        visible_view(worker, hub, identity, name)
        return worker.registry.resolve(Ref(name, tag=tag_of(request)))

    return version_response(await hub.workers.run(work))


def version_response(version: Version, status: int = 200) -> Response:
    """Return the response with a version, whose digest is the ETag."""
    document = {**version_documents.version_document(version), "moved": version.moved}
    return JSONResponse(document, status, {"etag": f'"{version.digest}"'})
