"""Repositories, files and refs for those who read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest
from adapterhub.hub import commits
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.git import GitFile
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.uploads import TooLargeError, collected
from adapterhub.hub.workers import Worker
from adapterhub.index import search
from adapterhub.index.search import Query
from adapterhub.manifest import card as cards
from adapterhub.manifest.card import Card
from adapterhub.store.store import Store
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import NotFoundError, UsageError

from . import documents
from .answers import ENTRY, REVISION, AnswerError, MovedError, no_such_repository

_PAGE, _PAGE_EXPANDED, _MOST_LISTED, _MOST_COUNTED = 1000, 50, 500, 1000
_MOST_SIBLINGS = 20_000  # files in a list of repositories
_MAX_BODY = 4 << 20  # bytes of a JSON body
_MOST_FILTERS, _MOST_FIELDS = 50, 10_000


def name_of(request: Request) -> str:
    """The repository of a path; names are lower case here, and clients may have learned another spelling."""
    return f"{part(request, 'namespace')}/{part(request, 'repo')}".lower()


def part(request: Request, key: str) -> str:
    """A part of the path, with the slashes that it had in its encoded form."""
    return str(request.path_params.get(key, "")).replace("%2F", "/")


def number(request: Request, key: str, default: int = 0) -> int:
    """A whole number in the query of a request, from 0 to a million; `default` for anything else."""
    text = request.query_params.get(key, "")
    return min(int(text), 1_000_000) if text.isascii() and text.isdecimal() and len(text) < 20 else default


def found(hub: Hub, worker: Worker, who: Identity | None, name: str) -> View:
    """A repository that `who` may see, or the error for one that does not exist."""
    of = hub.visible(worker, who, name)
    if of is None:
        raise no_such_repository(name)
    if of.repository and of.repository.moved_to:
        if hub.visible(worker, who, of.repository.moved_to) is None:
            raise no_such_repository(name)
        raise MovedError(name, of.repository.moved_to)
    return of


def at(worker: Worker, of: View, revision: str) -> Commit:
    """The commit of a revision, or the error for one that does not exist."""
    try:
        return commits.find(worker, of, revision)
    except NotFoundError as error:
        raise AnswerError(404, REVISION, str(error)) from error


def files_of(hub: Hub, commit: Commit) -> list[GitFile]:
    """The files of a commit as git knows them."""
    return [hub.git.file(path, *file) for path, file in sorted(commit.files.items())]


def card_of(hub: Hub, commit: Commit) -> Card | None:
    """The model card of a commit; None without one, or with one too large to read."""
    for path, (digest, size) in commit.files.items():
        if path.lower() in cards.NAMES and size <= cards.MAX_BYTES:
            return _card(hub.store, digest)
    return None


@lru_cache(maxsize=256)
def _card(store: Store, digest: Digest) -> Card:
    return cards.decode(store.read_document(digest))


def _dump(document: Any) -> bytes:
    return bytes(JSONResponse(document).body)


def _json(document: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(document, headers=headers, media_type="application/json")


# ---- repositories


async def model_info(hub: Hub, request: Request) -> Response:
    """GET /api/models/{id} and /revision/{rev}."""
    who, name = hub.identify(request), name_of(request)
    revision = part(request, "revision") or commits.HEAD
    blobs = request.query_params.get("blobs", "") in ("true", "1", "True")

    def work(worker: Worker) -> bytes:
        of = found(hub, worker, who, name)
        return worker.answers.get(("model", name, of.head, revision, blobs), partial(made, worker, of))[0]

    def made(worker: Worker, of: View) -> tuple[bytes, str]:
        commit = at(worker, of, revision)
        return _dump(documents.model(of, commit, files_of(hub, commit), card_of(hub, commit), blobs=blobs)), ""

    return _json(await hub.workers.run(work))


async def without_namespace(_hub: Hub, request: Request) -> Response:
    """GET of a model such as `gpt2`, which no adapter's name is like: clients look for base models here too."""
    raise no_such_repository(part(request, "repo"))


async def list_models(hub: Hub, request: Request) -> Response:
    """GET /api/models: by words, author, and the tags of `documents.tags`; the newest first if there are no words."""
    who, asked = hub.identify(request), request.query_params
    limit, start = max(1, min(number(request, "limit", 100), _MOST_LISTED)), number(request, "cursor")
    query = _query(asked.get("search", ""), asked.getlist("filter"), asked.get("author", "").lower())
    full = asked.get("full", "").lower() in ("true", "1")

    def work(worker: Worker) -> tuple[list[dict[str, Any]], bool]:
        found = visible(hub, worker, who, query, most=start + limit + 1)[start:]
        listed: list[dict[str, Any]] = []
        files = 0
        for of in found[:limit]:
            commit = commits.without_words(worker, of.newest) if of.newest else commits.EMPTY
            files += len(commit.files) if full else 0
            if listed and files > _MOST_SIBLINGS:
                break
            one = documents.summary(of, of.newest, commit.id, card_of(hub, commit))
            listed.append({**one, "siblings": documents.siblings(files_of(hub, commit))} if full else one)
        return listed, len(found) > len(listed)

    listed, is_more = await hub.workers.run(work)
    headers = {}
    if is_more:
        more = [(key, value) for key, value in asked.multi_items() if key != "cursor"]
        query_text = urlencode([*more, ("cursor", start + len(listed))])
        headers["link"] = f'<{hub.url(request)}/api/models?{query_text}>; rel="next"'
    return JSONResponse(listed, headers=headers)


