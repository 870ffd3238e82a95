"""Handlers that read repositories, files and refs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest
from adapterhub.hub import commits, gates, request_texts, stars
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.administration import profiles
from adapterhub.hub.administration.profiles import Profile
from adapterhub.hub.commits import PROPOSALS, Commit, View
from adapterhub.hub.downloads import HUGGING_FACE
from adapterhub.hub.git_objects import GitFile
from adapterhub.hub.hub import Hub
from adapterhub.hub.policy_gate import check_not_withdrawn
from adapterhub.hub.popularity import DOWNLOADS, LIKES
from adapterhub.hub.ranked_listing import ranked_page
from adapterhub.hub.request_context import read_body, read_object
from adapterhub.hub.workers import Worker
from adapterhub.index import version_listing
from adapterhub.index.index_database import Index
from adapterhub.index.version_listing import Conditions, Page, Position
from adapterhub.manifest import card as cards
from adapterhub.manifest.card import Card
from adapterhub.registry.repository_documents import open_proposals
from adapterhub_converters.errors import NotFoundError, UsageError

from . import api_documents, model_filters
from .api_documents import Facets
from .hf_errors import ENTRY, REVISION, MovedError, ResponseError, no_such_repository
from .model_filters import ListRequest

_PAGE, _PAGE_EXPANDED, _MAX_COUNTED = 1000, 50, 1000
_MAX_TAGS = 1000  # of each kind
# Types of the Hub's tags, and the kinds of facets that they are here.
_TAG_TYPES = {
    "library": ("library",), "pipeline_tag": ("pipeline",), "license": ("license",), "language": ("language",),
    "dataset": ("dataset",), "other": ("tag", "container", "method", "base"),
}  # fmt: skip
_MAX_SIBLINGS = 20_000  # files in one list of repositories
_MAX_BODY = 4 << 20  # bytes of a JSON body
_MAX_FIELDS = 10_000


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


def visible_view(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> View:
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


def usable_commit_at(worker: Worker, view: View, revision: str) -> Commit:
    """Return the commit that a revision names, for a client that is about to use it; RefusedError if it was withdrawn."""
    commit = commit_at(worker, view, revision)
    if commit.row:
        check_not_withdrawn(worker, commit.row)
    return commit


def files_of(hub: Hub, commit: Commit) -> list[GitFile]:
    """Return the files of a commit as git knows them."""
    return [hub.git.file(path, *file) for path, file in sorted(commit.files.items())]


def card_of(hub: Hub, commit: Commit) -> Card | None:
    """Return the model card of a commit; None if there is none, or it is too large to read."""
    for path, (digest, size) in commit.files.items():
        if path.lower() in cards.NAMES and size <= cards.MAX_BYTES:
            return hub.cards.get(digest, partial(_read_card, hub, digest))
    return None


def facets_of(worker: Worker, view: View, commit: Commit) -> Facets:
    """Return what the index has of the version of a commit; nothing for an incomplete tree."""
    if commit.row is None:
        return {}
    facets = version_listing.facets(worker.registry.index, [commit.row])[commit.row.name, commit.row.number]
    # A conversion has the facts of its version in another format.
    container = {"container": ["gguf" if commit.row.format == "gguf" else "safetensors"]} if view.frozen else {}
    return {**facets, **container}


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
    fields = model_filters.expanded_fields(request.query_params)

    def work(worker: Worker) -> bytes:
        view = visible_view(worker, hub, identity, name)
        (changing,) = _changing_fields(hub, worker, [commits.source_name(view)])
        key = ("model", name, view.head, revision, blobs, fields, *changing.values())
        return worker.caches.answers.get(key, partial(build, worker, view, changing))[0]

    def build(worker: Worker, view: View, changing: dict[str, Any]) -> tuple[bytes, str]:
        # Without a revision it is about the repository, which stays even if no version of it can be used.
        find_commit = usable_commit_at if "revision" in request.path_params else commit_at
        commit = find_commit(worker, view, revision)
        facets = facets_of(worker, view, commit)
        created = version_listing.first_times(worker.registry.index, [view.name]).get(view.name, "")
        document = api_documents.model_info(
            view, commit, files_of(hub, commit), card_of(hub, commit), facets, created=created, blobs=blobs
        )
        document.update(changing)
        return _dump(api_documents.only(document, fields)), ""

    return _json(await hub.workers.run(work))


async def without_namespace(_hub: Hub, request: Request) -> Response:
    """GET of a model such as `gpt2`: clients look for base models here, too, but adapters always have a namespace."""
    raise no_such_repository(path_part(request, "repo"))


def identify_reader(hub: Hub, request: Request) -> Identity | None:
    """Return who asks for a list; NoTokenError for a stranger where only accounts see anything."""
    identity = hub.identify(request)
    if identity is None and hub.access.require_login:
        raise NoTokenError
    return identity


async def list_models(hub: Hub, request: Request) -> Response:
    """GET /api/models: the last push first, by the parameters of `model_filters`."""
    identity, params = identify_reader(hub, request), request.query_params
    wanted = model_filters.parse(params)

    def work(worker: Worker) -> tuple[list[dict[str, Any]], Position | None]:
        conditions = _with_names(worker, wanted, hub.hidden_names(worker, identity))
        index = worker.registry.index
        page = _page(hub, index, wanted, conditions)
        may_read = hub.reader(worker, identity)
        views = [view for row in page.rows if (view := commits.listed_view(worker, row, may_read))]
        newest = {view.name: view.newest for view in views if view.newest}
        facets, created = version_listing.facets(index, [*newest.values()]), version_listing.first_times(index, [*newest])
        listed: list[dict[str, Any]] = []
        files = 0
        for view in views:
            row = newest[view.name]
            facets_of_row = facets[row.name, row.number]
            document = api_documents.summary(view, row, commits.main_id(view), facets_of_row, created.get(row.name, ""))
            if wanted.with_files or wanted.with_card:
                commit = commits.version_commit_without_message(worker, row)
                files += len(commit.files)
                if listed and files > _MAX_SIBLINGS:
                    return listed, page.positions[str(listed[-1]["id"])]
                document |= _extras(hub, commit, wanted, facets_of_row)
            listed.append(api_documents.only(document, wanted.fields))
        for fields, document in zip(
            _changing_fields(hub, worker, [str(document["id"]) for document in listed]), listed, strict=True
        ):
            document.update((key, value) for key, value in fields.items() if key in document)
        return listed, page.end

    listed, end = await hub.workers.run(work)
    headers = {}
    if end:
        kept_params = [(key, value) for key, value in params.multi_items() if key != "cursor"]
        query_text = urlencode([*kept_params, ("cursor", str(end))])
        headers["link"] = f'<{hub.url(request)}/api/models?{query_text}>; rel="next"'
    return JSONResponse(listed, headers=headers)


def _page(hub: Hub, index: Index, wanted: ListRequest, conditions: Conditions) -> Page:
    if wanted.order in (DOWNLOADS, LIKES):
        ranking = hub.rankings.get(wanted.order)
        return ranked_page(index, ranking, conditions, after=wanted.after, limit=wanted.limit, ascending=wanted.ascending)
    by_creation = wanted.order == model_filters.CREATED
    return version_listing.page(
        index, conditions, after=wanted.after, limit=wanted.limit, oldest_first=wanted.ascending, by_creation=by_creation
    )


def _with_names(worker: Worker, wanted: ListRequest, hidden: frozenset[str]) -> Conditions:
    """Return the conditions of a list for a client, without the names hidden from it, and for gated names or for others."""
    conditions = replace(wanted.conditions, without=hidden)
    if wanted.gated is None:
        return conditions
    names = tuple(name for name in gates.gated_names(worker.database) if name not in hidden)
    return replace(conditions, among=names) if wanted.gated else replace(conditions, without=hidden.union(names))


def _changing_fields(hub: Hub, worker: Worker, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what changes of each name without its repository: downloads, stars, and whether it is gated."""
    downloads, likes, modes = (
        hub.downloads.recent(names),
        stars.counts(worker.database, names),
        gates.modes(worker.database, names),
    )
    return [{"downloads": downloads[name], "likes": likes.get(name, 0), "gated": modes.get(name, False)} for name in names]


