"""Handlers that receive manifests: one with the files of an adapter becomes a version after a push's checks; others are kept.

Everything a manifest names must be in the same repository: blobs in the store may belong to others. A new version moves
`latest`, as every push does, and gets the next number, which is a tag that nobody can move.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub import commits, publishing
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import View
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_body
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.version_extract import indexed_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MAX_MANIFEST, Manifest
from adapterhub.ref import LATEST, Ref, parse_number
from adapterhub.registry.moves import check_protected, check_push
from adapterhub.registry.repository_documents import (
    OtherManifest,
    Repository,
    commit_id,
    with_head,
    with_manifest,
    without_manifest,
    without_tags,
)
from adapterhub.registry.repository_records import ENTRY_SIZE
from adapterhub.registry.version_lookup import Version
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import any_manifest
from .any_manifest import Document
from .names_and_digests import (
    check_pushable,
    check_tag,
    digest_of,
    parse_digest,
    record_sha512,
    sha256_of,
    sha512_of,
    writable_name,
)
from .oci_errors import DIGEST, VERSION, OciError
from .read_handlers import find_manifest, warning

NUMBER = "adapterhub-version"
"""A header with the version number of a pushed manifest, like v3, or `none` if it is not an adapter."""
_MAX_TAGS = 100  # of one request
_NO_ADAPTER_JSON = "it has no adapter.json, so that it is found by its name only; adapterhub push and hf upload add one"


@dataclass(frozen=True)
class Push:
    """A pushed manifest.

    Attributes:
        raw: Its bytes.
        digest: Their sha256.
        named_digest: The digest it was pushed under.
        document: The parsed bytes.
        tags: The tags to move.
        expect: The digest that the first of them must still have, or `absent`; None for any.
        message: The reason, for the log.
        is_version: Whether it is refused if it is not an adapter.
        identity: The account that pushes it.
    """

    raw: bytes
    digest: Digest
    named_digest: str
    document: Document
    tags: tuple[str, ...]
    expect: Digest | None = None
    message: str = ""
    is_version: bool = False
    identity: Identity | None = None


async def put(hub: Hub, request: Request) -> Response:
    """PUT /v2/{name}/manifests/{reference}; a manifest pushed by digest may be tagged with `?tag=`."""
    identity = hub.identify(request)
    name, reference = writable_name(hub, identity, request), str(request.path_params["reference"])
    digest = parse_digest(reference) if ":" in reference else ""
    query_tags = tuple(dict.fromkeys(request.query_params.getlist("tag"))) if digest else ()
    tags = tuple(map(check_tag, query_tags if digest else (reference,)))
    if len(tags) > _MAX_TAGS:
        raise OciError(400, "MANIFEST_INVALID", f"more than {_MAX_TAGS} tags")
    await hub.workers.run(check_pushable, name)
    raw = await read_body(request, MAX_MANIFEST)
    kind = request.headers.get("content-type", "")

    def parse() -> Push:
        sent_digest = digest_of(raw, digest)
        if digest and sent_digest != digest:
            raise OciError(400, "DIGEST_INVALID", f"{name}: received {sent_digest}, which is not {digest}")
        document = any_manifest.parse(raw, kind, name)
        return Push(raw, sha256_bytes(raw), sent_digest, document, tags, identity=identity)

    # In a thread: hashing and parsing 4 MB would hold up the event loop.
    push = await hub.workers.read(parse)
    async with hub.change(name):
        version = await hub.workers.run(store_manifest, hub, name, push)
    headers = {**VERSION, "location": f"/v2/{name}/manifests/{push.named_digest}", DIGEST: push.named_digest}
    if push.document.subject:
        headers["oci-subject"] = push.document.subject
    headers[NUMBER] = f"v{version.number}" if version else "none"
    if version and ADAPTER_JSON not in push.document.files:
        headers["warning"] = warning(f"{name}:v{version.number}: {_NO_ADAPTER_JSON}")
    answer = Response(status_code=201, headers=headers)
    for tag in query_tags:
        answer.headers.append("oci-tag", tag)
    return answer


def store_manifest(worker: Worker, hub: Hub, name: str, push: Push) -> Version | None:
    """Store a manifest; return its version, None if it is not an adapter. RefusedError for that if it has to be one."""
    view = check_pushable(worker, name)
    record_sha512(hub, name, push.named_digest, push.digest)
    blobs = _check_references(worker, hub, view, name, push.document)
    named_files = {path: (sha256_of(hub, name, digest), size) for path, (digest, size) in push.document.files.items()}
    files = {path: file for path, file in named_files.items() if file[0] in blobs}
    # A manifest with a subject is an attachment, whatever files it has.
    if not push.document.subject and publishing.is_adapter(worker.registry.store, files):
        return _publish(worker, hub, view, name, push)
    if push.is_version:
        raise RefusedError(name, "the manifest is not that of an adapter", "Push it to the hub as an OCI registry")
    namespace = hub.access.namespace_settings(name.partition("/")[0])
    publishing.check_attached(namespace, name, attached=_is_attached(worker, hub, view, push.document))
    # Counted as uploaded until the repository has it, in case that is refused.
    hub.uploaded.count(name, {push.digest: len(push.raw)})
    try:
        _keep_other_manifest(worker, view, name, push, blobs)
    except BaseException:
        if hub.store.size(push.digest) is None:
            hub.uploaded.forget(name, [push.digest])
        raise
    hub.uploaded.forget(name, [push.digest])
    return None


def _check_references(worker: Worker, hub: Hub, view: View | None, name: str, document: Document) -> tuple[Digest, ...]:
    """Return the blobs and manifests named by a manifest that the repository has.

    Raises:
        OciError: The repository lacks a required one, or its size differs.
    """
    blobs: dict[Digest, int | None] = {"": None}
    for reference in document.references:
        digest = sha256_of(hub, name, reference.digest)
        if digest not in blobs:
            blobs[digest] = hub.blob_size(worker, view, name, digest)
        size = blobs[digest]
        if size is None and reference.required:
            raise OciError(400, "MANIFEST_BLOB_UNKNOWN", f"{name}: {reference.digest} was not uploaded to this repository")
        if size is not None and size != reference.size and reference.required:
            raise OciError(400, "SIZE_INVALID", f"{name}: {reference.digest} has {size} bytes, not {reference.size}")
    return tuple(digest for digest, size in blobs.items() if size is not None)


# ---- versions


@dataclass(frozen=True)
class _Target:
    """The version that a manifest is, or would become.

    Attributes:
        view: The repository; None for a new one.
        ref: Its name, and the first of the tags to move.
        number: The number of the version.
        tags: The tags to move, without numbers.
        has_number: Whether the client asks for the number.
        is_stored: Whether it is a version already.
    """

    view: View | None
    ref: Ref
    number: int
    tags: tuple[str, ...]
    has_number: bool
    is_stored: bool

    @property
    def tags_of_new(self) -> tuple[str, ...]:
        """The tags that a new version moves."""
        return tuple(dict.fromkeys((LATEST, *self.tags)))


def _find_target(worker: Worker, view: View | None, name: str, push: Push) -> _Target:
    """Return the version that a manifest is, or would become, if its number and the first tag are as the client expects."""
    existing = queries.versions(worker.registry.index, name=name, digest=push.digest) if view and view.newest else []
    numbers = {tag: number for tag in push.tags if (number := parse_number(tag, f"{name}:{tag}"))}
    expected = existing[0].number if existing else worker.registry.ledger.current(name).number + 1
    for tag, number in numbers.items():
        if number != expected:
            explanation = f"this manifest is v{expected}" if existing else f"the next version is v{expected}"
            raise OciError(409, "DENIED", f"{name}:{tag}: version numbers are given in turn and do not move; {explanation}")
    tags = tuple(tag for tag in push.tags if tag not in numbers)
    ref = Ref(name, tag=next(iter(tags), None))
    check_push(worker.registry.ledger, ref, push.expect)
    return _Target(view, ref, expected, tags, bool(numbers), bool(existing))


def rehearse_version(worker: Worker, hub: Hub, name: str, push: Push) -> Version:
    """Decide about a version as `store_manifest` does, in a rehearsal, and return it as if it were made.

    The blobs of a new one need not be here yet, nor its manifest: what depends on its files is not decided.
    """
    target = _find_target(worker, check_pushable(worker, name), name, push)
    if target.is_stored:
        return _move_tags(worker, target, oci_manifest.parse(push.raw, name), push)
    tags, size = target.tags_of_new, None
    check_protected(worker.registry.ledger, name, *tags)
    worker.registry.gate.check_new(name, tags, lambda: push.digest)
    if push.raw:
        oci = oci_manifest.parse(push.raw, name)
        _check_new(worker, hub, target, oci, push)
        size = oci.size
    return Version(name, target.number, push.digest, size, tags, target.ref.tag, new=True, moved=True)


def _publish(worker: Worker, hub: Hub, view: View | None, name: str, push: Push) -> Version:
    """Publish a manifest as a version, unless it is one already, and move tags to it."""
    oci = oci_manifest.parse(push.raw, name)
    target = _find_target(worker, view, name, push)
    if target.is_stored:  # checked when it was first pushed
        version = _move_tags(worker, target, oci, push)
    else:
        _check_new(worker, hub, target, oci, push)
        tags = target.tags_of_new
        signatures = partial(publishing.attached_signatures, worker, name)
        options: dict[str, Any] = {"tags": tags, "expect": push.expect, "message": push.message, "policy": hub.settings.policy}
        version = publishing.publish_manifest(worker.registry, target.ref, oci, signatures=signatures, **options)
        move_branches(worker, name, version, (*tags, f"v{version.number}"))
    if target.has_number and version.number != target.number:
        problem = f"another writer took v{target.number}; this manifest is v{version.number}"
        raise OciError(409, "DENIED", f"{name}: {problem}")
    return version


def _move_tags(worker: Worker, target: _Target, oci: Manifest, push: Push) -> Version:
    """Move tags to a version that is there already."""
    with worker.registry.store.lease("push"):
        options: dict[str, Any] = {"tags": target.tags, "expect": push.expect, "message": push.message}
        version = worker.registry.push_manifest(oci, target.ref, **options)
    move_branches(worker, target.ref.name, version, (*target.tags, f"v{version.number}"))
    return version


def _check_new(worker: Worker, hub: Hub, target: _Target, oci: Manifest, push: Push) -> None:
    """Refuse a new version for which there is no room, or with the weights of a withdrawn one."""
    indexed = sum(indexed_bytes(layer.path, layer.size) for layer in oci.layers)
    hub.quotas.check_record(worker, target.ref.name, len(push.raw) + ENTRY_SIZE + indexed)
    # As for a commit: the manifest could bring back what was withdrawn, with another card.
    if target.view:
        files = ((layer.path, layer.digest) for layer in oci.layers)
        hub.policy_gate.check_weights_not_withdrawn(worker, push.identity, target.view, files)


def move_branches(worker: Worker, name: str, version: Version, tags: Sequence[str]) -> None:
    """Move branches along with tags of the same names, and take these tags from other manifests."""
    state = worker.repositories.get(name)
    if state is None or not any(tag in state.heads or tag in state.tags for tag in tags):
        return
    after = commits.find_view(worker, name)

    def edit(state: Repository) -> Repository:
        for tag in tags:
            if tag in state.heads:
                state = with_head(state, tag, commit_id(version.digest), after=after.latest if after else "")
        return without_tags(state, tags)

    worker.repositories.change(name, edit)


# ---- other manifests


def _is_attached(worker: Worker, hub: Hub, view: View | None, document: Document) -> bool:
    """Return whether the subject of a manifest is in the same repository."""
    try:
        return bool(document.subject and view and find_manifest(hub, worker, view, document.subject))
    except OciError:
        return False


def _keep_other_manifest(worker: Worker, view: View | None, name: str, push: Push, blobs: tuple[Digest, ...]) -> None:
    """Store a manifest that is not an adapter, and move tags to it."""
    version_tags = queries.tags(worker.registry.index, name) if view and view.newest else {}
    for tag in push.tags if version_tags else ():
        if tag == LATEST or parse_number(tag, f"{name}:{tag}"):
            problem = f"{name}:{tag} is a version of an adapter, and this manifest has no adapter_config.json and weights"
            raise OciError(400, "MANIFEST_INVALID", f"{problem}. Push it to another tag, or to another name")
    moved = [tag for tag in push.tags if tag in version_tags]
    check_protected(worker.registry.ledger, name, *moved)
    document = push.document
    other_manifest = OtherManifest(
        document.media_type, len(push.raw), document.artifact_type, document.subject, document.annotations, blobs
    )
    store = worker.registry.store
    with store.lease("push"):
        for digest in blobs:
            # Note the blobs in the lease, so that a gc spares them until the repository's document refers to them.
            store.retain_if_present(digest, store.size(digest) or 0)
        store.put_bytes(push.raw)
        store.sync_blobs()
        tags = dict.fromkeys(push.tags, push.named_digest)
        worker.repositories.change(name, lambda state: with_manifest(state, push.digest, other_manifest, tags))
    for tag in moved:  # the tag belonged to a version until now
        worker.registry.rm(Ref(name, tag=tag))


# ---- removal


async def delete(hub: Hub, request: Request) -> Response:
    """DELETE /v2/{name}/manifests/{reference}: remove a tag, or a manifest that is not a version, with its tags."""
    name, reference = writable_name(hub, hub.identify(request), request), str(request.path_params["reference"])
    if ":" in reference:
        parse_digest(reference)
    async with hub.change(name):
        await hub.workers.run(_delete, hub, name, reference)
    return Response(status_code=202, headers=VERSION)


def _delete(worker: Worker, hub: Hub, name: str, reference: str) -> None:
    view = check_pushable(worker, name)
    if view is None:
        raise OciError(404, "NAME_UNKNOWN", f"{name}: no such repository")
    state = view.repository or Repository()
    digest = sha256_of(hub, name, reference) if ":" in reference else ""
    try:
        row = commits.row_of(worker, view, digest or reference)
    except NotFoundError:
        if digest in state.manifests:
            worker.repositories.change(name, lambda state: without_manifest(state, digest, sha512_of(hub, name, digest)))
        elif reference in state.tags:
            worker.repositories.change(name, lambda state: without_tags(state, (reference,)))
        else:
            raise OciError(404, "MANIFEST_UNKNOWN", f"{name}: no manifest {reference[:140]}") from None
        return
    if digest or reference in (LATEST, f"v{row.number}"):
        problem = "is always the newest version" if reference == LATEST else "is a version, which cannot be removed alone"
        raise OciError(405, "UNSUPPORTED", f"{name}: {reference} {problem}. Remove a tag, or the whole repository")
    worker.registry.rm(Ref(name, tag=reference))
