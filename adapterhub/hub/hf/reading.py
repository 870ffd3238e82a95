"""Handlers that read repositories, files and refs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest
from adapterhub.hub import commits
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.git_objects import GitFile
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.access_tokens import Identity
from adapterhub.hub.request_context import read_body
from adapterhub.hub.workers import Worker
from adapterhub.index import version_search
from adapterhub.index.version_search import Query
from adapterhub.manifest import card as cards
from adapterhub.manifest.card import Card
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError, UsageError

from . import api_documents
from .hf_errors import ENTRY, REVISION, MovedError, ResponseError, no_such_repository

_PAGE, _PAGE_EXPANDED, _MAX_LISTED, _MAX_COUNTED = 1000, 50, 500, 1000
_MAX_SIBLINGS = 20_000  # files in one list of repositories
_MAX_BODY = 4 << 20  # bytes of a JSON body
_MAX_FILTERS, _MAX_FIELDS = 50, 10_000


def name_of(request: Request) -> str:
    """Return the repository of a path. Names are lower case here, but clients may have learned another spelling."""
    return f"{path_part(request, 'namespace')}/{path_part(request, 'repo')}".lower()


def path_part(request: Request, key: str) -> str:
    """Return a path parameter with its escaped slashes decoded (`app.RequestGuard` keeps them escaped)."""
    return str(request.path_params.get(key, "")).replace("%2F", "/")


def query_number(request: Request, key: str, default: int = 0) -> int:
    """Return a whole number of the query string, at most a million; `default` for anything else."""
    text = request.query_params.get(key, "")
    return min(int(text), 1_000_000) if text.isascii() and text.isdecimal() and len(text) < 20 else default


def visible_view(hub: Hub, worker: Worker, identity: Identity | None, name: str) -> View:
    """Return a repository that the client may see.

    Raises:
        AnswerError: It does not exist, or is hidden from the client.
        MovedError: It has another name now.
    """
    view = hub.visible(worker, identity, name)
    if view is None:
        raise no_such_repository(name)
    if view.repository and view.repository.moved_to:
        if hub.visible(worker, identity, view.repository.moved_to) is None:
            raise no_such_repository(name)
        raise MovedError(name, view.repository.moved_to)
    return view


def commit_at(worker: Worker, view: View, revision: str) -> Commit:
    """Return the commit of a revision.

    Raises:
        AnswerError: There is no such revision.
    """
    try:
        return commits.find(worker, view, revision)
    except NotFoundError as error:
        raise ResponseError(404, REVISION, str(error)) from error


def files_of(hub: Hub, commit: Commit) -> list[GitFile]:
    """Return the files of a commit as git knows them."""
    return [hub.git.file(path, *file) for path, file in sorted(commit.files.items())]


def card_of(hub: Hub, commit: Commit) -> Card | None:
    """Return the model card of a commit; None if there is none, or it is too large to read."""
    for path, (digest, size) in commit.files.items():
        if path.lower() in cards.NAMES and size <= cards.MAX_BYTES:
            return hub.cards.get(digest, partial(_read_card, hub, digest))
    return None


def _read_card(hub: Hub, digest: Digest) -> Card:
    return cards.decode(hub.store.read_document(digest))


def _dump(document: Any) -> bytes:
    return bytes(JSONResponse(document).body)


def _json(document: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(document, headers=headers, media_type="application/json")


# ---- repositories


async def model_info(hub: Hub, request: Request) -> Response:
    """GET /api/models/{id} and /revision/{rev}."""
    identity, name = hub.identify(request), name_of(request)
    revision = path_part(request, "revision") or commits.HEAD
    blobs = request.query_params.get("blobs", "") in ("true", "1", "True")

    def work(worker: Worker) -> bytes:
        view = visible_view(hub, worker, identity, name)
        return worker.answers.get(("model", name, view.head, revision, blobs), partial(build, worker, view))[0]

    def build(worker: Worker, view: View) -> tuple[bytes, str]:
        commit = commit_at(worker, view, revision)
        return _dump(api_documents.model_info(view, commit, files_of(hub, commit), card_of(hub, commit), blobs=blobs)), ""

    return _json(await hub.workers.run(work))


async def without_namespace(_hub: Hub, request: Request) -> Response:
    """GET of a model such as `gpt2`: clients look for base models here, too, but adapters always have a namespace."""
    raise no_such_repository(path_part(request, "repo"))


async def list_models(hub: Hub, request: Request) -> Response:
    """GET /api/models: by words, author, and the tags of `api_documents.tags`; the newest first if there are no words."""
    identity, params = hub.identify(request), request.query_params
    limit, start = max(1, min(query_number(request, "limit", 100), _MAX_LISTED)), query_number(request, "cursor")
    query = _query(params.get("search", ""), params.getlist("filter"), params.get("author", "").lower())
    full = params.get("full", "").lower() in ("true", "1")

    def work(worker: Worker) -> tuple[list[dict[str, Any]], bool]:
        views = matching_views(hub, worker, identity, query, most=start + limit + 1)[start:]
        listed: list[dict[str, Any]] = []
        files = 0
        for view in views[:limit]:
            commit = commits.version_commit_without_message(worker, view.newest) if view.newest else commits.EMPTY
            files += len(commit.files) if full else 0
            if listed and files > _MAX_SIBLINGS:
                break
            summary = api_documents.summary(view, view.newest, commit.id, card_of(hub, commit))
            listed.append({**summary, "siblings": api_documents.siblings(files_of(hub, commit))} if full else summary)
        return listed, len(views) > len(listed)

    listed, is_more = await hub.workers.run(work)
    headers = {}
    if is_more:
        kept_params = [(key, value) for key, value in params.multi_items() if key != "cursor"]
        query_text = urlencode([*kept_params, ("cursor", start + len(listed))])
        headers["link"] = f'<{hub.url(request)}/api/models?{query_text}>; rel="next"'
    return JSONResponse(listed, headers=headers)


def matching_views(hub: Hub, worker: Worker, identity: Identity | None, query: Query, *, most: int) -> list[View]:
    """Return the repositories with versions that match a query, as far as the client may see them."""
    limit, query = most, replace(query, without=hub.hidden_names(worker, identity))
    while True:
        rows = version_search.search(worker.registry.index, replace(query, limit=limit)).rows
        views = [view for view in (hub.visible(worker, identity, row.name) for row in rows) if view and view.newest]
        if len(views) >= most or len(rows) < limit:
            return views[:most]
        limit *= 8  # some of the results became hidden after they were listed: look further


async def overview(hub: Hub, request: Request) -> Response:
    """GET /api/users/{name}/overview and /api/organizations/{name}/overview: a namespace with anything visible in it."""
    identity, namespace = hub.identify(request), path_part(request, "namespace").lower()

    def work(worker: Worker) -> int:
        return len(matching_views(hub, worker, identity, Query(namespace=namespace), most=_MAX_COUNTED))

    models = await hub.workers.run(work)
    if not models and not (identity and identity.account == namespace):
        raise ResponseError(404, "", f"{namespace}: no such user or organization")
    answer = {
        "_id": namespace,
        "name": namespace,
        "user": namespace,
        "fullname": namespace,
        "numModels": models,
        "avatarUrl": "",
        "isPro": False,
    }
    zero = dict.fromkeys(("numDatasets", "numSpaces", "numUsers", "numFollowers"), 0)
    return JSONResponse({**answer, **zero, "type": "org" if "organizations" in request.url.path else "user"})


def _query(words: str, filters: list[str], namespace: str) -> Query:
    facets, tags = [], []
    for text in (facet for several in filters for facet in several.split(",")):
        kind, _, value = text.partition(":")
        if kind == "base_model":
            facets.append(("base", value.removeprefix("adapter:")))
        elif kind in ("license", "language", "dataset"):
            facets.append((kind, value))
        elif text == "gguf":
            facets.append(("format", text))
        elif text not in ("peft", "library:peft", "safetensors", ""):
            tags.append(text)
    if len(facets) + len(tags) > _MAX_FILTERS:
        raise UsageError("filter", f"more than {_MAX_FILTERS} filters")
    return Query(words=words, facets=tuple(facets), tags=tuple(tags), namespace=namespace)


async def tags_by_type(hub: Hub, request: Request) -> Response:
    """GET /api/models-tags-by-type: the tags that repositories can be filtered by."""

    def work(worker: Worker) -> dict[str, set[str]]:
        by_kind: dict[str, set[str]] = {"license": set(), "language": set(), "dataset": set(), "other": set()}
        for view in matching_views(hub, worker, identity, Query(), most=_MAX_COUNTED):
            for tag in api_documents.tags(view.newest, None):
                kind, _, value = tag.rpartition(":")
                by_kind[kind if kind in by_kind else "other"].add(tag if value else "")
        return by_kind

    identity = hub.identify(request)
    kinds = await hub.workers.run(work)
    answer = {
        kind: [{"id": tag, "label": tag.rpartition(":")[2], "type": kind} for tag in sorted(tags)]
        for kind, tags in {"library": {"peft"}, **kinds}.items()
    }
    return JSONResponse(answer)


async def refs(hub: Hub, request: Request) -> Response:
    """GET …/refs."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> dict[str, Any]:
        view = visible_view(hub, worker, identity, name)
        heads = [api_documents.ref_entry("heads", branch, commit) for branch, commit in commits.branches(view).items()]
        tags = [api_documents.ref_entry("tags", tag, commit) for tag, commit in commits.tags(worker, view).items()]
        return {"branches": heads, "tags": tags, "converts": [], "pullRequests": []}

    return JSONResponse(await hub.workers.run(work))