def _extras(hub: Hub, commit: Commit, wanted: ListRequest, facets: Facets) -> dict[str, Any]:
    """Return the fields of a list that a client asks for, because they take a look at the version's files."""
    extras: dict[str, Any] = {}
    if wanted.with_files:
        extras["siblings"] = api_documents.siblings([hub.git.file(path, *file) for path, file in sorted(commit.files.items())])
        extras["usedStorage"] = sum(size for _, size in commit.files.values())
    if wanted.with_card:
        extras["cardData"] = api_documents.card_data(card_of(hub, commit), commit.row, facets)
    return extras


async def overview(hub: Hub, request: Request) -> Response:
    """GET /api/users/{name}/overview and /api/organizations/{name}/overview: a namespace with anything visible in it."""
    identity, namespace = identify_reader(hub, request), path_part(request, "namespace").lower()

    def work(worker: Worker) -> tuple[int, Profile]:
        hidden = hub.hidden_names(worker, identity)
        count = version_listing.count_names(worker.registry.index, namespace, hidden, _MAX_COUNTED)
        return count, profiles.find_profile(worker.database, namespace)

    models, profile = await hub.workers.run(work)
    if not models and not (identity and identity.account == namespace):
        raise ResponseError(404, "", f"{namespace}: no such user or organization")
    answer = {
        "_id": namespace,
        "name": namespace,
        "user": namespace,
        "fullname": profile.full_name or namespace,
        "details": profile.about or None,
        "numModels": models,
        "avatarUrl": "",
        "isPro": False,
    }
    zero = dict.fromkeys(("numDatasets", "numSpaces", "numUsers", "numFollowers"), 0)
    return JSONResponse({**answer, **zero, "type": "org" if "organizations" in request.url.path else "user"})


