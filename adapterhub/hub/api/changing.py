"""Handlers that publish, tag, deprecate, remove and restore, for accounts with the role `write` in the namespace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub import request_context
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.hf.reading import path_part
from adapterhub.hub.hub import Hub
from adapterhub.hub.oci import any_manifest
from adapterhub.hub.oci.manifest_handlers import Push, move_branches, rehearse_version, store_manifest
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub.manifest import measurement
from adapterhub.manifest.keep_rule import keep_rule
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST
from adapterhub.ref import Ref, parse_name
from adapterhub.registry import measurement_log, version_selection
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.repository_records import ENTRY_SIZE
from adapterhub.registry.version_lookup import Version
from adapterhub.remotes import version_documents
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import ConflictError, UsageError

from . import name_changes, release_changes
from .api_requests import DRY_RUN, check_known, is_set, name_of, tag_of, visible_view
from .reading import version_response
from .request_fields import count_field, text_field

T = TypeVar("T")
_MAX_BODY = 64 << 10  # bytes of a document with a reason or a tag
_MAX_TAGS = 100


async def begin(hub: Hub, request: Request, check: Callable[..., object] = visible_view) -> tuple[Identity | None, str]:
    """Return who asks and the name in the path, if they may see it and write to it: before the body is read."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> None:
        check(worker, hub, identity, name)
        hub.access.check_write(identity, name)

    await hub.workers.run(work)
    return identity, name


async def change(hub: Hub, request: Request, move: Callable[[Worker, Hub, Identity | None, str], T]) -> T:
    """Make a change of the repository in the path, with the checks of `name_changes`; with `dry_run=true`, rehearse it."""
    identity, name = hub.identify(request), name_of(request)
    async with hub.change(name):
        return await _run(hub, request, move, identity, name)


async def _run(hub: Hub, request: Request, work: Callable[..., T], identity: Identity | None, *names: str) -> T:
    """Make a change of `names`; with `dry_run=true`, rehearse it."""
    if not is_set(request, DRY_RUN):
        return await hub.workers.run(work, hub, identity, *names)
    try:
        return await hub.workers.rehearse(work, hub, identity, *names)
    finally:
        for name in names:  # what was rehearsed has been counted
            hub.quotas.recount(name)


def _expected_digest(request: Request) -> Digest | None:
    """Return the digest, its first digits or `absent` that a tag must be at by the conditions of a request; None for any."""
    absent, present = (request.headers.get(key, "").strip() for key in ("if-none-match", "if-match"))
    if absent == "*" and not present:
        return ABSENT
    if absent or present == "*":
        raise UsageError("condition", "is not one that can be kept", 'Send If-Match: "DIGEST", or If-None-Match: *')
    return present.strip('"') if present else None


def refuse_condition(request: Request) -> None:
    """Refuse a condition on a request that keeps none, rather than change something that the client has not seen."""
    if conditions := {"if-match", "if-none-match"}.intersection(request.headers.keys()):
        raise UsageError("condition", "is kept for tags, versions and removals only", f"Leave {min(conditions)} out")


# ---- versions


