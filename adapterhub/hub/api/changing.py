"""Handlers that publish, tag, deprecate, remove and restore, for accounts with the role `write` in the namespace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub import commits, removals
from adapterhub.hub.hub import Hub
from adapterhub.hub.oci import any_manifest
from adapterhub.hub.oci.manifest_handlers import Push, move_branches, store_manifest
from adapterhub.hub.people.access_tokens import Identity
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub.manifest import measurement
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST
from adapterhub.ref import LATEST, Ref, is_tag, parse_name
from adapterhub.registry import measurement_log, version_selection
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.repository_records import ENTRY_SIZE, MAIN
from adapterhub.registry.version_lookup import Version
from adapterhub.remotes import version_documents
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError, UsageError

from .api_requests import check_known, name_of, ref_of, ref_to, tag_of, visible_view
from .reading import version_response

T = TypeVar("T")
_MAX_BODY = 64 << 10  # bytes of a document with a reason or a tag
_MAX_TAGS = 100
_RESERVED = (MAIN, commits.HEAD)  # names of the branch that every repository has


async def begin(hub: Hub, request: Request, check: Callable[..., object] = visible_view) -> tuple[Identity | None, str]:
    """Return who asks and the name in the path, if they may see it and write to it: before the body is read."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> None:
        check(worker, hub, identity, name)
        hub.access.check_write(identity, name)

    await hub.workers.run(work)
    return identity, name


