"""Large files through git-lfs' batch API (git-lfs, `docs/api/batch.md`), for clients that upload without Xet.

Clients send no authorization header with the file itself, so its signed address says everything: upload or download, which
bytes, for which repository, until when. A client that may upload bytes need not be allowed to read them: another repository may
already have them.
"""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest, is_hex
from adapterhub.hub import commits, proposals
from adapterhub.hub.access_control import may_write
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import View
from adapterhub.hub.downloads import HUGGING_FACE
from adapterhub.hub.hub import Hub
from adapterhub.hub.quotas import proposal_scope
from adapterhub.hub.request_context import stream_body
from adapterhub.hub.signed_fields import signature, signed_purpose
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub_converters.display import printable
from adapterhub_converters.errors import RefusedError, UsageError

from .hf_errors import ResponseError, error_response
from .reading import name_of, visible_view
from .repositories import read_document

UPLOAD, DOWNLOAD = "upload", "download"
_PROPOSE = "propose"  # an upload for a proposal
MEDIA_TYPE = "application/vnd.git-lfs+json"
_MAX_OBJECTS, _MAX_BATCH = 1000, 1 << 20  # objects in a batch, and its bytes
_LIFETIME = 3600  # seconds in which an address is valid: an upload must start by then, but may end later


async def batch(hub: Hub, request: Request) -> Response:
    """POST /{id}.git/info/lfs/objects/batch."""
    identity, name = hub.identify(request), name_of(request)
    await hub.workers.run(lambda worker: visible_view(worker, hub, identity, name))  # before its body
    fields = await read_document(request, _MAX_BATCH)
    operation = UPLOAD if fields.get("operation") == UPLOAD else DOWNLOAD
    uploading = operation == UPLOAD
    objects = [_object(entry) for entry in _checked_list(fields.get("objects"))]

    def work(worker: Worker) -> list[tuple[int | None, str]]:
        view = visible_view(worker, hub, identity, name)
        counted_name = proposals.upload_name(hub.access, identity, name) if uploading else name
        for checked_name in {name, counted_name} if uploading else ():
            hub.quotas.check(worker, checked_name, dict(objects), except_uploads=[checked_name])
        # Only what this repository has: otherwise the response would reveal blobs of others.
        has_uploads = uploading or may_write(identity, name)
        sizes = [hub.blob_size(worker, view, counted_name, digest, uploads=has_uploads) for digest, _ in objects]
        hub.uploaded.record(
            counted_name,
            [digest for (digest, size), stored_size in zip(objects, sizes, strict=True) if uploading and stored_size == size],
        )
        return [(size, _refusal(hub, worker, identity, view, digest)) for (digest, _), size in zip(objects, sizes, strict=True)]

    results = await hub.workers.run(work)
    url, token_id = hub.url(request), identity.token if identity else 0
    signed_for = _PROPOSE if uploading and not may_write(identity, name) else operation
    answers = []
    for (digest, size), (stored_size, refusal) in zip(objects, results, strict=True):
        href = (
            f"{url}/lfs/{name}/{digest.removeprefix('sha256:')}?"
            f"{urlencode(_signed_query(hub, token_id, signed_for, name, (digest, size)))}"
        )
        limit = hub.settings.max_file
        answers.append(
            _answer(digest, size, href, is_stored=stored_size == size, uploading=uploading, limit=limit, refusal=refusal)
        )
    answer = {"transfer": "basic", "objects": answers, "hash_algo": "sha256"}
    return JSONResponse(answer, media_type=MEDIA_TYPE)


def _refusal(hub: Hub, worker: Worker, identity: Identity | None, view: View, digest: Digest) -> str:
    """Return why the policy does not let a file out; empty if it does."""
    try:
        hub.policy_gate.check_blob(worker, identity, view, digest)
    except RefusedError as refused:
        return str(refused)
    return ""


def _checked_list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_OBJECTS:
        raise UsageError("objects", f"not a list of at most {_MAX_OBJECTS} objects")
    return value


def _object(entry: Any) -> tuple[Digest, int]:
    oid, size = (entry.get("oid"), entry.get("size")) if isinstance(entry, dict) else (None, None)
    if not isinstance(oid, str) or not is_hex(oid) or type(size) is not int or size < 0:
        raise UsageError("objects", "an object has no sha256 as its oid, or no size in bytes")
    return f"sha256:{oid}", size


def _answer(
    digest: Digest, size: int, href: str, *, is_stored: bool, uploading: bool, limit: int, refusal: str
) -> dict[str, Any]:
    answer: dict[str, Any] = {"oid": digest.removeprefix("sha256:"), "size": size, "authenticated": True}
    if size > limit:
        answer["error"] = {"code": 422, "message": f"a file may have at most {limit:,} bytes"}
    elif uploading and not is_stored:
        answer["actions"] = {"upload": {"href": href}, "verify": {"href": href}}
    elif not uploading and is_stored and refusal:
        answer["error"] = {"code": 403, "message": printable(refusal)[:2000]}
    elif not uploading and is_stored:
        answer["actions"] = {"download": {"href": href}}
    elif not uploading:
        answer["error"] = {"code": 404, "message": "no such object"}
    return answer


