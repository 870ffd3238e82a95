"""Blobs in: sessions of uploads, whole bodies, and mounts of what another repository has.

A session's address is its own secret, below its repository; who goes on with it needs the right to write there all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.digest import Digest
from adapterhub.hub.access import writes
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.uploads import BusyError, Upload
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.ref import is_name
from adapterhub_converters import linear
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError

from .answers import DIGEST, VERSION, OciError
from .reading import check_readable
from .references import check_open, parse_digest, remember, stored, writer_of

_RANGE = linear.Pattern(r"(?:bytes[ =])?(\d{1,18})-(\d{1,18})(?:/.*)?")


async def begin(hub: Hub, request: Request) -> Response:
    """POST /v2/{name}/blobs/uploads/: a session; or with `mount` a blob that is here; or with `digest` a whole blob."""
    who = hub.identify(request)
    name, asked = writer_of(hub, who, request), request.query_params
    await hub.workers.run(check_open, name)
    if mount := asked.get("mount"):
        digest = parse_digest(mount)
        if of := await hub.workers.run(_readable, hub, who, digest, [asked["from"]] if "from" in asked else None):
            return await _stored(hub, name, digest, of)
    elif asked.get("digest"):
        digest = parse_digest(asked["digest"])
        with _errors():
            of = await hub.uploads.receive(name, request.stream(), digest, length=_length(request))
        return await _stored(hub, name, digest, of)
    return _at(await hub.uploads.begin(name), 202)


def _readable(worker: Worker, hub: Hub, who: Identity | None, asked: str, sources: list[str] | None) -> Digest:
    """The sha256 of a blob that `who` may read in one of some repositories, or without any, in one that has it; else empty."""
    digest = stored(hub, asked) or asked
    if sources is None:
        sources = [name for name in hub.uploaded_to(digest) if writes(who, name)]
        sources += queries.names_with(worker.registry.index, digest, without=hub.hidden(worker, who))
    named = [name for name in sources if is_name(name)]
    return digest if any(check_readable(hub, worker, who, name, digest) is not None for name in named) else ""


async def append(hub: Hub, request: Request) -> Response:
    """PATCH of a session: more of the blob, in order."""
    upload = await _session(hub, request)
    _check_range(upload, request)
    with _errors():
        await hub.uploads.append(upload, request.stream(), _length(request))
    return _at(upload, 202)


async def finish(hub: Hub, request: Request) -> Response:
    """PUT of a session: the rest of the blob, if there is any, and its digest."""
    upload = await _session(hub, request)
    digest = parse_digest(request.query_params.get("digest", ""))
    _check_range(upload, request)
    with _errors():
        await hub.uploads.append(upload, request.stream(), _length(request))
        of = await hub.uploads.finish(upload, digest)
    return await _stored(hub, upload.name, digest, of)


async def status(hub: Hub, request: Request) -> Response:
    """GET of a session: how much has arrived."""
    return _at(await _session(hub, request), 204)


async def cancel(hub: Hub, request: Request) -> Response:
    """DELETE of a session."""
    upload = await _session(hub, request)
    with _errors():
        await hub.uploads.cancel(upload)
    return Response(status_code=204, headers=VERSION)


async def delete(hub: Hub, request: Request) -> Response:
    """DELETE /v2/{name}/blobs/{digest}: blobs go with the last manifest that names them."""
    writer_of(hub, hub.identify(request), request)
    parse_digest(str(request.path_params["digest"]))
    raise OciError(405, "UNSUPPORTED", "a blob is removed by a gc, once no manifest names it")


async def _session(hub: Hub, request: Request) -> Upload:
    name = writer_of(hub, hub.identify(request), request)
    with _errors():
        return await hub.uploads.find(str(request.path_params["session"]), name)


def _length(request: Request) -> int:
    """The bytes of a body, as far as they are announced."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def _check_range(upload: Upload, request: Request) -> None:
    """Refuse a piece that does not follow what has arrived, with the place to go on from."""
    header, length = request.headers.get("content-range"), request.headers.get("content-length", "")
    if header is None:
        return
    found = _RANGE.fullmatch(header.strip())
    if not found or int(found[2]) < int(found[1]):
        raise OciError(416, "BLOB_UPLOAD_INVALID", f"{header[:80]!r} is not a range of bytes", _place(upload))
    if int(found[1]) != upload.size:
        raise OciError(416, "BLOB_UPLOAD_INVALID", f"the next byte is {upload.size}, not {found[1]}", _place(upload))
    if length.isdecimal() and int(length) != int(found[2]) - int(found[1]) + 1:
        raise OciError(400, "SIZE_INVALID", f"{length[:20]} bytes are not the range {found[0][:80]}", _place(upload))


@contextmanager
def _errors() -> Iterator[None]:
    """Errors of sessions under their codes."""
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


async def _stored(hub: Hub, name: str, digest: str, of: Digest) -> Response:
    def work() -> None:
        remember(hub, digest, of)
        hub.uploaded(name, [of])

    await hub.workers.read(work)
    return _created(name, digest)


def _created(name: str, digest: str) -> Response:
    return Response(status_code=201, headers={**VERSION, "location": f"/v2/{name}/blobs/{digest}", DIGEST: digest})


def _at(upload: Upload, status: int) -> Response:
    return Response(status_code=status, headers={**VERSION, **_place(upload)})


def _place(upload: Upload) -> dict[str, str]:
    """Where a session goes on, and how much of it is there: `0-0` is said of nothing too."""
    return {
        "location": f"/v2/{upload.name}/blobs/uploads/{upload.id}",
        "range": f"0-{max(upload.size - 1, 0)}",
        "docker-upload-uuid": upload.id,
    }
