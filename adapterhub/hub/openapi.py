"""GET /api/openapi.json: the API of a hub as an OpenAPI document, without the pages for people.

Names of adapters are two path segments, a namespace and a repository. Slashes within another parameter, such as the path of a
file, may be sent as they are or as %2F.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.remotes.layouts.layout_index import INDEX_TYPE
from adapterhub.version import __version__

from . import openapi_versions
from .gates import MODES, STATUSES
from .hf.api_documents import EXPANDABLE
from .hf.model_filters import ORDERS
from .hub import Hub
from .openapi_schemas import (
    BOOLEAN,
    COUNT,
    DIGEST,
    JSON,
    LOGIN,
    MOVED,
    NONEMPTY,
    NOTHING,
    TEXT,
    Operation,
    Schema,
    list_of,
    object_of,
    reading,
)

_FORM, _LFS = "application/x-www-form-urlencoded", "application/vnd.git-lfs+json"
_BYTES, _LINES, _NUMBERS = "application/octet-stream", "application/x-ndjson", "text/plain"
_CAS_TOKEN = ("xet",)
_DIGITS: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_RAW: Schema = {"type": "string", "format": "binary"}
_BODY: Mapping[str, Schema] = {_BYTES: _RAW}
_MODEL: Schema = {"type": "string", "enum": ["model"]}
_GATED: Schema = {"enum": [*MODES, False]}
_STATUS: Schema = {"type": "string", "enum": [*STATUSES]}
_NAME: Schema = {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]*$", "maxLength": 100}
_PATH_PARAMETERS: Mapping[str, Schema] = {
    "namespace": {**_NAME, "examples": ["team"]},
    "repo": {**_NAME, "examples": ["sql"]},
    "revision": {**NONEMPTY, "description": "A branch, a tag, v3, or an id.", "examples": ["main"]},
    "branch": NONEMPTY,
    "path": {**NONEMPTY, "examples": ["adapter_config.json"]},
    "oid": {**_DIGITS, "description": "The sha256 of a file."},
    "hash": {**_DIGITS, "description": "The hash of a xorb."},
    "epoch": NONEMPTY,
    "digest": DIGEST,
    "reference": {**NONEMPTY, "description": "A tag, v3, or a digest.", "examples": ["latest"]},
    "session": NONEMPTY,
    "tag": {**NONEMPTY, "examples": ["prod"]},
    "account": {**_NAME, "examples": ["ada"]},
    "status": _STATUS,
    "ident": {"type": "integer", "minimum": 1, "description": "A number of the list."},
    "number": {"type": "integer", "minimum": 1, "description": "The number of a proposal."},
}
_TREE: Mapping[str, Schema] = {"recursive": BOOLEAN, "expand": BOOLEAN, "cursor": TEXT}
_PAGES: Mapping[str, Schema] = {"limit": COUNT, "cursor": TEXT}
_CREATE_PR: Mapping[str, Schema] = {"create_pr": BOOLEAN}
_FIELD: Schema = {"type": "string", "enum": [*EXPANDABLE]}
_MODEL_QUERY: Mapping[str, Schema] = {"blobs": BOOLEAN, "expand": list_of(_FIELD)}
_SIGNED: Mapping[str, Schema] = {"size": COUNT, "expires": COUNT, "signature": TEXT}
_NAMED: Mapping[str, Schema] = {"type": _MODEL, "name": TEXT, "organization": TEXT}
_VISIBLE: Mapping[str, Schema] = {"private": BOOLEAN, "visibility": {"type": "string", "enum": ["public", "private"]}}

_REPO = "/api/models/{namespace}/{repo}"
_OCI = "/v2/{namespace}/{repo}"
_CAS = "/xet/{epoch}/{namespace}/{repo}/v1"
_LFS_OBJECT = "/lfs/{namespace}/{repo}/{oid}"
_FILE = {200: _BYTES, 206: _BYTES, 302: _BYTES, 416: _BYTES}
_WRITING = (403, 404, 409, 413, 507)
_OFFERED = object_of("path", path=TEXT, size=COUNT, sample=TEXT)
_KINDS: Schema = {"type": "string", "enum": ["header", "file", "lfsFile", "deletedFile", "deletedFolder"]}
_ENCODED: Schema = {"type": "string", "enum": ["base64"]}
_CHANGE = object_of(summary=TEXT, path=TEXT, content=TEXT, encoding=_ENCODED, oid=_DIGITS, size=COUNT)
_LINE = object_of("key", "value", key=_KINDS, value=_CHANGE)
_PING = Operation("Tell whether this is an OCI registry, and how to log in")
_CREDENTIALS = object_of(grant_type=TEXT, username=TEXT, password=TEXT, refresh_token=TEXT, service=TEXT, scope=TEXT)
_TOKEN = Operation("Exchange a password, which is a token, for a token")
_BEGIN = Operation(
    "Begin the upload of a blob, mount one, or send it whole",
    {201: NOTHING, 202: NOTHING},
    (403, 404, 413, 507),
    {"digest": DIGEST, "mount": DIGEST, "from": TEXT},
    _BODY,
    needs=LOGIN,
)


_WITHOUT_NAMESPACE = Operation("Answer for a model of the upstream; without one, that it is not here", MOVED, (404,))


def _writing(
    summary: str, body: Mapping[str, Schema] | None = None, query: Mapping[str, Schema] = MappingProxyType({})
) -> Operation:
    """Return an operation that changes a repository."""
    return Operation(summary, MOVED, (*_WRITING, 412, 501), query, body or {}, needs=LOGIN)


def _session(summary: str, status: int, *, body: bool = False, **query: Schema) -> Operation:
    """Return an operation on an upload session."""
    errors = (403, 404, 409, 413, 416, 507)
    return Operation(summary, {status: NOTHING}, errors, query, _BODY if body else {}, needs=LOGIN)


_HUGGING_FACE: Mapping[str, Operation] = {
    "GET /api/openapi.json": Operation("This document"),
    "GET /api/agent-harnesses": Operation("List the programs that act for people; there are none"),
    "GET /api/whoami-v2": Operation("Tell whose token it is", needs=LOGIN),
    "GET /api/models": Operation(
        "List adapters, by default the last push first; what cannot be applied is refused",
        query={
            "search": TEXT,
            "author": TEXT,
            "filter": list_of(TEXT),
            "library": TEXT,
            "pipeline_tag": TEXT,
            "num_parameters": {"type": "string", "examples": ["min:1M,max:1B"]},
            "gated": BOOLEAN,
            "sort": {"type": "string", "enum": [*ORDERS]},
            "direction": {"type": "string", "enum": ["-1", "1"]},
            "full": BOOLEAN,
            "cardData": BOOLEAN,
            "expand": list_of(_FIELD),
            **_PAGES,
        },
    ),
    "GET /api/users/{namespace}/overview": Operation("Tell about an account", errors=(404,)),
    "GET /api/organizations/{namespace}/overview": Operation("Tell about a namespace", errors=(404,)),
    "GET /api/users/{namespace}/likes": Operation("List the adapters with a star of an account", query={"cursor": TEXT}),
    "GET /api/models-tags-by-type": Operation("List what adapters can be filtered by"),
    f"GET {_REPO}": reading("Tell about an adapter", _MODEL_QUERY),
    f"GET {_REPO}/revision/{{revision}}": reading("Tell about a revision of an adapter", _MODEL_QUERY),
    f"GET {_REPO}/tree/{{revision}}": reading("List files", _TREE),
    f"GET {_REPO}/tree/{{revision}}/{{path}}": reading("List files of a folder", _TREE),
    f"GET {_REPO}/refs": reading("List branches and tags"),
    f"GET {_REPO}/commits/{{revision}}": reading("List commits", {"p": COUNT, "cursor": TEXT}),
    f"GET {_REPO}/safetensors-metadata/{{path}}": reading("Read the headers of weights"),
    f"GET {_REPO}/auth-check": reading("Tell whether an adapter may be read"),
    "GET /{namespace}/{repo}/resolve/{revision}/{path}": reading("Download a file", answers={**_FILE, 307: NOTHING}),
    "GET /{namespace}/{repo}/raw/{revision}/{path}": reading("Download a file", answers={**_FILE, 307: NOTHING}),
    # git shows the text of an error.
    "GET /{namespace}/{repo}/info/refs": Operation("Tell git what to use instead", {501: _NUMBERS}, query={"service": TEXT}),
    f"GET {_LFS_OBJECT}": Operation("Download a file by an address of the batch API", _FILE, (403, 404), _SIGNED),
    "GET /api/telemetry/{path}": Operation("Count nothing", {204: NOTHING}),
    "GET /api/models/{repo}": _WITHOUT_NAMESPACE,
    "GET /api/models/{repo}/revision/{revision}": _WITHOUT_NAMESPACE,
    "GET /api/models/{repo}/tree/{revision}": _WITHOUT_NAMESPACE,
    "GET /api/models/{repo}/tree/{revision}/{path}": _WITHOUT_NAMESPACE,
    "POST /api/models/{repo}/paths-info/{revision}": _WITHOUT_NAMESPACE,
    "GET /{repo}/resolve/{revision}/{path}": _WITHOUT_NAMESPACE,
    f"POST {_REPO}/paths-info/{{revision}}": Operation(
        "Tell about files",
        MOVED,
        (404, 413),
        body={kind: object_of(paths=list_of(TEXT), expand=BOOLEAN) for kind in (JSON, _FORM)},
    ),
    "POST /api/repos/create": _writing("Create a repository", {JSON: object_of("name", **_NAMED, **_VISIBLE)}),
    "POST /api/repos/move": _writing(
        "Move a repository to another name", {JSON: object_of("fromRepo", "toRepo", fromRepo=TEXT, toRepo=TEXT, type=_MODEL)}
    ),
    "DELETE /api/repos/delete": _writing("Remove a repository", {JSON: object_of("name", **_NAMED)}),
    "POST /api/validate-yaml": Operation(
        "Check the front matter of a card", errors=(413,), body={JSON: object_of(content=TEXT, repoType=_MODEL)}
    ),
    f"POST {_REPO}/branch/{{branch}}": _writing("Create a branch", {JSON: object_of(startingPoint=TEXT)}),
    f"DELETE {_REPO}/branch/{{branch}}": _writing("Remove a branch"),
    f"POST {_REPO}/tag/{{revision}}": _writing("Tag a version", {JSON: object_of("tag", tag=TEXT, message=TEXT)}),
    f"DELETE {_REPO}/tag/{{revision}}": _writing("Remove a tag"),
    f"POST {_REPO}/preupload/{{revision}}": _writing(
        "Ask how files are to be sent", {JSON: object_of("files", files=list_of(_OFFERED))}, _CREATE_PR
    ),
    f"POST {_REPO}/commit/{{revision}}": _writing(
        "Commit, or propose a commit: a JSON document a line", {_LINES: list_of(_LINE)}, _CREATE_PR
    ),
    f"GET {_REPO}/discussions": reading("List proposals", {"type": TEXT, "status": TEXT, "author": TEXT, "p": COUNT}),
    f"GET {_REPO}/discussions/{{number}}": reading("Tell what a proposal changes"),
    f"POST {_REPO}/discussions": _writing(
        "Open an empty proposal", {JSON: object_of("title", title=TEXT, description=TEXT, pullRequest=BOOLEAN)}
    ),
    f"POST {_REPO}/discussions/{{number}}/merge": _writing("Accept a proposal", {JSON: object_of(comment=TEXT)}),
    f"POST {_REPO}/discussions/{{number}}/status": _writing(
        "Close a proposal", {JSON: object_of("status", status=TEXT, comment=TEXT)}
    ),
    f"POST {_REPO}/super-squash/{{branch}}": _writing("Make one commit of those of a branch", {JSON: object_of(message=TEXT)}),
    f"PUT {_REPO}/settings": _writing(
        "Settle who can see a repository, and whether it is gated", {JSON: object_of(**_VISIBLE, gated=_GATED)}
    ),
    f"GET {_REPO}/likers": reading("List the accounts that have given an adapter a star", {"cursor": TEXT}),
    f"POST {_REPO}/like": _writing("Give an adapter a star"),
    f"DELETE {_REPO}/like": _writing("Take the star of the client's account away"),
    f"POST {_REPO}/ask-access": _writing("Accept the terms of a gated repository, and ask for access"),
    "POST /{namespace}/{repo}/ask-access": _writing("Accept the terms of a gated repository, and ask for access"),
    f"GET {_REPO}/user-access-request/{{status}}": Operation(
        "List requests for access", MOVED, (403, 404), {"cursor": COUNT}, needs=LOGIN
    ),
    f"POST {_REPO}/user-access-request/handle": _writing(
        "Accept or reject a request for access, or let it wait again",
        {JSON: object_of("status", user=TEXT, requestId=TEXT, status=_STATUS, rejectionReason=TEXT)},
    ),
    f"POST {_REPO}/user-access-request/grant": _writing(
        "Give an account access that it need not have asked for", {JSON: object_of("user", user=TEXT)}
    ),
    "POST /{namespace}/{repo}.git/info/lfs/objects/batch": Operation(
        "Ask for the addresses of large files",
        {200: _LFS, 307: NOTHING},
        _WRITING,
        body={
            _LFS: object_of(
                "objects",
                operation={"type": "string", "enum": ["upload", "download"]},
                objects=list_of(object_of("oid", "size", oid=_DIGITS, size=COUNT)),
            )
        },
    ),
    f"PUT {_LFS_OBJECT}": Operation("Upload a file by an address of the batch API", {200: NOTHING}, _WRITING, _SIGNED, _BODY),
    f"POST {_LFS_OBJECT}": Operation("Tell whether a file has arrived", errors=(403, 404), query=_SIGNED),
}
_REGISTRY: Mapping[str, Operation] = {
    "GET /v2/": _PING,
    "GET /v2": _PING,
    "GET /v2/token": _TOKEN,
    "POST /v2/token": Operation(_TOKEN.summary, body={_FORM: _CREDENTIALS}),
    "GET /v2/_catalog": Operation("List repositories", query={"n": COUNT, "last": TEXT}),
    f"GET {_OCI}/manifests/{{reference}}": reading("Download a manifest", answers={200: "*/*"}),
    f"PUT {_OCI}/manifests/{{reference}}": Operation(
        "Upload a manifest; one with the files of an adapter becomes a version",
        {201: NOTHING},
        (*_WRITING, 405),
        {"tag": list_of(TEXT)},
        {kind: object_of() for kind in (MANIFEST_TYPE, INDEX_TYPE)},
        needs=LOGIN,
    ),
    f"DELETE {_OCI}/manifests/{{reference}}": Operation(
        "Remove a tag, or a manifest that is no version", {202: NOTHING}, (403, 404, 405, 409, 507), needs=LOGIN
    ),
    f"POST {_OCI}/blobs/uploads/": _BEGIN,
    f"POST {_OCI}/blobs/uploads": _BEGIN,
    f"GET {_OCI}/blobs/uploads/{{session}}": _session("Tell how much of an upload has arrived", 204),
    f"PATCH {_OCI}/blobs/uploads/{{session}}": _session("Go on with an upload", 202, body=True),
    f"PUT {_OCI}/blobs/uploads/{{session}}": _session("End an upload", 201, body=True, digest=DIGEST),
    f"DELETE {_OCI}/blobs/uploads/{{session}}": _session("Cancel an upload", 204),
    f"GET {_OCI}/blobs/{{digest}}": reading("Download a blob", answers=_FILE),
    f"DELETE {_OCI}/blobs/{{digest}}": Operation(
        "Answer that blobs go with the last manifest that names them", {}, (403, 404, 405), needs=LOGIN
    ),
    f"GET {_OCI}/tags/list": reading("List tags and versions", {"n": COUNT, "last": TEXT}, answers={200: JSON}),
    f"GET {_OCI}/referrers/{{digest}}": reading(
        "List what is attached to a manifest", {"artifactType": TEXT}, answers={200: INDEX_TYPE}
    ),
}
_XET: Mapping[str, Operation] = {
    f"GET {_REPO}/xet-write-token/{{revision}}": Operation(
        "Ask where to send files of a repository by Xet", MOVED, (403, 404), needs=LOGIN
    ),
    f"POST {_CAS}/xorbs/default/{{hash}}": Operation("Upload a xorb", errors=(404, 413, 507), body=_BODY, needs=_CAS_TOKEN),
    f"POST {_CAS}/shards": Operation("Upload a shard", errors=(404, 413, 507), body=_BODY, needs=_CAS_TOKEN),
    f"POST {_CAS}/telemetry": Operation("Count nothing"),
    "POST /v1/telemetry": Operation("Count nothing"),
}
_EXCHANGE = object_of("grant_type", grant_type=TEXT, subject_token=TEXT, subject_token_type=TEXT, resource=TEXT)
_OAUTH: Mapping[str, Operation] = {
    "POST /oauth/device": Operation("Begin the login of a device", errors=(413,), body={_FORM: object_of(client_id=TEXT)}),
    "POST /oauth/token": Operation(
        "Ask for the token of a login, renew it, or exchange the ID token of a CI job",
        errors=(413,),
        body={_FORM: object_of("grant_type", grant_type=TEXT, device_code=TEXT, refresh_token=TEXT), JSON: _EXCHANGE},
    ),
}
_OPERATIONS: Mapping[str, Operation] = {
    "GET /health": Operation("Tell whether the process answers"),
    "GET /ready": Operation("Tell whether the hub can do its work"),
    "GET /metrics": Operation("Numbers for Prometheus", {200: _NUMBERS}),
}
# By protocol: its tag, the schema of its errors, and its operations.
_PROTOCOLS: tuple[tuple[str, str, Mapping[str, Operation]], ...] = (
    ("adapterhub", "ApiError", openapi_versions.OPERATIONS),
    ("Hugging Face Hub", "Error", _HUGGING_FACE),
    ("OCI registry", "OciErrors", _REGISTRY),
    ("Xet", "Error", _XET),
    ("OAuth", "Error", _OAUTH),
    ("Operation", "Error", _OPERATIONS),
)
_COMMON_ERRORS = (400, 401, 429, 503)  # error statuses of any request
# A page, and catch-all routes that answer "not found".
_UNDOCUMENTED = ("/device", "/v2/{path:path}", "/api/{path:path}", "/xet/{path:path}")
_OF_OTHERS = ("/datasets/", "/spaces/", "/buckets/", "/kernels/", "/papers/", "/uploads")  # only refused
_SCHEMAS: Mapping[str, Schema] = {
    "Error": object_of(error=TEXT),
    "ApiError": object_of(error=TEXT, kind=TEXT, code=TEXT, where=TEXT, what=TEXT, hint=TEXT, fields=object_of()),
    "OciErrors": object_of(errors=list_of(object_of("code", "message", code=TEXT, message=TEXT))),
}
_SCHEMES: Mapping[str, Schema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A token of this hub"},
    "basic": {"type": "http", "scheme": "basic", "description": "Any user name, with a token as the password"},
    "xet": {"type": "http", "scheme": "bearer", "description": "The token of xet-write-token"},
}


@cache
def paths() -> dict[str, dict[str, Any]]:
    """Return the operations by path and method, with a HEAD for every GET."""
    paths_by_method: dict[str, dict[str, Any]] = {}
    for tag, error, operations in _PROTOCOLS:
        for key, operation in operations.items():
            method, path = key.split(" ")
            description = _operation_object(operation, path, tag, error)
            paths_by_method.setdefault(path, {})[method.lower()] = description
            if method == "GET":
                headers = {
                    status: {"description": answer["description"]} for status, answer in description["responses"].items()
                }
                paths_by_method[path]["head"] = {
                    **description,
                    "summary": f"{operation.summary}: the headers alone",
                    "responses": headers,
                }
    return paths_by_method


def route_operations(route: BaseRoute) -> Iterator[tuple[str, str]]:
    """Yield the paths and methods of this document that a route answers; nothing for undocumented routes."""
    if isinstance(route, Route) and route.path not in _UNDOCUMENTED and not route.path.startswith(_OF_OTHERS):
        path = route.path.replace("{name:path}", "{namespace}/{repo}").replace(":path}", "}")
        yield from ((path, method.lower()) for method in route.methods or ())


def _operation_object(operation: Operation, path: str, tag: str, error: str) -> dict[str, Any]:
    names = [part.partition("}")[0] for part in path.split("{")[1:]]
    parameters = [{"name": name, "in": "path", "required": True, "schema": _PATH_PARAMETERS[name]} for name in names]
    parameters += [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    error_answer = {"description": "Refused", "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{error}"}}}}
    answers = {str(status): _answer(kind) for status, kind in operation.answers.items()}
    withdrawn = {410} if {"revision", "reference"}.intersection(names) else set()
    statuses = {*_COMMON_ERRORS, *operation.errors, *withdrawn}
    description: dict[str, Any] = {
        "tags": [tag],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {**answers, **{str(status): error_answer for status in sorted(statuses)}},
    }
    if operation.needs:
        description["security"] = [{scheme: []} for scheme in operation.needs]
    if operation.body:
        description["requestBody"] = {"content": {kind: {"schema": schema} for kind, schema in operation.body.items()}}
    return description


def _answer(kind: str) -> dict[str, Any]:
    return {"description": "Answered", **({"content": {kind: {}}} if kind else {})}


async def page(request: Request) -> Response:
    """GET /api/openapi.json."""
    hub: Hub = request.app.state.hub
    return JSONResponse(document(hub.url(request)))


def document(url: str) -> dict[str, Any]:
    """Return the document of a hub at a URL."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "adapterhub", "version": __version__},
        "servers": [{"url": url}],
        "security": [{}, *({scheme: []} for scheme in LOGIN)],
        "tags": [{"name": name} for name, _, _ in _PROTOCOLS],
        "paths": paths(),
        "components": {"schemas": _SCHEMAS, "securitySchemes": _SCHEMES},
    }


def routes() -> list[BaseRoute]:
    """Return the routes of this module."""
    return [Route("/api/openapi.json", page)]