def visible(hub: Hub, worker: Worker, who: Identity | None, query: Query, *, most: int) -> list[View]:
    """The repositories with versions that meet a query, as far as `who` may see them."""
    limit, query = most, replace(query, without=hub.hidden(worker, who))
    while True:
        rows = search.search(worker.registry.index, replace(query, limit=limit)).rows
        found = [of for of in (hub.visible(worker, who, row.name) for row in rows) if of and of.newest]
        if len(found) >= most or len(rows) < limit:
            return found[:most]
        limit *= 8  # some of them are not for everybody any more


async def overview(hub: Hub, request: Request) -> Response:
    """GET /api/users/{name}/overview and /api/organizations/{name}/overview: a namespace with something to see in it."""
    who, space = hub.identify(request), part(request, "namespace").lower()

    def work(worker: Worker) -> int:
        return len(visible(hub, worker, who, Query(namespace=space), most=_MOST_COUNTED))

    models = await hub.workers.run(work)
    if not models and not (who and who.account == space):
        raise AnswerError(404, "", f"{space}: no such user or organization")
    answer = {
        "_id": space,
        "name": space,
        "user": space,
        "fullname": space,
        "numModels": models,
        "avatarUrl": "",
        "isPro": False,
    }
    zero = dict.fromkeys(("numDatasets", "numSpaces", "numUsers", "numFollowers"), 0)
    return JSONResponse({**answer, **zero, "type": "org" if "organizations" in request.url.path else "user"})


def _query(words: str, filters: list[str], namespace: str) -> Query:
    facets, tags = [], []
    for text in (one for several in filters for one in several.split(",")):
        kind, _, value = text.partition(":")
        if kind == "base_model":
            facets.append(("base", value.removeprefix("adapter:")))
        elif kind in ("license", "language", "dataset"):
            facets.append((kind, value))
        elif text == "gguf":
            facets.append(("format", text))
        elif text not in ("peft", "library:peft", "safetensors", ""):
            tags.append(text)
    if len(facets) + len(tags) > _MOST_FILTERS:
        raise UsageError("filter", f"more than {_MOST_FILTERS} filters")
    return Query(words=words, facets=tuple(facets), tags=tuple(tags), namespace=namespace)


async def tags_by_type(hub: Hub, request: Request) -> Response:
    """GET /api/models-tags-by-type: what repositories can be filtered by."""

    def work(worker: Worker) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {"license": set(), "language": set(), "dataset": set(), "other": set()}
        for of in visible(hub, worker, who, Query(), most=_MOST_COUNTED):
            for tag in documents.tags(of.newest, None):
                kind, _, value = tag.rpartition(":")
                found[kind if kind in found else "other"].add(tag if value else "")
        return found

    who = hub.identify(request)
    kinds = await hub.workers.run(work)
    answer = {
        kind: [{"id": tag, "label": tag.rpartition(":")[2], "type": kind} for tag in sorted(tags)]
        for kind, tags in {"library": {"peft"}, **kinds}.items()
    }
    return JSONResponse(answer)


async def refs(hub: Hub, request: Request) -> Response:
    """GET …/refs."""
    who, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> dict[str, Any]:
        of = found(hub, worker, who, name)
        heads = [documents.ref("heads", branch, commit) for branch, commit in commits.branches(of).items()]
        tags = [documents.ref("tags", tag, commit) for tag, commit in commits.tags(worker, of).items()]
        return {"branches": heads, "tags": tags, "converts": [], "pullRequests": []}

    return JSONResponse(await hub.workers.run(work))


async def history(hub: Hub, request: Request) -> Response:
    """GET …/commits/{rev}, in pages."""
    who, name, revision = hub.identify(request), name_of(request), part(request, "revision")
    page = number(request, "p")

    def work(worker: Worker) -> list[dict[str, Any]]:
        of = found(hub, worker, who, name)
        at(worker, of, revision)
        return [documents.commit_entry(commit) for commit in commits.history(worker, of, revision)]

    listed = await hub.workers.run(work)
    headers = {"x-total-count": str(len(listed))}
    if len(listed) > (page + 1) * _PAGE_EXPANDED:
        path = f"/api/models/{name}/commits/{quote(revision, safe='')}"
        headers["link"] = f'<{hub.url(request)}{path}?p={page + 1}>; rel="next"'
    return JSONResponse(listed[page * _PAGE_EXPANDED : (page + 1) * _PAGE_EXPANDED], headers=headers)


# ---- files