async def publish(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/versions: make a version of a manifest whose blobs were uploaded, or move tags to it.

    A rehearsal takes the manifest before the blobs, and none for a version whose files are not known yet.
    """
    identity, name = hub.identify(request), name_of(request)
    parse_name(name, name[:210])
    hub.access.check_write(identity, name)
    if hub.settings.policy is not None:
        hub.settings.policy.check_name(name)
    fields, is_rehearsal = await read_object(request, 2 * MAX_MANIFEST + _MAX_BODY), is_set(request, DRY_RUN)
    raw = text_field(fields, "manifest", "" if is_rehearsal else None).encode(errors="replace")
    tags = _checked_tags(name, fields.get("tags", []))
    metrics = fields.get("metrics")
    if not isinstance(metrics, dict | None):
        raise UsageError("metrics", "is not an object")
    evaluation = release_changes.sent_by(identity, measurement.reported_evaluation(metrics, name)) if metrics else None
    digest = sha256_bytes(raw)
    document = await hub.workers.read(any_manifest.parse, raw, MANIFEST_TYPE, name) if raw else any_manifest.EMPTY
    expect, message = _expected_digest(request), text_field(fields, "message", "")
    push = Push(raw, digest, digest, document, tags, expect, message, is_version=True, identity=identity)

    def work(worker: Worker, *_: object) -> Version:
        if evaluation:  # before the version exists, so that a refused push publishes nothing
            hub.quotas.check_record(worker, name, ENTRY_SIZE + len(evaluation.dump()))
        if is_rehearsal:
            return rehearse_version(worker, hub, name, push)
        version = store_manifest(worker, hub, name, push)
        assert version is not None  # noqa: S101 - `is_version`
        if evaluation:
            measurement_log.record(worker.registry, version.ref, evaluation)
        return version

    version = await change(hub, request, work)
    return version_response(version, 201 if version.new else 200)


def _checked_tags(name: str, tags: object) -> tuple[str, ...]:
    """Return tags that a client may set by hand."""
    if not isinstance(tags, list) or len(tags) > _MAX_TAGS or not all(isinstance(tag, str) for tag in tags):
        raise UsageError("tags", f"is not a list of at most {_MAX_TAGS} tags")
    # A number is none that a client sets, but one that it may ask for, as a copy of numbered versions does.
    return tuple(dict.fromkeys(tag if version_selection.number(tag) else name_changes.checked_tag(name, tag) for tag in tags))


# ---- tags


async def put_tag(hub: Hub, request: Request) -> Response:
    """PUT …/names/{name}/tags/{tag}: point a tag at the version `reference`, if it is where `If-Match` says."""
    _, name = await begin(hub, request)
    reference, tag = text_field(await read_object(request, _MAX_BODY), "reference"), tag_of(request)
    name_changes.checked_tag(name, tag)
    set_tag = partial(name_changes.set_tag, reference=reference, tag=tag, expect=_expected_digest(request))
    return version_response(await change(hub, request, set_tag))


async def delete_tag(hub: Hub, request: Request) -> Response:
    """DELETE …/names/{name}/tags/{tag}: remove a tag, if it is where `If-Match` says; its version stays."""
    await begin(hub, request)
    remove_tag = partial(name_changes.remove_tag, tag=tag_of(request), expect=_expected_digest(request))
    return JSONResponse({"removed": str(await change(hub, request, remove_tag)), "kind": "tag"})


async def restore_tag(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/tags/{tag}/restore: point it where it pointed before its last move, or after the entry `seq`."""
    refuse_condition(request)
    await begin(hub, request)
    seq = (await read_object(request, _MAX_BODY)).get("seq")
    if seq is not None and not json_file.is_integer(seq):
        raise UsageError("seq", "is not the number of an entry")

    def move(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> Version:
        name_changes.check_writer(worker, hub, identity, name)
        tag = name_changes.checked_tag(name, tag_of(request))
        version = worker.registry.restore_tag(Ref(name, tag=tag), seq)
        move_branches(worker, name, version, (tag,))
        return version

    return version_response(await change(hub, request, move))


async def protect(hub: Hub, request: Request) -> Response:
    """PUT or DELETE …/names/{name}/tags/{tag}/protection: forbid moving or removing a tag, or allow it again."""
    refuse_condition(request)
    await begin(hub, request)

    def move(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> Version:
        name_changes.check_writer(worker, hub, identity, name)
        ref = Ref(name, tag=name_changes.checked_tag(name, tag_of(request)))
        return worker.registry.protect(ref, on=request.method == "PUT")

    return version_response(await change(hub, request, move))


# ---- deprecation, retention and removal


async def deprecate(hub: Hub, request: Request) -> Response:
    """PUT or DELETE …/names/{name}[/versions/{reference}]/deprecation: warn of a version or a name, or withdraw that."""
    refuse_condition(request)
    await begin(hub, request)
    undo = request.method == "DELETE"
    message = "" if undo else text_field(await read_object(request, _MAX_BODY), "message", "")
    # A path without a reference is about the name.
    reference = path_part(request, "reference") if "reference" in request.path_params else ""
    move = partial(name_changes.deprecate, reference=reference, message=message, undo=undo)
    return JSONResponse(await change(hub, request, move))


async def keep(hub: Hub, request: Request) -> Response:
    """PUT or DELETE …/names/{name}/retention: set which versions a gc keeps besides those with tags, or keep all."""
    refuse_condition(request)
    await begin(hub, request)
    rule = None
    if request.method == "PUT":
        fields = await read_object(request, _MAX_BODY)
        rule = keep_rule(count_field(fields, "keep"), count_field(fields, "ttl"))
        if rule is None:
            raise UsageError("keep", "is not a number of versions", "Give it, or the seconds of ttl")
    await change(hub, request, partial(name_changes.set_retention, rule=rule))
    return JSONResponse(version_documents.retention_document(name_of(request), rule))


async def delete_name(hub: Hub, request: Request) -> Response:
    """DELETE …/names/{name}: remove it with its versions, even one that others were made from with `force=true`."""
    await begin(hub, request)
    force = is_set(request, "force")
    await change(hub, request, partial(name_changes.remove_name, expect=_expected_digest(request), force=force))
    return JSONResponse({"removed": name_of(request), "kind": "name"})


async def move(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/move: rename it to the name in the field `to`; it then leads there."""
    refuse_condition(request)
    identity, name = await begin(hub, request, name_changes.check_movable)
    new = parse_name(text := text_field(await read_object(request, _MAX_BODY), "to"), text[:210])
    request_context.current().record_detail(to=new)
    # Not under the lock, which a name would wait for twice.
    if name == new:
        raise ConflictError(new, "exists already", "Choose another name")
    # Both names stay locked until the move is finished, so no push can slip in between.
    async with hub.locks.move(name, new):
        versions = await _run(hub, request, name_changes.move_name, identity, name, new)
    return JSONResponse({"from": name, "to": new, "versions": versions})


async def restore_name(hub: Hub, request: Request) -> Response:
    """POST …/names/{name}/restore: undo the removal of a name."""
    refuse_condition(request)
    await begin(hub, request, check_known)
    return JSONResponse(await change(hub, request, name_changes.restore_name))