async def history(hub: Hub, request: Request) -> Response:
    """GET …/commits/{rev}, in pages."""
    identity, name, revision = hub.identify(request), name_of(request), path_part(request, "revision")
    page = query_number(request, "p")

    def work(worker: Worker) -> tuple[int, list[dict[str, Any]]]:
        view = visible_view(hub, worker, identity, name)
        first = commit_at(worker, view, revision)
        idents = commits.history(worker, view, revision)
        shown = idents[page * _PAGE_EXPANDED : (page + 1) * _PAGE_EXPANDED]
        entries = (first if ident == first.id else commits.by_id(worker, view, ident) for ident in shown)
        return len(idents), [api_documents.commit_entry(commit) for commit in entries]

    total, listed = await hub.workers.run(work)
    headers = {"x-total-count": str(total)}
    if total > (page + 1) * _PAGE_EXPANDED:
        path = f"/api/models/{name}/commits/{quote(revision, safe='')}"
        headers["link"] = f'<{hub.url(request)}{path}?p={page + 1}>; rel="next"'
    return JSONResponse(listed, headers=headers)


# ---- files


async def tree(hub: Hub, request: Request) -> Response:
    """GET …/tree/{rev}[/{dir}], in pages."""
    identity, name, revision = hub.identify(request), name_of(request), path_part(request, "revision")
    folder = request.path_params.get("path", "").strip("/")
    recursive, expand = (request.query_params.get(key, "").lower() in ("true", "1") for key in ("recursive", "expand"))
    after = request.query_params.get("cursor", "")

    limit = _PAGE_EXPANDED if expand else _PAGE

    def work(worker: Worker) -> tuple[bytes, str]:
        view = visible_view(hub, worker, identity, name)
        return worker.answers.get(
            ("tree", name, view.head, revision, folder, recursive, expand, after), partial(build, worker, view)
        )

    def build(worker: Worker, view: View) -> tuple[bytes, str]:
        commit = commit_at(worker, view, revision)
        inside = {path for path in commit.files if not folder or path.startswith(f"{folder}/")}
        if folder and not inside:
            raise ResponseError(404, ENTRY, f"{folder}: no such folder", {"x-repo-commit": commit.id})
        start = len(folder) + 1 if folder else 0
        shown_files = [
            file for file in files_of(hub, commit) if file.path in inside and (recursive or "/" not in file.path[start:])
        ]
        listed = [api_documents.file_entry(file, commit if expand else None) for file in shown_files]
        parents = api_documents.folders(inside, folder)
        listed += [api_documents.folder_entry(path, commit) for path in parents if recursive or "/" not in path[start:]]
        listed = sorted((entry for entry in listed if entry["path"] > after), key=lambda entry: str(entry["path"]))
        return _dump(listed[:limit]), listed[limit - 1]["path"] if len(listed) > limit else ""

    page, last = await hub.workers.run(work)
    headers = {}
    if last:
        query = urlencode({**request.query_params, "cursor": last})
        headers["link"] = f'<{hub.url(request)}{quote(request.url.path)}?{query}>; rel="next"'
    return _json(page, headers)


