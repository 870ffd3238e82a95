"""Handlers that write files: clients announce files before sending them, and a commit makes a tree of them.

A commit of a complete adapter becomes the next version, with the version's id; one that goes back to the content of an earlier
version has an id of its own, as that version has its commit already. Any other tree only moves the branch and has no number. A
commit that is sent again because its response was lost succeeds without another commit. One that does not name its parent waits
for those before it, in whichever process of the hub.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Collection
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub import commits, proposals, publishing
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import Commit, View
from adapterhub.hub.git_objects import is_lfs
from adapterhub.hub.hub import Hub
from adapterhub.hub.staged_files import StagedFiles
from adapterhub.hub.workers import Worker
from adapterhub.index.version_extract import indexed_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.package_files import SIGNATURE, check_file, check_names, divide_names
from adapterhub.ref import LATEST, Ref, is_tag
from adapterhub.registry.moves import ABSENT, now
from adapterhub.registry.repository_documents import MAIN, BranchHead, CommitRecord, Repository, commit_id, open_proposals
from adapterhub.registry.signature_policy import LIMIT
from adapterhub.registry.version_lookup import Version
from adapterhub_converters.containers.open_file import read_bytes
from adapterhub_converters.display import printable
from adapterhub_converters.errors import ConflictError, RefusedError, UsageError

from . import proposing
from .commit_requests import Changes, check_history, document_size, has_same_files, read_changes, with_sizes
from .hf_errors import ResponseError
from .reading import commit_at, path_part, visible_view
from .repositories import identify_writer, read_document

_MAX_FILE_LIST = 2 << 20  # bytes of a list of files to be sent
_DERIVED_BYTES = 8 << 10  # about those of the manifest, config, adapter.json and log entries of a version
_ATTEMPTS = 30  # of a commit: with each that fails, one of another process succeeds


async def preupload(hub: Hub, request: Request) -> Response:
    """POST …/preupload/{rev}: how each file is to be sent, or why it is refused."""
    is_proposal = proposing.is_proposal(request)
    identify = proposing.identify_proposer if is_proposal else identify_writer
    (identity, name), revision = await identify(hub, request), path_part(request, "revision")
    fields = await read_document(request, _MAX_FILE_LIST)
    files = fields.get("files")
    listed = [entry for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    paths = [str(entry.get("path", "")) for entry in listed]

    def work(worker: Worker) -> list[dict[str, Any]]:
        view = visible_view(worker, hub, identity, name)
        if not is_proposal:
            hub.access.check_write(identity, name)
        current_files = (
            commit_at(worker, view, revision).files if revision in {*commits.branches(view), MAIN} or is_proposal else {}
        )
        # A signature is no file of a version, but it is kept.
        ignored = set(divide_names({*paths, *current_files} - {SIGNATURE})[1])
        sizes = [entry.get("size") for path, entry in zip(paths, listed, strict=True) if path not in ignored]
        for counted_name in {name, proposals.upload_name(hub.access, identity, name)}:
            hub.quotas.check_sizes(worker, counted_name, [size for size in sizes if type(size) is int])
        answers = []
        for path, entry in zip(paths, listed, strict=True):
            size = entry["size"] if type(entry.get("size")) is int else 0
            if path not in ignored and path != SIGNATURE:
                _check_offered(hub, name, path, size, str(entry.get("sample", "")))
            mode = "lfs" if is_lfs(path, size) and size else "regular"
            oid = hub.git.file(path, *current_files[path]).oid if path in current_files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": oid})
        return answers

    return JSONResponse({"files": await hub.workers.run(work)})


def _check_offered(hub: Hub, name: str, path: str, size: int, sample: str) -> None:
    try:
        head = base64.b64decode(sample)
    except ValueError as error:
        raise UsageError(f"{name}: {path[:80]}", "the sample of its bytes is not base64") from error
    check_names([path], name)
    if head:
        check_file(path, head, name)
    if size > hub.settings.max_file:
        raise RefusedError(f"{name}: {path[:80]}", f"a file may have at most {hub.settings.max_file:,} bytes")


# ---- a commit


class MovedMeanwhileError(ResponseError):
    """Another process of the hub moved the branch while a commit to it was made."""


async def commit(hub: Hub, request: Request) -> Response:
    """POST …/commit/{rev}: one JSON document per line; with `create_pr`, it is only proposed."""
    if proposing.is_proposal(request):
        return await proposing.propose(hub, request)
    (identity, name), branch = await identify_writer(hub, request), path_part(request, "revision") or MAIN
    staged = hub.stage_files(name)
    try:
        changes = await read_changes(hub, request, name, staged)
        new_commit, notes = await commit_in_turn(hub, identity, f"{name}@{branch}", changes)
        await hub.workers.read(staged.accept)
    finally:
        await asyncio.shield(hub.workers.read(staged.close))
    url = f"{hub.url(request)}/{name}/commit/{new_commit.id}"
    answer = {"success": True, "commitUrl": url, "commitOid": new_commit.id, "hookOutput": ""}
    headers = (
        {"x-hf-warning": printable(f"adapterhub; {notes}").encode("latin-1", "replace").decode("latin-1")} if notes else None
    )
    return JSONResponse(answer, headers=headers)


async def commit_in_turn(hub: Hub, identity: Identity | None, address: str, changes: Changes) -> tuple[Commit, str]:
    """Commit to `name@branch`, again if another process of the hub moved it meanwhile; return the commit, and notes."""
    name, is_queued = address.partition("@")[0], False
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(hub.change(name))
        for _ in range(_ATTEMPTS):
            try:
                return await hub.workers.run(commit_changes, hub, identity, address, changes)
            except (ConflictError, MovedMeanwhileError) as error:
                conflict = error
            if not is_queued:  # from here on, the processes that lost take turns
                is_queued = True
                await stack.enter_async_context(hub.locks.commit_turn(name))
    raise conflict


def commit_changes(worker: Worker, hub: Hub, identity: Identity | None, address: str, changes: Changes) -> tuple[Commit, str]:
    """Commit to `name@branch`; return the commit, and notes for its author."""
    name, _, branch = address.partition("@")
    view = visible_view(worker, hub, identity, name)
    head = _head(worker, view, branch)
    sized_changes = with_sizes(changes, name, partial(hub.blob_size, worker, view, name))
    if changes.parent and changes.parent != head.id:
        parent = commits.by_id(worker, view, changes.parent)
        # A retry of a commit that succeeded: report that commit.
        if has_same_files(sized_changes.apply_to(parent.files), head.files):
            return head, ""
        raise ResponseError(412, "", f"{name}@{branch} has moved to {head.id} since {changes.parent}: commit to that again")
    tree = sized_changes.apply_to(head.files)
    # A version cannot contain the signature of itself: it is attached.
    signature = _sent_signature(worker, changes.staged, tree.pop(SIGNATURE, None))
    if has_same_files(tree, head.files):
        return head, _attach(worker, hub, name, head.row.digest if head.row else "", signature)
    paths, left_out = divide_names(tree)
    tree = {path: tree[path] for path in paths}
    publishing.check_tree(tree, name)
    # A commit could bring back what was withdrawn, with another card.
    hub.policy_gate.check_weights_not_withdrawn(worker, identity, view, ((path, digest) for path, (digest, _) in tree.items()))
    added = {tree[path][0]: tree[path][1] for path in sized_changes.files if path in tree}
    staged_upload = [changes.staged.upload]
    hub.quotas.check(worker, name, added, count=True, except_uploads=staged_upload)
    author = changes.author or (identity.account if identity else "")
    record = CommitRecord(tree, head.id, changes.title, changes.description, author, now())
    check_history(view, record)
    if not publishing.is_whole(worker.registry.store, tree, changes.staged.paths):
        new_files = {path: tree[path] for path in sized_changes.files if path in tree}
        publishing.check_contents(worker.registry.store, new_files, name, changes.staged.paths)
        # Before the files are blobs, which a refusal would leave to a gc.
        hub.quotas.check_record(worker, name, len(record.dump()) + document_size(worker, name), except_uploads=staged_upload)
        changes.staged.adopt(added)
        new_commit = _record_commit(worker, view, branch, record, has_room=True)
        return new_commit, "not a whole adapter yet, so that it has no version number"
    # Ask for all room before the version exists, so that a refused commit publishes nothing.
    records = len(record.dump()) + document_size(worker, name)
    indexed = sum(indexed_bytes(path, size) for path, (_, size) in tree.items())
    hub.quotas.check_record(worker, name, records + _DERIVED_BYTES + indexed, except_uploads=staged_upload)
    version = _publish(worker, hub, view, branch, record, staged=changes.staged, signature=signature)
    record = replace(record, became=version.digest)
    new_commit = _record_commit(worker, view, branch, record, has_room=True, is_first=version.new)
    notes = [f"{name}:v{version.number}" if version.new else f"has the content of {name}:v{version.number}"]
    notes += [f"left out: {', '.join(left_out[:6])}"] if left_out else []
    notes += list(filter(None, [_attach(worker, hub, name, version.digest, signature)]))
    return new_commit, "; ".join(notes)


def _sent_signature(worker: Worker, staged: StagedFiles, file: tuple[Digest, int] | None) -> bytes:
    """Return the signature that a commit brings; empty without one, or for one that is too large to be one."""
    if file is None or file[1] >= LIMIT:
        return b""
    digest, _ = file
    return read_bytes(staged.paths[digest]) if digest in staged.paths else worker.registry.store.read_document(digest)


def _attach(worker: Worker, hub: Hub, name: str, digest: Digest, signature: bytes) -> str:
    """Attach the signature of a commit to its version; return a note for its author if it is not about that."""
    if not signature:
        return ""
    if digest:
        hub.quotas.check(worker, name, {sha256_bytes(signature): len(signature)}, count=True)
        subject = oci_manifest.parse(worker.registry.store.read_document(digest), name)
        if publishing.attach_signature(worker, name, subject, signature):
            return ""
    return f"{SIGNATURE} is not about the files of this version, and was left out"


def _head(worker: Worker, view: View, branch: str) -> Commit:
    if branch not in commits.branches(view):
        if not is_tag(branch) or branch == LATEST or commits.has_tag(worker, view, branch):
            raise RefusedError(f"{view.name}@{branch}", "is not a branch", "Commit to main, or create a branch first")
        raise ResponseError(404, "RevisionNotFound", f"{view.name}@{branch}: no such branch")
    return commit_at(worker, view, branch)


def _publish(
    worker: Worker, hub: Hub, view: View, branch: str, record: CommitRecord, *, staged: StagedFiles, signature: bytes
) -> Version:
    tags = (LATEST,) if branch == MAIN else (branch,) if view.newest else (LATEST, branch)
    expect = (view.newest.digest if view.newest else ABSENT) if branch == MAIN else None
    options: dict[str, Any] = {"tags": tags, "expect": expect, "policy": hub.settings.policy, "message": record.title}

    def signatures(digest: Digest) -> list[bytes]:
        return [*publishing.attached_signatures(worker, view.name, digest), *filter(None, [signature])]

    options["signatures"] = signatures
    options |= {"staged": staged.paths, "adopt": partial(staged.adopt, [digest for digest, _ in record.files.values()])}
    return publishing.publish_tree(worker.registry, view.name, record.files, **options)


def _record_commit(
    worker: Worker,
    view: View,
    branch: str,
    record: CommitRecord,
    *,
    only: Collection[str] | None = None,
    has_room: bool = False,
    is_first: bool = False,
) -> Commit:
    """Record a commit and move its branch there.

    Args:
        worker: The worker of this thread.
        view: The repository.
        branch: The branch.
        record: The commit.
        only: The earlier commits to retain; None for all.
        has_room: Whether room for it was asked for.
        is_first: Whether it made the version that it became, and has that version's id.
    """
    raw = record.dump()
    document_digest = sha256_bytes(raw)
    ident = commit_id(record.became if is_first else document_digest)

    before = view.repository.heads if view.repository else {}

    def edit(state: Repository) -> Repository:
        moved = state.heads.get(branch) != before.get(branch) if only is None else state.heads != before
        # Another process of the hub moved the branch. A version on main is exempt: the log has already decided its order.
        if moved and not (record.became and branch == MAIN and only is None):
            raise MovedMeanwhileError(412, "", f"{view.name}@{branch} has moved meanwhile: commit again")
        retained = {key: digest for key, digest in state.commits.items() if only is None or key in only}
        all_commits = {**retained, ident: document_digest}
        if record.became and branch == MAIN:
            # A later version of another process may be `latest` by now: `main` stays with that.
            is_latest = only is not None or worker.registry.row(Ref(view.name)).digest == record.became
            head = BranchHead(ident, commit_id(record.became)) if is_latest else state.heads.get(MAIN)
        else:
            head = BranchHead(ident, view.latest)
        heads = {**state.heads, branch: head} if head else state.heads
        return replace(state, commits=all_commits, heads=heads)

    if not has_room:
        worker.repositories.check_size(view.name, len(raw))
    with worker.registry.store.lease("hub"):
        worker.registry.store.put_bytes(raw)
        worker.repositories.change(view.name, edit, has_room=has_room)
    after = commits.find_view(worker, view.name)
    return commits.by_id(worker, after or view, ident)


# ---- a squash


async def squash(hub: Hub, request: Request) -> Response:
    """POST …/super-squash/{b}: replace the commits of a branch by one; versions, and commits of other branches, stay."""
    (identity, name), branch = await identify_writer(hub, request), path_part(request, "branch")
    fields = await read_document(request)
    title = str(fields.get("message", ""))[:500]

    def work(worker: Worker) -> None:
        view = visible_view(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        head = commit_at(worker, view, branch)
        if branch not in commits.branches(view):
            raise UsageError(f"{name}@{branch}", "is not a branch", "Squash a branch")
        if view.repository and view.repository.commits:
            author, became = identity.account if identity else "", head.row.digest if head.row else ""
            record = CommitRecord(head.files, title=title, author=author, time=now(), became=became)
            # Never refused: a squash is what makes room.
            only = _commits_of_other_branches(worker, view.repository, branch)
            _record_commit(worker, view, branch, record, only=only, has_room=True)

    async with hub.change(name):
        await hub.workers.run(work)
    return JSONResponse({})


def _commits_of_other_branches(worker: Worker, repository: Repository, branch: str) -> set[str]:
    """Return the commits that branches other than `branch` are at or descend from, and those that are proposed."""
    reachable = {proposal.commit for proposal in open_proposals(repository).values()}
    for other_branch, head in repository.heads.items():
        ident = "" if other_branch == branch else head.commit
        while ident not in reachable and (record := worker.repositories.commit(repository, ident)):
            reachable.add(ident)
            ident = record.parent
    return reachable