async def change(hub: Hub, request: Request, move: Callable[[Worker, Identity | None, str], T], *, size: int = ENTRY_SIZE) -> T:
    """Make a change of a repository that the client sees and may write to.

    It adds `size` bytes to the log of the name; 0 for a removal, which is what makes room, and never refused.
    """
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> T:
        # Looked up again: the name and the role may be gone since the body began.
        visible_view(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        if size:
            hub.quotas.check_record(worker, name, size)
        return move(worker, identity, name)

    async with hub.change_lock(name):
        return await hub.workers.run(work)


def _expected_digest(request: Request) -> Digest | None:
    """Return the digest, its first digits or `absent` that a tag must be at by the conditions of a request; None for any."""
    absent, present = (request.headers.get(key, "").strip() for key in ("if-none-match", "if-match"))
    if absent == "*" and not present:
        return ABSENT
    if absent or present == "*":
        raise UsageError("condition", "is not one that can be kept", 'Send If-Match: "DIGEST", or If-None-Match: *')
    return present.strip('"') if present else None


# ---- versions


async def publish(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/versions: make a version of a manifest whose blobs were uploaded, or move tags to it."""
    identity, name = hub.identify(request), name_of(request)
    parse_name(name, name[:210])
    hub.access.check_write(identity, name)
    if hub.settings.policy is not None:
        hub.settings.policy.check_name(name)
    fields = await read_object(request, 2 * MAX_MANIFEST + _MAX_BODY)
    raw = read_text(fields, "manifest").encode(errors="replace")
    tags = _checked_tags(name, fields.get("tags", []))
    metrics = fields.get("metrics")
    if not isinstance(metrics, dict | None):
        raise UsageError("metrics", "is not an object")
    evaluation = measurement.reported_evaluation(metrics, name) if metrics else None
    digest = sha256_bytes(raw)
    document = await hub.workers.read(any_manifest.parse, raw, MANIFEST_TYPE, name)
    expect, message = _expected_digest(request), read_text(fields, "message", "")
    push = Push(raw, digest, digest, document, tags, expect, message, is_version=True)

    def work(worker: Worker) -> Version:
        if evaluation:  # before the version exists, so that a refused push publishes nothing
            hub.quotas.check_record(worker, name, ENTRY_SIZE + len(evaluation.dump()))
        version = store_manifest(worker, hub, name, push)
        assert version is not None  # noqa: S101 - `is_version`
        if evaluation:
            measurement_log.record(worker.registry, version.ref, evaluation)
        return version

    async with hub.change_lock(name):
        version = await hub.workers.run(work)
    return version_response(version, 201 if version.new else 200)


def read_text(fields: dict[str, Any], key: str, default: str | None = None) -> str:
    """Return a text of a document; the default for a missing one, and UsageError without a default."""
    value = fields.get(key, default)
    if not isinstance(value, str):
        raise UsageError(key, "is not a text")
    return value


def _checked_tags(name: str, tags: object) -> tuple[str, ...]:
    """Return tags that a client may set by hand."""
    if not isinstance(tags, list) or len(tags) > _MAX_TAGS or not all(isinstance(tag, str) for tag in tags):
        raise UsageError("tags", f"is not a list of at most {_MAX_TAGS} tags")
    # A number is none that a client sets, but one that it may ask for, as a copy of numbered versions does.
    return tuple(dict.fromkeys(tag if version_selection.number(tag) else checked_tag(name, tag) for tag in tags))


def checked_tag(name: str, tag: str) -> str:
    """Return a tag that a client may set by hand; UsageError or RefusedError for any other."""
    if tag in _RESERVED:
        raise RefusedError(f"{name}:{tag}", "is the branch with the newest version", "Choose another tag")
    if not is_tag(tag) or ref_to(name, tag).tag is None:
        raise UsageError(f"{name}:{tag[:130]}", "is not a tag that can be set", "Use up to 128 of A-Z a-z 0-9 . _ -")
    if tag == LATEST:
        raise RefusedError(f"{name}:{tag}", "is always the newest push", "Choose another tag", code="latest-tag")
    return tag


# ---- tags


async def put_tag(hub: Hub, request: Request) -> Response:
    """PUT …/names/{name}/tags/{tag}: point a tag at the version `reference`, if it is where `If-Match` says."""
    _, name = await begin(hub, request)
    reference, tag = read_text(await read_object(request, _MAX_BODY), "reference"), checked_tag(name, tag_of(request))

    def move(worker: Worker, _identity: Identity | None, name: str) -> Version:
        version = worker.registry.tag(ref_to(name, reference), tag, expect=_expected_digest(request))
        move_branches(worker, name, version, (tag,))
        return version

    return version_response(await change(hub, request, move))


async def delete_tag(hub: Hub, request: Request) -> Response:
    """DELETE …/names/{name}/tags/{tag}: remove a tag, if it is where `If-Match` says; its version stays."""
    tag = tag_of(request)

    def move(worker: Worker, _identity: Identity | None, name: str) -> str:
        ref = Ref(name, tag=checked_tag(name, tag))
        worker.registry.rm(ref, expect=_expected_digest(request))
        return str(ref)

    return JSONResponse({"removed": await change(hub, request, move, size=0), "kind": "tag"})


async def restore_tag(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/tags/{tag}/restore: point it where it pointed before its last move, or after the entry `seq`."""
    await begin(hub, request)
    seq = (await read_object(request, _MAX_BODY)).get("seq")
    if seq is not None and not json_file.is_integer(seq):
        raise UsageError("seq", "is not the number of an entry")

    def move(worker: Worker, _identity: Identity | None, name: str) -> Version:
        tag = checked_tag(name, tag_of(request))
        version = worker.registry.restore_tag(Ref(name, tag=tag), seq)
        move_branches(worker, name, version, (tag,))
        return version

    return version_response(await change(hub, request, move))


async def protect(hub: Hub, request: Request) -> Response:
    """PUT or DELETE …/names/{name}/tags/{tag}/protection: forbid moving or removing a tag, or allow it again."""

    def move(worker: Worker, _identity: Identity | None, name: str) -> Version:
        ref = Ref(name, tag=checked_tag(name, tag_of(request)))
        return worker.registry.protect(ref, on=request.method == "PUT")

    return version_response(await change(hub, request, move))


# ---- deprecation and removal


async def deprecate(hub: Hub, request: Request) -> Response:
    """PUT or DELETE …/names/{name}[/versions/{reference}]/deprecation: warn of a version or a name, or withdraw that."""
    await begin(hub, request)
    undo = request.method == "DELETE"
    message = "" if undo else read_text(await read_object(request, _MAX_BODY), "message", "")

    def move(worker: Worker, _identity: Identity | None, name: str) -> dict[str, Any]:
        ref = ref_of(request, name) if "reference" in request.path_params else Ref(name)
        number = worker.registry.deprecate(ref, message, undo=undo)
        return {"name": name, "number": number or None, "deprecated": None if undo else message}

    return JSONResponse(await change(hub, request, move, size=ENTRY_SIZE + len(message)))


async def delete_name(hub: Hub, request: Request) -> Response:
    """DELETE …/names/{name}: remove it with its versions, even one that others were made from with `force=true`."""
    force = request.query_params.get("force", "").lower() in ("true", "1")

    def move(worker: Worker, identity: Identity | None, name: str) -> str:
        view, sees = visible_view(worker, hub, identity, name), partial(hub.may_read_name, worker, identity)
        removals.remove(worker, view, sees, expect=_expected_digest(request), force=force)
        return name

    return JSONResponse({"removed": await change(hub, request, move, size=0), "kind": "name"})


async def restore_name(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/restore: undo the removal of a name."""
    identity, name = await begin(hub, request, check_known)

    def work(worker: Worker) -> dict[str, Any]:
        check_known(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        hub.quotas.check_record(worker, name, ENTRY_SIZE)
        if worker.registry.ledger.current(name).deleted:
            hub.quotas.check(worker, name, removals.restorable_files(worker, name), count=True)
        return version_documents.restore_document(removals.restore(worker, name))

    async with hub.change_lock(name):
        return JSONResponse(await hub.workers.run(work))