async def paths_info(hub: Hub, request: Request) -> Response:
    """POST …/paths-info/{rev}, as a form or as JSON."""
    identity, name, revision = hub.identify(request), name_of(request), path_part(request, "revision")
    await hub.workers.run(lambda worker: visible_view(hub, worker, identity, name))  # before its body
    paths, expand = await requested_paths(request)

    def work(worker: Worker) -> list[dict[str, Any]]:
        view = visible_view(hub, worker, identity, name)
        commit = commit_at(worker, view, revision)
        folders = set(api_documents.folders(commit.files, ""))
        listed = []
        for path in dict.fromkeys(paths):
            if path in commit.files:
                listed.append(api_documents.file_entry(hub.git.file(path, *commit.files[path]), commit if expand else None))
            elif path in folders:
                listed.append(api_documents.folder_entry(path, commit))
        return listed

    return JSONResponse(await hub.workers.run(work))


async def requested_paths(request: Request) -> tuple[list[str], bool]:
    """Return the paths that the body of a request names, and whether their commits are asked for."""
    if request.headers.get("content-type", "").startswith("application/json"):
        document = json_file.parse_object(await read_body(request, _MAX_BODY), "paths-info")
        paths = document.get("paths", [])
        paths = [paths] if isinstance(paths, str) else [str(path) for path in paths] if isinstance(paths, list) else []
        return [path.strip("/") for path in paths], bool(document.get("expand"))
    fields = parse_form(await read_body(request, _MAX_BODY))
    return [path.strip("/") for path in fields.get("paths", [])], fields.get("expand", [""])[0].lower() in ("true", "1")