async def tree(hub: Hub, request: Request) -> Response:
    """GET …/tree/{rev}[/{dir}], in pages."""
    who, name, revision = hub.identify(request), name_of(request), part(request, "revision")
    below = request.path_params.get("path", "").strip("/")
    recursive, expand = (request.query_params.get(key, "").lower() in ("true", "1") for key in ("recursive", "expand"))
    after = request.query_params.get("cursor", "")

    limit = _PAGE_EXPANDED if expand else _PAGE

    def work(worker: Worker) -> tuple[bytes, str]:
        of = found(hub, worker, who, name)
        return worker.answers.get(("tree", name, of.head, revision, below, recursive, expand, after), partial(made, worker, of))

    def made(worker: Worker, of: View) -> tuple[bytes, str]:
        commit = at(worker, of, revision)
        inside = {path for path in commit.files if not below or path.startswith(f"{below}/")}
        if below and not inside:
            raise AnswerError(404, ENTRY, f"{below}: no such folder", {"x-repo-commit": commit.id})
        start = len(below) + 1 if below else 0
        shown = [file for file in files_of(hub, commit) if file.path in inside and (recursive or "/" not in file.path[start:])]
        listed = [documents.entry(file, commit if expand else None) for file in shown]
        parents = documents.folders(inside, below)
        listed += [documents.folder(path, commit) for path in parents if recursive or "/" not in path[start:]]
        listed = sorted((one for one in listed if one["path"] > after), key=lambda one: str(one["path"]))
        return _dump(listed[:limit]), listed[limit - 1]["path"] if len(listed) > limit else ""

    page, last = await hub.workers.run(work)
    headers = {}
    if last:
        more = urlencode({**request.query_params, "cursor": last})
        headers["link"] = f'<{hub.url(request)}{quote(request.url.path)}?{more}>; rel="next"'
    return _json(page, headers)


async def paths_info(hub: Hub, request: Request) -> Response:
    """POST …/paths-info/{rev}, as a form or as JSON."""
    who, name, revision = hub.identify(request), name_of(request), part(request, "revision")
    wanted, expand = await _paths(request)

    def work(worker: Worker) -> list[dict[str, Any]]:
        of = found(hub, worker, who, name)
        commit = at(worker, of, revision)
        folders = set(documents.folders(commit.files, ""))
        listed = []
        for path in dict.fromkeys(wanted):
            if path in commit.files:
                listed.append(documents.entry(hub.git.file(path, *commit.files[path]), commit if expand else None))
            elif path in folders:
                listed.append(documents.folder(path, commit))
        return listed

    return JSONResponse(await hub.workers.run(work))


async def _paths(request: Request) -> tuple[list[str], bool]:
    if request.headers.get("content-type", "").startswith("application/json"):
        document = json_file.parse_object(await body(request, _MAX_BODY), "paths-info")
        paths = document.get("paths", [])
        paths = [paths] if isinstance(paths, str) else [str(path) for path in paths] if isinstance(paths, list) else []
        return [path.strip("/") for path in paths], bool(document.get("expand"))
    fields = parse_form(await body(request, _MAX_BODY))
    return [path.strip("/") for path in fields.get("paths", [])], fields.get("expand", [""])[0].lower() in ("true", "1")


def parse_form(raw: bytes) -> dict[str, list[str]]:
    """The fields of a form; UsageError for too many."""
    from urllib.parse import parse_qs

    try:
        return parse_qs(raw.decode("utf-8", "replace"), max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise UsageError("form", f"more than {_MOST_FIELDS:,} fields") from error


async def body(request: Request, limit: int) -> bytes:
    """The body of a request; 413 over `limit` bytes."""
    try:
        return await collected(request.stream(), limit)
    except TooLargeError as error:
        raise AnswerError(413, "", str(error)) from error


async def resolve(hub: Hub, request: Request) -> Any:
    """GET and HEAD /{id}/resolve/{rev}/{path}."""
    who, name, revision = hub.identify(request), name_of(request), part(request, "revision")
    path = request.path_params["path"]

    def work(worker: Worker) -> tuple[Commit, GitFile]:
        of = found(hub, worker, who, name)
        commit = at(worker, of, revision)
        if path not in commit.files:
            raise AnswerError(404, ENTRY, f"{path}: no such file in {name}@{revision}", {"x-repo-commit": commit.id})
        file = hub.git.file(path, *commit.files[path])
        if commit.row:
            hub.releases.check(worker, who, commit.row)
        else:
            hub.releases.check_blob(worker, who, of, file.digest)
        return commit, file

    commit, file = await hub.workers.run(work)
    headers = {
        "x-repo-commit": commit.id,
        "etag": f'"{file.etag}"',
        "content-type": "application/octet-stream",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
        "x-content-type-options": "nosniff",
        "cache-control": "private, max-age=0, must-revalidate",
        "access-control-expose-headers": "X-Repo-Commit,X-Linked-Size,X-Linked-ETag,ETag,Content-Length,Content-Range",
    }
    if file.lfs:
        headers |= {"x-linked-size": str(file.size), "x-linked-etag": f'"{file.etag}"'}
    # Of a HEAD request, the size is that of the file: only a GET has ranges (RFC 9110, 14.2).
    return hub.blob(file.digest, file.size, headers, request.headers.get("range") if request.method == "GET" else None)
