"""The operations of the hub's API about versions and names, as the OpenAPI document describes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from . import openapi_accounts
from .gates import MODES
from .openapi_schemas import (
    BOOLEAN,
    COUNT,
    DIGEST,
    JSON,
    LOGIN,
    TEXT,
    Operation,
    Schema,
    list_of,
    object_of,
    reading,
)

_MODE: Schema = {"type": "string", "enum": [*MODES]}
_NAMES = "/api/adapterhub/v1/names/{namespace}/{repo}"
_VERSION, _TAG = f"{_NAMES}/versions/{{reference}}", f"{_NAMES}/tags/{{tag}}"
_PROPOSAL = f"{_NAMES}/proposals/{{ident}}"
_WANTED = object_of(digest=TEXT, version=TEXT, files=list_of(DIGEST), tensors=list_of(list_of({"type": ["string", "integer"]})))
_MESSAGE: Schema = {"type": "string", "maxLength": 1000}
_REASON = {JSON: object_of(message=_MESSAGE)}
_PROMOTION = {JSON: object_of("reference", reference=TEXT, message=_MESSAGE)}
_EVALUATION = {
    JSON: object_of(
        "name",
        "metrics",
        "data",
        "base",
        name=TEXT,
        metrics=object_of(),
        data=list_of(object_of()),
        base=object_of(),
        cases=object_of(),
    )
}
_APPROVAL = {JSON: object_of("tag", "message", tag=TEXT, message=_MESSAGE, bundle=TEXT)}
_WITHDRAWAL = {JSON: object_of("message", message=_MESSAGE, everywhere=BOOLEAN, bundle=TEXT, key=TEXT)}
_PUBLISHED = object_of(manifest=TEXT, tags=list_of(TEXT), message=TEXT, metrics=object_of())


def _changing(summary: str, body: Mapping[str, Schema] | None = None, **query: Schema) -> Operation:
    """Return an operation that changes a name: with `If-Match` or `If-None-Match` only if a tag is where these say."""
    query = {"dry_run": {**BOOLEAN, "description": "Change nothing, and answer as if it were changed."}, **query}
    return replace(_deciding(summary, body), query=query)


def _deciding(summary: str, body: Mapping[str, Schema] | None = None) -> Operation:
    """Return an operation that changes what people may do with a name, which cannot be rehearsed."""
    return Operation(summary, errors=(403, 404, 409, 412, 413, 507), body=body or {}, needs=LOGIN)


OPERATIONS: Mapping[str, Operation] = {
    "GET /api/adapterhub": Operation("Tell that this is an adapterhub, and which versions of this API it has"),
    "GET /api/adapterhub/v1/versions": Operation(
        "List versions, by name, newest first", query={"prefix": TEXT, "digest": TEXT, "cursor": TEXT}
    ),
    "GET /api/adapterhub/v1/search": Operation(
        "Search versions by words and by the fields of their manifests, the best match first",
        query={
            "words": TEXT,
            "namespace": TEXT,
            **dict.fromkeys(("base", "method", "license", "target", "language", "tag"), list_of(TEXT)),
            **dict.fromkeys(("rank", "size", "metric"), list_of(TEXT)),
            "all_versions": BOOLEAN,
            "facets": BOOLEAN,
            "limit": COUNT,
        },
    ),
    "POST /api/adapterhub/v1/find": Operation(
        "Find the versions that contain a digest, a file, a folder or its tensors",
        errors=(413,),
        body={JSON: _WANTED},
        needs=LOGIN,
    ),
    "GET /api/adapterhub/v1/usage": Operation("Tell the disk usage of versions", query={"prefix": TEXT}, needs=LOGIN),
    f"DELETE {_NAMES}": _changing("Remove a name with its versions", force=BOOLEAN),
    f"POST {_NAMES}/restore": _changing("Restore a name that was removed"),
    f"POST {_NAMES}/move": _changing("Rename a name; the old one leads to the new one", {JSON: object_of("to", to=TEXT)}),
    f"GET {_NAMES}/log": reading("List the moves of a name's tags, newest first", {"reference": TEXT, "cursor": COUNT}),
    f"GET {_NAMES}/downloads": reading("Tell how often each version was downloaded, by day and protocol"),
    f"GET {_NAMES}/gate": reading("Tell whether a name is gated, its terms, and whether the client may read its files"),
    f"PUT {_NAMES}/gate": _deciding("Gate a name", {JSON: object_of("mode", mode=_MODE, terms=TEXT)}),
    f"DELETE {_NAMES}/gate": _deciding("Remove the gate of a name"),
    f"PUT {_NAMES}/deprecation": _changing("Deprecate all versions of a name", _REASON),
    f"DELETE {_NAMES}/deprecation": _changing("Withdraw the deprecation of a name"),
    f"GET {_NAMES}/retention": reading(
        "Tell how many of the newest versions of a name a gc keeps, and how long others; null for all"
    ),
    f"PUT {_NAMES}/retention": _changing(
        "Set a gc to drop the versions of a name but the newest, those younger than `ttl` seconds, and those with tags",
        {JSON: object_of(keep=COUNT, ttl=COUNT)},
    ),
    f"DELETE {_NAMES}/retention": _changing("Keep all versions of a name"),
    f"POST {_NAMES}/versions": replace(
        _changing(
            "Make a version of a manifest whose blobs were uploaded as to an OCI registry, and move tags to it;"
            " a rehearsal needs no blobs, and no manifest of a new version",
            {JSON: _PUBLISHED},
        ),
        answers={200: JSON, 201: JSON},
    ),
    f"GET {_VERSION}": reading("Tell everything about a version"),
    f"GET {_VERSION}/lineage": reading("Tell what a version was made from, and what was made from it"),
    f"PUT {_VERSION}/deprecation": _changing("Deprecate a version", _REASON),
    f"DELETE {_VERSION}/deprecation": _changing("Withdraw the deprecation of a version"),
    f"POST {_VERSION}/evaluations": _changing("Record an evaluation of a version", _EVALUATION),
    f"POST {_VERSION}/approvals": _changing("Approve a version for a tag, as the account that is logged in", _APPROVAL),
    f"PUT {_VERSION}/withdrawal": _changing("Withdraw a version; a signed one as its signer or an admin", _WITHDRAWAL),
    f"DELETE {_VERSION}/withdrawal": _changing("Let a withdrawn version be used again"),
    f"GET {_TAG}/promotion": reading("Tell which requirements of a tag a version meets", {"reference": TEXT}),
    f"POST {_TAG}/promotion": _changing("Point a tag at a version that meets its requirements", _PROMOTION),
    f"POST {_TAG}/rollback": _changing("Point a tag at the version it had before", _REASON),
    f"GET {_NAMES}/proposals": reading("List proposals, the newest first", {"state": TEXT}),
    f"GET {_PROPOSAL}": reading("Tell what a proposal changes, and what stands in its way"),
    f"DELETE {_PROPOSAL}": _deciding("Withdraw a proposal, as its author or a writer of the name"),
    f"POST {_PROPOSAL}/acceptance": _deciding(
        "Make a proposal the next version, if it is still that commit", {JSON: object_of(commit=TEXT, reason=_MESSAGE)}
    ),
    f"POST {_PROPOSAL}/refusal": _deciding("Refuse a proposal", {JSON: object_of("reason", reason=_MESSAGE)}),
    f"GET {_TAG}": reading("Tell which version a tag is at; its digest is the ETag"),
    f"PUT {_TAG}": _changing("Point a tag at a version", {JSON: object_of("reference", reference=TEXT)}),
    f"DELETE {_TAG}": _changing("Remove a tag"),
    f"POST {_TAG}/restore": _changing("Point a tag where it pointed before", {JSON: object_of(seq=COUNT)}),
    f"PUT {_TAG}/protection": _changing("Forbid moving or removing a tag"),
    f"DELETE {_TAG}/protection": _changing("Allow moving and removing a tag"),
    **openapi_accounts.OPERATIONS,
}