def parse_form(raw: bytes) -> dict[str, list[str]]:
    """Parse a form, which may have several values per field. UsageError for too many fields."""
    from urllib.parse import parse_qs

    try:
        return parse_qs(raw.decode("utf-8", "replace"), max_num_fields=_MAX_FIELDS)
    except ValueError as error:
        raise UsageError("form", f"more than {_MAX_FIELDS:,} fields") from error


async def resolve(hub: Hub, request: Request) -> Any:
    """GET and HEAD /{id}/resolve/{rev}/{path}."""
    identity, name, revision = hub.identify(request), name_of(request), path_part(request, "revision")
    path = request.path_params["path"]

    def work(worker: Worker) -> tuple[Commit, GitFile]:
        view = visible_view(hub, worker, identity, name)
        commit = commit_at(worker, view, revision)
        if path not in commit.files:
            raise ResponseError(404, ENTRY, f"{path}: no such file in {name}@{revision}", {"x-repo-commit": commit.id})
        file = hub.git.file(path, *commit.files[path])
        if commit.row:
            hub.policy_gate.check(worker, identity, commit.row)
        else:
            hub.policy_gate.check_blob(worker, identity, view, file.digest)
        return commit, file

    commit, file = await hub.workers.run(work)
    headers = file_headers(commit.id, file)
    # A HEAD request is about the whole file: only GET has ranges (RFC 9110, 14.2).
    return hub.blob(file.digest, file.size, headers, request.headers.get("range") if request.method == "GET" else None)


def file_headers(commit: str, file: GitFile) -> dict[str, str]:
    """Return the headers by which clients know a file of a commit, besides lengths and ranges."""
    headers = {
        "x-repo-commit": commit,
        "etag": f'"{file.etag}"',
        "content-type": "application/octet-stream",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.path.rpartition('/')[2])}",
        "x-content-type-options": "nosniff",
        "cache-control": "private, max-age=0, must-revalidate",
        "access-control-expose-headers": "X-Repo-Commit,X-Linked-Size,X-Linked-ETag,ETag,Content-Length,Content-Range",
    }
    if file.lfs:
        headers |= {"x-linked-size": str(file.size), "x-linked-etag": f'"{file.etag}"'}
    return headers
