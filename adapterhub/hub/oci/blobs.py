"""Handlers that receive blobs: upload sessions, whole bodies, and mounts from other repositories.

The address of a session is secret, below its repository; continuing it requires the right to write there all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.digest import Digest
from adapterhub.hub.access_control import may_write
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import stream_body
from adapterhub.hub.uploads import BusyError, Upload
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.ref import is_name
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError

from .names_and_digests import check_pushable, parse_digest, record_sha512, sha256_of, writable_name
from .oci_errors import DIGEST, VERSION, OciError
from .read_handlers import mountable_size

_RANGE = safe_regex.Pattern(r"(?:bytes[ =])?(\d{1,18})-(\d{1,18})(?:/.*)?")


async def begin(hub: Hub, request: Request) -> Response:
    """POST /v2/{name}/blobs/uploads/: begin a session, mount the blob `mount`, or receive a whole blob with `digest`."""
    identity = hub.identify(request)
    name, query = writable_name(hub, identity, request), request.query_params
    # Refuse before the body: a client would otherwise send gigabytes for nothing.
    await hub.workers.run(check_pushable, name)
    if mount := query.get("mount"):
        digest = parse_digest(mount)
        sources = [query["from"]] if "from" in query else None

        def find(worker: Worker) -> Digest:
            # A sha512 is known by the namespace of the source; without one, by that of the target.
            sha256 = sha256_of(hub, query.get("from", name), digest) or digest
            return _mountable(worker, hub, identity, sha256, sources)

        if sha256 := await hub.workers.run(find):
            return await _record_blob(hub, name, digest, sha256)
    elif query.get("digest"):
        digest = parse_digest(query["digest"])
        with _errors():
            sha256 = await hub.uploads.receive(name, stream_body(request), digest, length=_length(request))
        return await _record_blob(hub, name, digest, sha256)
    return _session_response(await hub.uploads.begin(name), 202)


def _mountable(worker: Worker, hub: Hub, identity: Identity | None, digest: Digest, sources: list[str] | None) -> Digest:
    """Return a blob's digest if the client may read it in one of `sources`, or with None in any repository; else empty."""
    if sources is None:
        # A mount without `from` is tried in every repository the client can see (distribution-spec, "Mounting a blob from
        # another repository").
        sources = [name for name in hub.uploaded.repositories(digest) if may_write(identity, name)]
        sources += queries.names_with(worker.registry.index, digest, without=hub.hidden_names(worker, identity))
    names = [name for name in sources if is_name(name)]
    return digest if any(mountable_size(hub, worker, identity, name, digest) is not None for name in names) else ""


async def append(hub: Hub, request: Request) -> Response:
    """PATCH of a session: append to the blob, in order."""
    upload = await _session(hub, request)
    _check_range(upload, request)
    with _errors():
        await hub.uploads.append(upload, stream_body(request), _length(request))
    return _session_response(upload, 202)


async def finish(hub: Hub, request: Request) -> Response:
    """PUT of a session: the rest of the blob, if any, and its digest."""
    upload = await _session(hub, request)
    digest = parse_digest(request.query_params.get("digest", ""))
    _check_range(upload, request)
    with _errors():
        await hub.uploads.append(upload, stream_body(request), _length(request))
        sha256 = await hub.uploads.finish(upload, digest)
    return await _record_blob(hub, upload.name, digest, sha256)


async def status(hub: Hub, request: Request) -> Response:
    """GET of a session: how much has arrived."""
    return _session_response(await _session(hub, request), 204)


async def cancel(hub: Hub, request: Request) -> Response:
    """DELETE of a session."""
    upload = await _session(hub, request)
    with _errors():
        await hub.uploads.cancel(upload)
    return Response(status_code=204, headers=VERSION)


async def delete(hub: Hub, request: Request) -> Response:
    """DELETE /v2/{name}/blobs/{digest}: refused, because blobs go with the last manifest that names them."""
    writable_name(hub, hub.identify(request), request)
    parse_digest(str(request.path_params["digest"]))
    raise OciError(405, "UNSUPPORTED", "a blob is removed by a gc, once no manifest names it")


async def _session(hub: Hub, request: Request) -> Upload:
    name = writable_name(hub, hub.identify(request), request)
    with _errors():
        return await hub.uploads.find(str(request.path_params["session"]), name)


def _length(request: Request) -> int:
    """Return the announced size of a body in bytes; 0 if unknown."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def _check_range(upload: Upload, request: Request) -> None:
    """Refuse a piece that does not continue where the upload stands; the error carries the right position."""
    header, length = request.headers.get("content-range"), request.headers.get("content-length", "")
    if header is None:
        return
    match = _RANGE.fullmatch(header.strip())
    if not match or int(match[2]) < int(match[1]):
        raise OciError(416, "BLOB_UPLOAD_INVALID", f"{header[:80]!r} is not a range of bytes", _session_headers(upload))
    if int(match[1]) != upload.size:
        raise OciError(416, "BLOB_UPLOAD_INVALID", f"the next byte is {upload.size}, not {match[1]}", _session_headers(upload))
    if length.isdecimal() and int(length) != int(match[2]) - int(match[1]) + 1:
        raise OciError(400, "SIZE_INVALID", f"{length[:20]} bytes are not the range {match[0][:80]}", _session_headers(upload))


@contextmanager
def _errors() -> Iterator[None]:
    """Report errors of sessions under their OCI codes."""
    try:
        yield
    except BusyError as error:
        raise OciError(429, "TOOMANYREQUESTS", str(error), {"retry-after": "1"}) from error
    except NotFoundError as error:
        raise OciError(404, "BLOB_UPLOAD_UNKNOWN", str(error)) from error
    except IntegrityError as error:
        raise OciError(400, "DIGEST_INVALID", str(error)) from error
    except RefusedError as error:
        raise OciError(413, "SIZE_INVALID", str(error)) from error


async def _record_blob(hub: Hub, name: str, digest: str, sha256: Digest) -> Response:
    def work() -> None:
        record_sha512(hub, name, digest, sha256)
        hub.uploaded.record(name, [sha256])

    await hub.workers.read(work)
    return _created_response(name, digest)


def _created_response(name: str, digest: str) -> Response:
    return Response(status_code=201, headers={**VERSION, "location": f"/v2/{name}/blobs/{digest}", DIGEST: digest})


def _session_response(upload: Upload, status: int) -> Response:
    return Response(status_code=status, headers={**VERSION, **_session_headers(upload)})


def _session_headers(upload: Upload) -> dict[str, str]:
    """Return the address of a session and the range it has so far; `0-0` also means that nothing has arrived."""
    return {
        "location": f"/v2/{upload.name}/blobs/uploads/{upload.id}",
        "range": f"0-{max(upload.size - 1, 0)}",
        "docker-upload-uuid": upload.id,
    }