async def tags_by_type(hub: Hub, request: Request) -> Response:
    """GET /api/models-tags-by-type: the tags that repositories can be filtered by, of each kind the most frequent ones."""
    identity = identify_reader(hub, request)

    def work(worker: Worker) -> dict[str, list[str]]:
        kinds = tuple(kind for several in _TAG_TYPES.values() for kind in several)
        return version_listing.values_of_kinds(worker.registry.index, kinds, hub.hidden_names(worker, identity), _MAX_TAGS)

    values = await hub.workers.run(work)
    answer = {}
    for kind, facets in _TAG_TYPES.items():
        tags = {api_documents.tag(facet, value): value for facet in facets for value in values[facet]}
        answer[kind] = [{"id": tag, "label": label, "type": kind} for tag, label in sorted(tags.items())]
    return JSONResponse(answer)


async def refs(hub: Hub, request: Request) -> Response:
    """GET …/refs."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> dict[str, Any]:
        view = visible_view(worker, hub, identity, name)
        heads = [api_documents.ref_entry("heads", branch, commit) for branch, commit in commits.branches(view).items()]
        tags = [api_documents.ref_entry("tags", tag, commit) for tag, commit in commits.tags(worker, view).items()]
        return {"branches": heads, "tags": tags, "converts": [], "pullRequests": _proposal_refs(view)}

    return JSONResponse(await hub.workers.run(work))


def _proposal_refs(view: View) -> list[dict[str, str]]:
    numbers = open_proposals(view.repository).items()
    return [
        {"name": f"{PROPOSALS}{number}", "ref": f"{PROPOSALS}{number}", "targetCommit": proposal.commit}
        for number, proposal in numbers
    ]


async def history(hub: Hub, request: Request) -> Response:
    """GET …/commits/{rev}, in pages, each of which names the commit that the next one begins with."""
    identity, name, revision = hub.identify(request), name_of(request), path_part(request, "revision")
    page, start = query_number(request, "p"), request.query_params.get("cursor") or revision
    if page and start == revision:
        raise UsageError("p", "is no page without the cursor of the link to it", "Follow the links from the first page")

    def work(worker: Worker) -> tuple[list[dict[str, Any]], str]:
        view = visible_view(worker, hub, identity, name)
        commit_at(worker, view, start)
        listed = [*islice(commits.history(worker, view, start), _PAGE_EXPANDED + 1)]
        # Records of earlier releases may lead in a circle.
        most = len(view.repository.commits if view.repository else ()) + (view.newest.number if view.newest else 0)
        is_more = len(listed) > _PAGE_EXPANDED and (page + 1) * _PAGE_EXPANDED < most
        return [api_documents.commit_entry(commit) for commit in listed[:_PAGE_EXPANDED]], listed[-1].id if is_more else ""

    listed, start_of_next = await hub.workers.run(work)
    headers = {}
    if start_of_next:
        path = f"/api/models/{name}/commits/{quote(revision, safe='')}?p={page + 1}&cursor={start_of_next}"
        headers["link"] = f'<{hub.url(request)}{path}>; rel="next"'
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
        view = visible_view(worker, hub, identity, name)
        return worker.caches.answers.get(
            ("tree", name, view.head, revision, folder, recursive, expand, after), partial(build, worker, view)
        )

    def build(worker: Worker, view: View) -> tuple[bytes, str]:
        commit = usable_commit_at(worker, view, revision)
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
    await hub.workers.run(lambda worker: visible_view(worker, hub, identity, name))  # before its body
    paths, expand = await requested_paths(request)

    def work(worker: Worker) -> list[dict[str, Any]]:
        view = visible_view(worker, hub, identity, name)
        commit = usable_commit_at(worker, view, revision)
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
        document = await read_object(request, _MAX_BODY)
        paths = document.get("paths", [])
        paths = [paths] if isinstance(paths, str) else [str(path) for path in paths] if isinstance(paths, list) else []
        return [path.strip("/") for path in paths], bool(document.get("expand"))
    fields = request_texts.parse_form(await read_body(request, _MAX_BODY), _MAX_FIELDS)
    return [path.strip("/") for path in fields.get("paths", [])], fields.get("expand", [""])[0].lower() in ("true", "1")


async def resolve(hub: Hub, request: Request) -> Any:
    """GET and HEAD /{id}/resolve/{rev}/{path}, and /raw/, where a large file is the file here too, and no pointer to it.

    Pages have links to files and pictures: a browser's session counts here.
    """
    identity, name, revision = hub.identify_visitor(request), name_of(request), path_part(request, "revision")
    path = request.path_params["path"]
    # A HEAD request is about the whole file: only GET has ranges (RFC 9110, 14.2).
    range_header = request.headers.get("range") if request.method == "GET" else None

    def work(worker: Worker) -> tuple[Commit, GitFile]:
        view = visible_view(worker, hub, identity, name)
        commit = commit_at(worker, view, revision)
        if path not in commit.files:
            raise ResponseError(404, ENTRY, f"{path}: no such file in {name}@{revision}", {"x-repo-commit": commit.id})
        file = hub.git.file(path, *commit.files[path])
        hub.policy_gate.check_file(worker, identity, view, commit, file.digest)
        if request.method == "GET":
            hub.downloads.count_file(commit.row, commit.files, file.digest, range_header)
            hub.record_read(view, commit.row.digest if commit.row else file.digest, HUGGING_FACE)
        return commit, file

    commit, file = await hub.workers.run(work)
    headers = file_headers(commit.id, file)
    return hub.blob(file.digest, file.size, headers, range_header)


def file_headers(commit: str, file: GitFile) -> dict[str, str]:
    """Return the headers by which clients know a file of a commit, besides lengths and ranges."""
    headers = {
        "x-repo-commit": commit,
        "etag": f'"{file.etag}"',
        "content-type": "application/octet-stream",
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.path.rpartition('/')[2])}",
        "x-content-type-options": "nosniff",
        "cache-control": "private, max-age=0, must-revalidate",
    }
    if file.lfs:
        headers |= {"x-linked-size": str(file.size), "x-linked-etag": f'"{file.etag}"'}
    return headers