def _signed_query(hub: Hub, token_id: int, operation: str, name: str, file: tuple[Digest, int]) -> dict[str, str]:
    """Return the query of an address, which ends with the token that asked for it; `token_id` is 0 without one."""
    digest, size = file
    fields = {"size": str(size), "expires": str(int(time.time()) + _LIFETIME), "token": str(token_id)}
    return {**fields, "signature": signature(hub.secret, operation, name, digest, *fields.values())}


def _checked_address(hub: Hub, request: Request, operation: str) -> tuple[str, Digest, int, str]:
    """Return the repository, digest and size in a signed address, and the operation that it was signed for.

    Raises:
        ResponseError: 403, if this hub did not sign it for this operation, or it has expired.
    """
    name, oid, query = name_of(request), request.path_params["oid"], request.query_params
    size, expires, token_id = (query.get(key, "") for key in ("size", "expires", "token"))
    purposes = (UPLOAD, _PROPOSE) if operation == UPLOAD else (operation,)
    fields = (name, f"sha256:{oid}", size, expires, token_id)
    purpose = signed_purpose(hub.secret, query.get("signature", ""), purposes, *fields)
    # The signature is checked first, so `expires` and `token_id` are numbers of ours.
    if not purpose or int(expires) < time.time() or not _may_still(hub, purpose, name, int(token_id)):
        raise ResponseError(403, "", f"this address is not valid any more for this {operation}; begin again")
    return name, f"sha256:{oid}", int(size), purpose


def _may_still(hub: Hub, operation: str, name: str, token_id: int) -> bool:
    """Return whether the token that asked for an address is still valid, and may still write if that is an upload."""
    if not token_id:
        return operation == DOWNLOAD
    identity = hub.access.identity_behind(token_id)
    return identity is not None and (operation != UPLOAD or may_write(identity, name))


async def _counted_name(hub: Hub, request: Request, name: str, operation: str) -> str:
    """Return the name under which an upload counts; who proposes something has to see the repository still."""
    if operation == UPLOAD:
        return name
    identity = hub.access.identity_behind(int(request.query_params["token"]))
    await hub.workers.run(lambda worker: visible_view(worker, hub, identity, name))
    return proposal_scope(identity.account if identity else "", name)


async def put(hub: Hub, request: Request) -> Response:
    """PUT /lfs/{id}/{oid}: receive the bytes of a file."""
    name, digest, size, operation = _checked_address(hub, request, UPLOAD)
    length = request.headers.get("content-length", "")
    # Refuse before reading: the announced size is signed into the address.
    if length not in ("", str(size)):
        return error_response(400, f"{length} bytes are announced, and {size} were to be sent")
    counted_name = await _counted_name(hub, request, name, operation)
    await hub.uploads.receive(counted_name, stream_body(request, size), digest, size)
    return Response(status_code=200)


async def verify(hub: Hub, request: Request) -> Response:
    """POST /lfs/{id}/{oid}: whether a file has arrived. Some clients never ask, so the commit checks again."""
    name, digest, size, operation = _checked_address(hub, request, UPLOAD)
    counted_name = await _counted_name(hub, request, name, operation)

    def stored_size(worker: Worker) -> int | None:
        return hub.blob_size(worker, commits.find_view(worker, name), counted_name, digest)

    has_arrived = await hub.workers.run(stored_size) == size
    return JSONResponse({}) if has_arrived else error_response(404, f"{name}: {digest} has not arrived")


async def get(hub: Hub, request: Request) -> Any:
    """GET /lfs/{id}/{oid}: for git-lfs, as long as the client may still see the repository and the file is still let out."""
    name, digest, size, _ = _checked_address(hub, request, DOWNLOAD)
    if not await hub.workers.read(hub.store.has_blob, digest, size):
        return error_response(404, f"{name}: {digest} is not here any more")
    token_id = int(request.query_params["token"])
    identity = hub.access.identity_behind(token_id) if token_id else None
    range_header = request.headers.get("range") if request.method == "GET" else None

    def work(worker: Worker) -> None:
        view = visible_view(worker, hub, identity, name)
        hub.policy_gate.check_blob(worker, identity, view, digest)
        if request.method == "GET":
            hub.record_read(view, digest, HUGGING_FACE)
            _count(worker, hub, name, digest, range_header)

    await hub.workers.run(work)
    return hub.blob(digest, size, {"content-type": "application/octet-stream"}, range_header)


def _count(worker: Worker, hub: Hub, name: str, digest: Digest, range_header: str | None) -> None:
    """Count a download of the newest version with a file."""
    for row in queries.versions(worker.registry.index, name=name, file=digest)[:1]:
        files = commits.version_commit_without_message(worker, row).files
        hub.downloads.count_file(row, files, digest, range_header)
