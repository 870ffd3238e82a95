"""GET /api/openapi.json: the API of a hub as an OpenAPI document, without the pages for people.

Names of adapters are two path segments, a namespace and a repository. Slashes within another parameter, such as the path of a
file, may be sent as they are or as %2F.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.remotes.layouts.layout_index import INDEX_TYPE
from adapterhub.version import __version__
from adapterhub_converters.lazy_dataclass import dataclass

from .hf.api_documents import EXPANDABLE
from .hub import Hub

_Schema = Mapping[str, Any]
_JSON, _FORM, _LFS = "application/json", "application/x-www-form-urlencoded", "application/vnd.git-lfs+json"
_BYTES, _LINES, _NUMBERS = "application/octet-stream", "application/x-ndjson", "text/plain"
_NOTHING = ""  # the media type of a response without a body
_LOGIN, _CAS_TOKEN = ("bearer", "basic"), ("xet",)


@dataclass(frozen=True)
class Operation:
    """A method of a path, as the document describes it.

    Attributes:
        summary: What it does.
        answers: The media type of each successful status.
        errors: The error statuses besides those every operation of the protocol has.
        query: Parameters in the query string.
        body: What may be sent, by media type.
        needs: The security schemes of which one is always required.
    """

    summary: str
    answers: Mapping[int, str] = field(default_factory=lambda: {200: _JSON})
    errors: tuple[int, ...] = ()
    query: Mapping[str, _Schema] = field(default_factory=dict)
    body: Mapping[str, _Schema] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def _object(*required: str, **properties: _Schema) -> _Schema:
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}


def _list(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


_TEXT: _Schema = {"type": "string"}
_NONEMPTY: _Schema = {"type": "string", "minLength": 1}
_BOOLEAN: _Schema = {"type": "boolean"}
_COUNT: _Schema = {"type": "integer", "minimum": 0}
_DIGITS: _Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_RAW: _Schema = {"type": "string", "format": "binary"}
_BODY: Mapping[str, _Schema] = {_BYTES: _RAW}
_DIGEST: _Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$"}
_MODEL: _Schema = {"type": "string", "enum": ["model"]}
_NAME: _Schema = {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]*$", "maxLength": 100}
_PATH_PARAMETERS: Mapping[str, _Schema] = {
    "namespace": {**_NAME, "examples": ["team"]},
    "repo": {**_NAME, "examples": ["sql"]},
    "revision": {**_NONEMPTY, "description": "A branch, a tag, v3, or an id.", "examples": ["main"]},
    "branch": _NONEMPTY,
    "path": {**_NONEMPTY, "examples": ["adapter_config.json"]},
    "oid": {**_DIGITS, "description": "The sha256 of a file."},
    "hash": {**_DIGITS, "description": "The hash of a xorb."},
    "epoch": _NONEMPTY,
    "digest": _DIGEST,
    "reference": {**_NONEMPTY, "description": "A tag, v3, or a digest.", "examples": ["latest"]},
    "session": _NONEMPTY,
    "tag": {**_NONEMPTY, "examples": ["prod"]},
}
_TREE: Mapping[str, _Schema] = {"recursive": _BOOLEAN, "expand": _BOOLEAN, "cursor": _TEXT}
_PAGES: Mapping[str, _Schema] = {"limit": _COUNT, "cursor": _TEXT}
_FIELD: _Schema = {"type": "string", "enum": [*EXPANDABLE]}
_MODEL_QUERY: Mapping[str, _Schema] = {"blobs": _BOOLEAN, "expand": _list(_FIELD)}
_SIGNED: Mapping[str, _Schema] = {"size": _COUNT, "expires": _COUNT, "signature": _TEXT}
_NAMED: Mapping[str, _Schema] = {"type": _MODEL, "name": _TEXT, "organization": _TEXT}
_VISIBLE: Mapping[str, _Schema] = {"private": _BOOLEAN, "visibility": {"type": "string", "enum": ["public", "private"]}}

_REPO = "/api/models/{namespace}/{repo}"
_OCI = "/v2/{namespace}/{repo}"
_CAS = "/xet/{epoch}/{namespace}/{repo}/v1"
_LFS_OBJECT = "/lfs/{namespace}/{repo}/{oid}"
_FILE = {200: _BYTES, 206: _BYTES, 302: _BYTES, 416: _BYTES}
_MOVED = {200: _JSON, 307: _NOTHING}
_WRITING = (403, 404, 409, 413, 507)
_OFFERED = _object("path", path=_TEXT, size=_COUNT, sample=_TEXT)
_KINDS: _Schema = {"type": "string", "enum": ["header", "file", "lfsFile", "deletedFile", "deletedFolder"]}
_ENCODED: _Schema = {"type": "string", "enum": ["base64"]}
_CHANGE = _object(summary=_TEXT, path=_TEXT, content=_TEXT, encoding=_ENCODED, oid=_DIGITS, size=_COUNT)
_LINE = _object("key", "value", key=_KINDS, value=_CHANGE)
_PING = Operation("Tell whether this is an OCI registry, and how to log in")
_CREDENTIALS = _object(grant_type=_TEXT, username=_TEXT, password=_TEXT, refresh_token=_TEXT, service=_TEXT, scope=_TEXT)
_TOKEN = Operation("Exchange a password, which is a token, for a token")
_BEGIN = Operation(
    "Begin the upload of a blob, mount one, or send it whole",
    {201: _NOTHING, 202: _NOTHING},
    (403, 404, 413, 507),
    {"digest": _DIGEST, "mount": _DIGEST, "from": _TEXT},
    _BODY,
    needs=_LOGIN,
)


def _reading(summary: str, query: Mapping[str, _Schema] | None = None, *, answers: Mapping[int, str] = _MOVED) -> Operation:
    """Return an operation that reads a repository, for clients that may see it."""
    return Operation(summary, answers, (404,), query or {})


_WITHOUT_NAMESPACE = Operation("Answer for a model of the upstream; without one, that it is not here", _MOVED, (404,))


def _writing(summary: str, body: Mapping[str, _Schema] | None = None) -> Operation:
    """Return an operation that changes a repository."""
    return Operation(summary, _MOVED, (*_WRITING, 412, 501), {}, body or {}, needs=_LOGIN)


def _session(summary: str, status: int, *, body: bool = False, **query: _Schema) -> Operation:
    """Return an operation on an upload session."""
    errors = (403, 404, 409, 413, 416, 507)
    return Operation(summary, {status: _NOTHING}, errors, query, _BODY if body else {}, needs=_LOGIN)


_HUGGING_FACE: Mapping[str, Operation] = {
    "GET /api/openapi.json": Operation("This document"),
    "GET /api/agent-harnesses": Operation("List the programs that act for people; there are none"),
    "GET /api/whoami-v2": Operation("Tell whose token it is", needs=_LOGIN),
    "GET /api/models": Operation(
        "List adapters, the last push first; what cannot be applied is refused",
        query={
            "search": _TEXT,
            "author": _TEXT,
            "filter": _list(_TEXT),
            "library": _TEXT,
            "pipeline_tag": _TEXT,
            "num_parameters": {"type": "string", "examples": ["min:1M,max:1B"]},
            "gated": _BOOLEAN,
            "sort": {"type": "string", "enum": ["lastModified"]},
            "direction": {"type": "string", "enum": ["-1", "1"]},
            "full": _BOOLEAN,
            "cardData": _BOOLEAN,
            "expand": _list(_FIELD),
            **_PAGES,
        },
    ),
    "GET /api/users/{namespace}/overview": Operation("Tell about an account", errors=(404,)),
    "GET /api/organizations/{namespace}/overview": Operation("Tell about a namespace", errors=(404,)),
    "GET /api/models-tags-by-type": Operation("List what adapters can be filtered by"),
    f"GET {_REPO}": _reading("Tell about an adapter", _MODEL_QUERY),
    f"GET {_REPO}/revision/{{revision}}": _reading("Tell about a revision of an adapter", _MODEL_QUERY),
    f"GET {_REPO}/tree/{{revision}}": _reading("List files", _TREE),
    f"GET {_REPO}/tree/{{revision}}/{{path}}": _reading("List files of a folder", _TREE),
    f"GET {_REPO}/refs": _reading("List branches and tags"),
    f"GET {_REPO}/commits/{{revision}}": _reading("List commits", {"p": _COUNT, "cursor": _TEXT}),
    f"GET {_REPO}/safetensors-metadata/{{path}}": _reading("Read the headers of weights"),
    f"GET {_REPO}/auth-check": _reading("Tell whether an adapter may be read"),
    "GET /{namespace}/{repo}/resolve/{revision}/{path}": _reading("Download a file", answers={**_FILE, 307: _NOTHING}),
    "GET /{namespace}/{repo}/raw/{revision}/{path}": _reading("Download a file", answers={**_FILE, 307: _NOTHING}),
    # git shows the text of an error.
    "GET /{namespace}/{repo}/info/refs": Operation("Tell git what to use instead", {501: _NUMBERS}, query={"service": _TEXT}),
    f"GET {_LFS_OBJECT}": Operation("Download a file by an address of the batch API", _FILE, (403, 404), _SIGNED),
    "GET /api/telemetry/{path}": Operation("Count nothing", {204: _NOTHING}),
    "GET /api/models/{repo}": _WITHOUT_NAMESPACE,
    "GET /api/models/{repo}/revision/{revision}": _WITHOUT_NAMESPACE,
    "GET /api/models/{repo}/tree/{revision}": _WITHOUT_NAMESPACE,
    "GET /api/models/{repo}/tree/{revision}/{path}": _WITHOUT_NAMESPACE,
    "POST /api/models/{repo}/paths-info/{revision}": _WITHOUT_NAMESPACE,
    "GET /{repo}/resolve/{revision}/{path}": _WITHOUT_NAMESPACE,
    f"POST {_REPO}/paths-info/{{revision}}": Operation(
        "Tell about files",
        _MOVED,
        (404, 413),
        body={kind: _object(paths=_list(_TEXT), expand=_BOOLEAN) for kind in (_JSON, _FORM)},
    ),
    "POST /api/repos/create": _writing("Create a repository", {_JSON: _object("name", **_NAMED, **_VISIBLE)}),
    "POST /api/repos/move": _writing(
        "Move a repository to another name", {_JSON: _object("fromRepo", "toRepo", fromRepo=_TEXT, toRepo=_TEXT, type=_MODEL)}
    ),
    "DELETE /api/repos/delete": _writing("Remove a repository", {_JSON: _object("name", **_NAMED)}),
    "POST /api/validate-yaml": Operation(
        "Check the front matter of a card", errors=(413,), body={_JSON: _object(content=_TEXT, repoType=_MODEL)}
    ),
    f"POST {_REPO}/branch/{{branch}}": _writing("Create a branch", {_JSON: _object(startingPoint=_TEXT)}),
    f"DELETE {_REPO}/branch/{{branch}}": _writing("Remove a branch"),
    f"POST {_REPO}/tag/{{revision}}": _writing("Tag a version", {_JSON: _object("tag", tag=_TEXT, message=_TEXT)}),
    f"DELETE {_REPO}/tag/{{revision}}": _writing("Remove a tag"),
    f"POST {_REPO}/preupload/{{revision}}": _writing(
        "Ask how files are to be sent", {_JSON: _object("files", files=_list(_OFFERED))}
    ),
    f"POST {_REPO}/commit/{{revision}}": _writing("Commit: a JSON document a line", {_LINES: _list(_LINE)}),
    f"POST {_REPO}/super-squash/{{branch}}": _writing("Make one commit of those of a branch", {_JSON: _object(message=_TEXT)}),
    f"PUT {_REPO}/settings": _writing("Settle who can see a repository", {_JSON: _object(**_VISIBLE)}),
    "POST /{namespace}/{repo}.git/info/lfs/objects/batch": Operation(
        "Ask for the addresses of large files",
        {200: _LFS, 307: _NOTHING},
        _WRITING,
        body={
            _LFS: _object(
                "objects",
                operation={"type": "string", "enum": ["upload", "download"]},
                objects=_list(_object("oid", "size", oid=_DIGITS, size=_COUNT)),
            )
        },
    ),
    f"PUT {_LFS_OBJECT}": Operation("Upload a file by an address of the batch API", {200: _NOTHING}, _WRITING, _SIGNED, _BODY),
    f"POST {_LFS_OBJECT}": Operation("Tell whether a file has arrived", errors=(403, 404), query=_SIGNED),
}
_REGISTRY: Mapping[str, Operation] = {
    "GET /v2/": _PING,
    "GET /v2": _PING,
    "GET /v2/token": _TOKEN,
    "POST /v2/token": Operation(_TOKEN.summary, body={_FORM: _CREDENTIALS}),
    "GET /v2/_catalog": Operation("List repositories", query={"n": _COUNT, "last": _TEXT}),
    f"GET {_OCI}/manifests/{{reference}}": _reading("Download a manifest", answers={200: "*/*"}),
    f"PUT {_OCI}/manifests/{{reference}}": Operation(
        "Upload a manifest; one with the files of an adapter becomes a version",
        {201: _NOTHING},
        (*_WRITING, 405),
        {"tag": _list(_TEXT)},
        {kind: _object() for kind in (MANIFEST_TYPE, INDEX_TYPE)},
        needs=_LOGIN,
    ),
    f"DELETE {_OCI}/manifests/{{reference}}": Operation(
        "Remove a tag, or a manifest that is no version", {202: _NOTHING}, (403, 404, 405, 409, 507), needs=_LOGIN
    ),
    f"POST {_OCI}/blobs/uploads/": _BEGIN,
    f"POST {_OCI}/blobs/uploads": _BEGIN,
    f"GET {_OCI}/blobs/uploads/{{session}}": _session("Tell how much of an upload has arrived", 204),
    f"PATCH {_OCI}/blobs/uploads/{{session}}": _session("Go on with an upload", 202, body=True),
    f"PUT {_OCI}/blobs/uploads/{{session}}": _session("End an upload", 201, body=True, digest=_DIGEST),
    f"DELETE {_OCI}/blobs/uploads/{{session}}": _session("Cancel an upload", 204),
    f"GET {_OCI}/blobs/{{digest}}": _reading("Download a blob", answers=_FILE),
    f"DELETE {_OCI}/blobs/{{digest}}": Operation(
        "Answer that blobs go with the last manifest that names them", {}, (403, 404, 405), needs=_LOGIN
    ),
    f"GET {_OCI}/tags/list": _reading("List tags and versions", {"n": _COUNT, "last": _TEXT}, answers={200: _JSON}),
    f"GET {_OCI}/referrers/{{digest}}": _reading(
        "List what is attached to a manifest", {"artifactType": _TEXT}, answers={200: INDEX_TYPE}
    ),
}
_XET: Mapping[str, Operation] = {
    f"GET {_REPO}/xet-write-token/{{revision}}": Operation(
        "Ask where to send files of a repository by Xet", _MOVED, (403, 404), needs=_LOGIN
    ),
    f"POST {_CAS}/xorbs/default/{{hash}}": Operation("Upload a xorb", errors=(404, 413, 507), body=_BODY, needs=_CAS_TOKEN),
    f"POST {_CAS}/shards": Operation("Upload a shard", errors=(404, 413, 507), body=_BODY, needs=_CAS_TOKEN),
    f"POST {_CAS}/telemetry": Operation("Count nothing"),
    "POST /v1/telemetry": Operation("Count nothing"),
}
_EXCHANGE = _object("grant_type", grant_type=_TEXT, subject_token=_TEXT, subject_token_type=_TEXT, resource=_TEXT)
_NAMES = "/api/adapterhub/v1/names/{namespace}/{repo}"
_VERSION, _TAG = f"{_NAMES}/versions/{{reference}}", f"{_NAMES}/tags/{{tag}}"
_WANTED = _object(digest=_TEXT, version=_TEXT, files=_list(_DIGEST), tensors=_list(_list({"type": ["string", "integer"]})))
_REASON = {_JSON: _object(message={"type": "string", "maxLength": 1000})}
_MESSAGE: _Schema = {"type": "string", "maxLength": 1000}
_PROMOTION = {_JSON: _object("reference", reference=_TEXT, message=_MESSAGE)}
_APPROVAL = {_JSON: _object("tag", "message", tag=_TEXT, message=_MESSAGE, bundle=_TEXT)}
_WITHDRAWAL = {_JSON: _object("message", message=_MESSAGE, everywhere=_BOOLEAN, bundle=_TEXT, key=_TEXT)}
_PUBLISHED = _object("manifest", manifest=_TEXT, tags=_list(_TEXT), message=_TEXT, metrics=_object())


def _changing(summary: str, body: Mapping[str, _Schema] | None = None, **query: _Schema) -> Operation:
    """Return an operation that changes a name: with `If-Match` or `If-None-Match` only if a tag is where these say."""
    return Operation(summary, errors=(403, 404, 409, 412, 413, 507), query=query, body=body or {}, needs=_LOGIN)


_ADAPTERHUB: Mapping[str, Operation] = {
    "GET /api/adapterhub": Operation("Tell that this is an adapterhub, and which versions of this API it has"),
    "GET /api/adapterhub/v1/versions": Operation(
        "List versions, by name, newest first", query={"prefix": _TEXT, "digest": _TEXT, "cursor": _TEXT}
    ),
    "GET /api/adapterhub/v1/search": Operation(
        "Search versions by words and by the fields of their manifests, the best match first",
        query={
            "words": _TEXT,
            "namespace": _TEXT,
            **dict.fromkeys(("base", "method", "license", "target", "language", "tag"), _list(_TEXT)),
            **dict.fromkeys(("rank", "size", "metric"), _list(_TEXT)),
            "all_versions": _BOOLEAN,
            "facets": _BOOLEAN,
            "limit": _COUNT,
        },
    ),
    "POST /api/adapterhub/v1/find": Operation(
        "Find the versions that contain a digest, a file, a folder or its tensors",
        errors=(413,),
        body={_JSON: _WANTED},
        needs=_LOGIN,
    ),
    "GET /api/adapterhub/v1/usage": Operation("Tell the disk usage of versions", query={"prefix": _TEXT}, needs=_LOGIN),
    f"DELETE {_NAMES}": _changing("Remove a name with its versions", force=_BOOLEAN),
    f"POST {_NAMES}/restore": _changing("Restore a name that was removed"),
    f"GET {_NAMES}/log": _reading("List the moves of a name's tags, newest first", {"reference": _TEXT, "cursor": _COUNT}),
    f"PUT {_NAMES}/deprecation": _changing("Deprecate all versions of a name", _REASON),
    f"DELETE {_NAMES}/deprecation": _changing("Withdraw the deprecation of a name"),
    f"POST {_NAMES}/versions": Operation(
        "Make a version of a manifest whose blobs were uploaded as to an OCI registry, and move tags to it",
        {200: _JSON, 201: _JSON},
        (403, 404, 409, 412, 413, 507),
        body={_JSON: _PUBLISHED},
        needs=_LOGIN,
    ),
    f"GET {_VERSION}": _reading("Tell everything about a version"),
    f"GET {_VERSION}/lineage": _reading("Tell what a version was made from, and what was made from it"),
    f"PUT {_VERSION}/deprecation": _changing("Deprecate a version", _REASON),
    f"DELETE {_VERSION}/deprecation": _changing("Withdraw the deprecation of a version"),
    f"POST {_VERSION}/approvals": _changing("Approve a version for a tag, as the account that is logged in", _APPROVAL),
    f"PUT {_VERSION}/withdrawal": _changing("Withdraw a version; a signed one as its signer or an admin", _WITHDRAWAL),
    f"DELETE {_VERSION}/withdrawal": _changing("Let a withdrawn version be used again"),
    f"GET {_TAG}/promotion": _reading("Tell which requirements of a tag a version meets", {"reference": _TEXT}),
    f"POST {_TAG}/promotion": _changing("Point a tag at a version that meets its requirements", _PROMOTION),
    f"POST {_TAG}/rollback": _changing("Point a tag at the version it had before", _REASON),
    f"GET {_TAG}": _reading("Tell which version a tag is at; its digest is the ETag"),
    f"PUT {_TAG}": _changing("Point a tag at a version", {_JSON: _object("reference", reference=_TEXT)}),
    f"DELETE {_TAG}": _changing("Remove a tag"),
    f"POST {_TAG}/restore": _changing("Point a tag where it pointed before", {_JSON: _object(seq=_COUNT)}),
    f"PUT {_TAG}/protection": _changing("Forbid moving or removing a tag"),
    f"DELETE {_TAG}/protection": _changing("Allow moving and removing a tag"),
}
_OAUTH: Mapping[str, Operation] = {
    "POST /oauth/device": Operation("Begin the login of a device", errors=(413,), body={_FORM: _object(client_id=_TEXT)}),
    "POST /oauth/token": Operation(
        "Ask for the token of a login, renew it, or exchange the ID token of a CI job",
        errors=(413,),
        body={_FORM: _object("grant_type", grant_type=_TEXT, device_code=_TEXT, refresh_token=_TEXT), _JSON: _EXCHANGE},
    ),
}
_OPERATIONS: Mapping[str, Operation] = {
    "GET /health": Operation("Tell whether the process answers"),
    "GET /ready": Operation("Tell whether the hub can do its work"),
    "GET /metrics": Operation("Numbers for Prometheus", {200: _NUMBERS}),
}
# By protocol: its tag, the schema of its errors, and its operations.
_PROTOCOLS: tuple[tuple[str, str, Mapping[str, Operation]], ...] = (
    ("adapterhub", "ApiError", _ADAPTERHUB),
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
_SCHEMAS: Mapping[str, _Schema] = {
    "Error": _object(error=_TEXT),
    "ApiError": _object(error=_TEXT, kind=_TEXT, code=_TEXT, where=_TEXT, what=_TEXT, hint=_TEXT, fields=_object()),
    "OciErrors": _object(errors=_list(_object("code", "message", code=_TEXT, message=_TEXT))),
}
_SCHEMES: Mapping[str, _Schema] = {
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
    error_answer = {"description": "Refused", "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{error}"}}}}
    answers = {str(status): _answer(kind) for status, kind in operation.answers.items()}
    description: dict[str, Any] = {
        "tags": [tag],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": {**answers, **{str(status): error_answer for status in sorted({*_COMMON_ERRORS, *operation.errors})}},
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
        "security": [{}, *({scheme: []} for scheme in _LOGIN)],
        "tags": [{"name": name} for name, _, _ in _PROTOCOLS],
        "paths": paths(),
        "components": {"schemas": _SCHEMAS, "securitySchemes": _SCHEMES},
    }


def routes() -> list[BaseRoute]:
    """Return the routes of this module."""
    return [Route("/api/openapi.json", page)]
