"""Handlers for models that are not here but at the upstream (`hub.upstream`): by redirects, or from the cache.

In both modes the metadata of a file is answered here: huggingface_hub follows no redirect of a HEAD request to another host,
and since 1.33 it would send this hub's token along if that host is huggingface.co. A redirect of a GET request leads to the
commit that the metadata is of, so that a client never has bytes of one commit under the name of another. What comes in pages is
answered here too: a client would send this hub's token along to the next page of the upstream. Nothing here names Xet, so that
clients use plain downloads.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from adapterhub.http.urls import next_page
from adapterhub.hub import commits
from adapterhub.hub.commits import Commit
from adapterhub.hub.hub import Hub
from adapterhub.hub.settings import UPSTREAM_MODES
from adapterhub.hub.upstream.model_client import NoModelError, NoRevisionError
from adapterhub.hub.upstream.model_listing import ModelListing
from adapterhub.hub.upstream.models import UpstreamModels
from adapterhub.registry.repository_documents import MAIN
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RemoteError

from . import api_documents, reading
from .hf_errors import ENTRY, REVISION, ResponseError, no_such_repository
from .reading import path_part

_REDIRECT = UPSTREAM_MODES[0]
_PAGE, _PAGE_EXPANDED = 1000, 50
_MAX_DOCUMENT = 4 << 20  # bytes of a document that is passed on
_MAX_REVISION = 255  # characters: git keeps a branch in a file of its name


async def model_info(hub: Hub, request: Request) -> Response:
    """GET /api/models/{id} and /revision/{rev}."""
    models, name = await _upstream(hub, request)
    if models.settings.mode == _REDIRECT:
        return _redirect(models, request)
    listing = await _listing(models, request, name)
    blobs = request.query_params.get("blobs", "") in ("true", "1", "True")
    return JSONResponse(listing.info(blobs=blobs))


async def tree(hub: Hub, request: Request) -> Response:
    """GET …/tree/{rev}[/{dir}], in pages."""
    models, name = await _upstream(hub, request)
    listing = await _listing(models, request, name)
    folder = request.path_params.get("path", "").strip("/")
    recursive, expand = (request.query_params.get(key, "").lower() in ("true", "1") for key in ("recursive", "expand"))
    after = request.query_params.get("cursor", "")
    entries = await hub.workers.read(_tree_entries, listing, folder, recursive=recursive, expand=expand)
    limit = _PAGE_EXPANDED if expand else _PAGE
    page = [entry for entry in entries if entry["path"] > after][: limit + 1]
    headers = {}
    if len(page) > limit:
        query = urlencode({**request.query_params, "cursor": page[limit - 1]["path"]})
        headers["link"] = f'<{hub.url(request)}{quote(request.url.path)}?{query}>; rel="next"'
    return JSONResponse(page[:limit], headers=headers)


def _tree_entries(listing: ModelListing, folder: str, *, recursive: bool, expand: bool) -> list[dict[str, Any]]:
    """Return the files and folders in a folder, sorted by path."""
    start = len(folder) + 1 if folder else 0
    inside = [file for path, file in listing.files.items() if not folder or path.startswith(f"{folder}/")]
    if folder and not inside:
        raise ResponseError(404, ENTRY, f"{folder}: no such folder", {"x-repo-commit": listing.commit})
    commit = _commit(listing)
    entries = [
        api_documents.file_entry(file, commit if expand else None)
        for file in inside
        if recursive or "/" not in file.path[start:]
    ]
    folders = api_documents.folders((file.path for file in inside), folder)
    entries += [api_documents.folder_entry(path, commit) for path in folders if recursive or "/" not in path[start:]]
    return sorted(entries, key=lambda entry: str(entry["path"]))


async def paths_info(hub: Hub, request: Request) -> Response:
    """POST …/paths-info/{rev}, as a form or as JSON."""
    models, name = await _upstream(hub, request)
    if models.settings.mode == _REDIRECT:
        return _redirect(models, request)
    listing = await _listing(models, request, name)
    paths, expand = await reading.requested_paths(request)
    commit, entries = _commit(listing), []
    folders = set(api_documents.folders(listing.files, ""))
    for path in dict.fromkeys(paths):
        if file := listing.files.get(path):
            entries.append(api_documents.file_entry(file, commit if expand else None))
        elif path in folders:
            entries.append(api_documents.folder_entry(path, commit))
    return JSONResponse(entries)


async def refs(hub: Hub, request: Request) -> Response:
    """GET …/refs: as the upstream has them now, or `main` while it does not answer."""
    models, name = await _upstream(hub, request)
    if models.settings.mode == _REDIRECT:
        return _redirect(models, request)
    listing = await _listing(models, request, name)
    try:
        raw, _ = await models.document(f"/api/models/{quote(name)}/refs", name, _MAX_DOCUMENT)
        return JSONResponse(json_file.parse_object(raw, name))
    except RemoteError:
        main = api_documents.ref_entry("heads", MAIN, listing.commit)
        return JSONResponse({"branches": [main], "tags": [], "converts": [], "pullRequests": []})


async def history(hub: Hub, request: Request) -> Response:
    """GET …/commits/{rev}: as the upstream has them now, in its pages."""
    models, name = await _upstream(hub, request)
    await _listing(models, request, name)
    query = urlencode({key: request.query_params[key] for key in ("p", "cursor") if key in request.query_params})
    path = f"/api/models/{quote(name)}/commits/{quote(path_part(request, 'revision'), safe='')}"
    raw, link = await models.document(f"{path}?{query}", name, _MAX_DOCUMENT)
    next_url = next_page(link, models.settings.endpoint, name)
    # Read and written again: a query of another server is no text for a header of this one.
    next_query = urlencode(parse_qsl(urlsplit(next_url).query, max_num_fields=10)) if next_url else ""
    headers = {"link": f'<{hub.url(request)}{path}?{next_query}>; rel="next"'} if next_url else {}
    return JSONResponse(_list(raw, name), headers=headers)


async def redirected(hub: Hub, request: Request) -> Response:
    """Anything else that is read of a model: only by a redirect."""
    models, name = await _upstream(hub, request)
    if models.settings.mode != _REDIRECT:
        raise no_such_repository(name)
    return _redirect(models, request)


async def resolve(hub: Hub, request: Request) -> Any:
    """GET and HEAD /{id}/resolve/{rev}/{path}, and /raw/."""
    models, name = await _upstream(hub, request)
    listing = await _listing(models, request, name)
    path = request.path_params["path"]
    file = listing.files.get(path)
    if file is None:
        words = f"{path}: no such file in {name}@{path_part(request, 'revision')}"
        raise ResponseError(404, ENTRY, words, {"x-repo-commit": listing.commit})
    if models.settings.mode == _REDIRECT and request.method == "GET":
        return RedirectResponse(models.address_of_file(listing, path), 307, {"x-repo-commit": listing.commit})
    headers = reading.file_headers(listing.commit, file)
    if request.method == "HEAD":
        return Response(headers={**headers, "accept-ranges": "bytes", "content-length": str(file.size)})
    return await models.file(listing, file, headers, request.headers.get("range"))


# ---- what they share


async def _upstream(hub: Hub, request: Request) -> tuple[UpstreamModels, str]:
    """Return the upstream's models, and the name that a request reads, in the spelling of its client.

    Raises:
        ResponseError: There is no upstream, or the name is not one of it.
    """
    parts = [path_part(request, key) for key in ("namespace", "repo") if key in request.path_params]
    name, models = "/".join(parts), hub.upstream
    # An escaped slash in a part of a name is of no name.
    if models is None or name.count("/") >= len(parts) or not await models.has_name(hub.identify(request), name):
        raise no_such_repository(name)
    return models, name


async def _listing(models: UpstreamModels, request: Request, name: str) -> ModelListing:
    """Return the model at the revision of a request; ResponseError if the upstream has none, or not for everybody."""
    revision = path_part(request, "revision")
    # What the upstream does not have is remembered by its name.
    if len(revision) > _MAX_REVISION:
        raise ResponseError(404, REVISION, f"{name}@{revision[:80]}…: no such revision")
    try:
        return await models.listing(name, MAIN if revision in ("", commits.HEAD) else revision)
    except NoModelError as error:
        raise no_such_repository(name) from error
    except NoRevisionError as error:
        raise ResponseError(404, REVISION, f"{name}@{revision}: no such revision") from error
    except RemoteError as error:
        if error.code != "gated-model":
            raise
        raise ResponseError(403, "GatedRepo", f"{name} is gated at the upstream, and this hub has no access to it") from error


def _redirect(models: UpstreamModels, request: Request) -> Response:
    return RedirectResponse(models.address(request), 307)


def _list(raw: bytes, location: str) -> Any:
    """Return the list in a document of the upstream."""
    return json_file.parse_object(b'{"list":%b}' % raw, location)["list"]


def _commit(listing: ModelListing) -> Commit:
    return Commit(listing.commit, {}, time=listing.time)
