"""Manifests in: one with the files of an adapter becomes a version, by the checks of a push; any other is kept as it is.

What a manifest names has to be in the same repository: what is in the store may be somebody else's. A new version moves
`latest`, as every push does, and gets the next number, which is a tag that nobody can move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub import commits, publishing
from adapterhub.hub.commits import View
from adapterhub.hub.hub import Hub
from adapterhub.hub.uploads import TooLargeError, collected
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MAX_MANIFEST
from adapterhub.ref import LATEST, Ref, parse_number
from adapterhub.registry.moves import check_protected
from adapterhub.registry.repositories import (
    OtherManifest,
    Repository,
    commit_id,
    with_head,
    with_manifest,
    without_manifest,
    without_tags,
)
from adapterhub.registry.versions import Version
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.errors import NotFoundError

from . import documents
from .answers import DIGEST, VERSION, OciError
from .documents import Document
from .reading import manifest, warning
from .references import check_open, check_tag, digest_of, known_as, parse_digest, remember, stored, writer_of

NUMBER = "adapterhub-version"
"""A header with the number of the version that a manifest is, like v3; none for one that is no adapter."""
_MOST_TAGS = 100  # of one request
_NOT_FOUND_BY_FACTS = "it has no adapter.json, so that it is found by its name only; adapterhub push and hf upload add one"


@dataclass(frozen=True)
class _Push:
    """A manifest that was sent: its bytes, their sha256, the digest that it was sent under, what it says, tags to move."""

    raw: bytes
    digest: Digest
    named: str
    document: Document
    tags: tuple[str, ...]


async def put(hub: Hub, request: Request) -> Response:
    """PUT /v2/{name}/manifests/{reference}; with `?tag=` tags for one that is put by its digest."""
    name, reference = writer_of(hub, hub.identify(request), request), str(request.path_params["reference"])
    asked = parse_digest(reference) if ":" in reference else ""
    more = tuple(dict.fromkeys(request.query_params.getlist("tag"))) if asked else ()
    tags = tuple(map(check_tag, more if asked else (reference,)))
    if len(tags) > _MOST_TAGS:
        raise OciError(400, "MANIFEST_INVALID", f"more than {_MOST_TAGS} tags")
    try:
        raw = await collected(request.stream(), MAX_MANIFEST)
    except TooLargeError as error:
        raise OciError(413, "SIZE_INVALID", f"{name}: a manifest has at most {MAX_MANIFEST:,} bytes") from error
    kind = request.headers.get("content-type", "")

    def parsed() -> _Push:
        named = digest_of(raw, asked)
        if asked and named != asked:
            raise OciError(400, "DIGEST_INVALID", f"{name}: received {named}, which is not {asked}")
        return _Push(raw, sha256_bytes(raw), named, documents.parse(raw, kind, name), tags)

    push = await hub.workers.read(parsed)
    async with hub.turn(name):
        version = await hub.workers.run(_put, hub, name, push)
    headers = {**VERSION, "location": f"/v2/{name}/manifests/{push.named}", DIGEST: push.named}
    if push.document.subject:
        headers["oci-subject"] = push.document.subject
    headers[NUMBER] = f"v{version.number}" if version else "none"
    if version and ADAPTER_JSON not in push.document.files:
        headers["warning"] = warning(f"{name}:v{version.number}: {_NOT_FOUND_BY_FACTS}")
    answer = Response(status_code=201, headers=headers)
    for tag in more:
        answer.headers.append("oci-tag", tag)
    return answer


def _put(worker: Worker, hub: Hub, name: str, push: _Push) -> Version | None:
    """Store a manifest; return the version that it is, None for one that is no adapter."""
    of = check_open(worker, name)
    remember(hub, push.named, push.digest)
    blobs = _checked(worker, hub, of, name, push.document)
    named = {path: (stored(hub, digest), size) for path, (digest, size) in push.document.files.items()}
    files = {path: file for path, file in named.items() if file[0] in blobs}
    # A manifest about another one is an attachment to it, whatever files it has.
    if not push.document.subject and publishing.is_adapter(worker.registry.store, files):
        return _publish(worker, hub, of, name, push)
    settled = hub.access.settled(name.partition("/")[0])
    publishing.check_attached(settled, name, attached=_is_attached(worker, hub, of, push.document))
    _keep(worker, of, name, push, blobs)
    return None


def _checked(worker: Worker, hub: Hub, of: View | None, name: str, document: Document) -> tuple[Digest, ...]:
    """The blobs and manifests that a manifest names and the repository has; OciError where it lacks one that is required."""
    blobs: dict[Digest, int | None] = {"": None}
    for one in document.references:
        digest = stored(hub, one.digest)
        if digest not in blobs:
            blobs[digest] = hub.has_blob(worker, of, name, digest)
        size = blobs[digest]
        if size is None and one.required:
            raise OciError(400, "MANIFEST_BLOB_UNKNOWN", f"{name}: {one.digest} was not uploaded to this repository")
        if size is not None and size != one.size and one.required:
            raise OciError(400, "SIZE_INVALID", f"{name}: {one.digest} has {size} bytes, not {one.size}")
    return tuple(digest for digest, size in blobs.items() if size is not None)


# ---- versions


def _publish(worker: Worker, hub: Hub, of: View | None, name: str, push: _Push) -> Version:
    """Make a manifest a version, or find that it is one, and move tags to it."""
    made = oci_manifest.parse(push.raw, name)
    there = queries.versions(worker.registry.index, name=name, digest=push.digest) if of and of.newest else []
    numbers = {tag: number for tag in push.tags if (number := parse_number(tag, f"{name}:{tag}"))}
    following = there[0].number if there else worker.registry.ledger.current(name).number + 1
    for tag, number in numbers.items():
        if number != following:
            what = f"this manifest is v{following}" if there else f"the next version is v{following}"
            raise OciError(409, "DENIED", f"{name}:{tag}: version numbers are given in turn and do not move; {what}")
    tags = tuple(tag for tag in push.tags if tag not in numbers)
    if there:  # it was checked when it came
        with worker.registry.store.lease("push"):
            version = worker.registry.admit(made, Ref(name), tags=tags)
    else:
        tags = tuple(dict.fromkeys((LATEST, *tags)))
        signatures = partial(publishing.attached_signatures, worker, name)
        version = publishing.publish_manifest(
            worker.registry, name, made, tags=tags, policy=hub.settings.policy, signatures=signatures
        )
    _follow(worker, name, version, (*tags, f"v{version.number}"))
    if numbers and version.number != following:
        raise OciError(409, "DENIED", f"{name}: another writer took v{following}; this manifest is v{version.number}")
    return version


def _follow(worker: Worker, name: str, version: Version, tags: Sequence[str]) -> None:
    """Have branches of the same names follow tags that were moved, and other manifests lose them."""
    state = worker.repositories.get(name)
    if state is None or not any(tag in state.heads or tag in state.tags for tag in tags):
        return
    after = commits.view(worker, name)

    def edit(state: Repository) -> Repository:
        for tag in tags:
            if tag in state.heads:
                state = with_head(state, tag, commit_id(version.digest), after=after.latest if after else "")
        return without_tags(state, tags)

    worker.repositories.change(name, edit)


# ---- other manifests


def _is_attached(worker: Worker, hub: Hub, of: View | None, document: Document) -> bool:
    """Whether a manifest is about one of the same repository."""
    try:
        return bool(document.subject and of and manifest(hub, worker, of, document.subject))
    except OciError:
        return False


def _keep(worker: Worker, of: View | None, name: str, push: _Push, blobs: tuple[Digest, ...]) -> None:
    """Keep a manifest that is no adapter, and move tags to it."""
    held = queries.tags(worker.registry.index, name) if of and of.newest else {}
    for tag in push.tags if held else ():
        if tag == LATEST or parse_number(tag, f"{name}:{tag}"):
            what = f"{name}:{tag} is a version of an adapter, and this manifest has no adapter_config.json and weights"
            raise OciError(400, "MANIFEST_INVALID", f"{what}. Push it to another tag, or to another name")
    moved = [tag for tag in push.tags if tag in held]
    check_protected(worker.registry.ledger, name, *moved)
    document = push.document
    other = OtherManifest(
        document.media_type, len(push.raw), document.artifact_type, document.subject, document.annotations, blobs
    )
    store = worker.registry.store
    with store.lease("push"):
        for digest in blobs:
            store.holds(digest, store.size(digest) or 0)
        store.put_bytes(push.raw)
        store.sync_blobs()
        tags = dict.fromkeys(push.tags, push.named)
        worker.repositories.change(name, lambda state: with_manifest(state, push.digest, other, tags))
    for tag in moved:  # it was the version's until now
        worker.registry.rm(Ref(name, tag=tag))


# ---- removal


async def delete(hub: Hub, request: Request) -> Response:
    """DELETE /v2/{name}/manifests/{reference}: a tag, or a manifest that is no version, with its tags."""
    name, reference = writer_of(hub, hub.identify(request), request), str(request.path_params["reference"])
    if ":" in reference:
        parse_digest(reference)
    async with hub.turn(name):
        await hub.workers.run(_delete, hub, name, reference)
    return Response(status_code=202, headers=VERSION)


def _delete(worker: Worker, hub: Hub, name: str, reference: str) -> None:
    of = check_open(worker, name)
    if of is None:
        raise OciError(404, "NAME_UNKNOWN", f"{name}: no such repository")
    state = of.repository or Repository()
    digest = stored(hub, reference) if ":" in reference else ""
    try:
        row = commits.row_of(worker, of, digest or reference)
    except NotFoundError:
        if digest in state.manifests:
            worker.repositories.change(name, lambda state: without_manifest(state, digest, known_as(hub, digest)))
        elif reference in state.tags:
            worker.repositories.change(name, lambda state: without_tags(state, (reference,)))
        else:
            raise OciError(404, "MANIFEST_UNKNOWN", f"{name}: no manifest {reference[:140]}") from None
        return
    if digest or reference in (LATEST, f"v{row.number}"):
        what = "is always the newest version" if reference == LATEST else "is a version, which cannot be removed alone"
        raise OciError(405, "UNSUPPORTED", f"{name}: {reference} {what}. Remove a tag, or the whole repository")
    worker.registry.rm(Ref(name, tag=reference))
