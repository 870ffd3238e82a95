"""Open a proposal: a commit with `create_pr`, by an account that may read a repository.

It passes the checks of a push at once, so that nobody else has to look at what could not be accepted. What the policy objects
to is kept with it, as maintainers may add what is missing; it is decided again when the proposal is accepted.
"""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import sha256_bytes
from adapterhub.hub import commits, proposals, publishing, request_context
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import HEAD, Commit, View
from adapterhub.hub.hub import Hub
from adapterhub.hub.workers import Worker
from adapterhub.manifest.package_files import SIGNATURE, divide_names
from adapterhub.registry.moves import now
from adapterhub.registry.repository_records import MAIN, CommitRecord, Proposal, Repository, commit_id, open_proposals
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.display import printable
from adapterhub_converters.errors import NotFoundError, RefusedError

from .commit_requests import Changes, Tree, check_history, document_size, has_same_files, read_changes, with_sizes
from .hf_errors import ResponseError
from .reading import name_of, path_part, visible_view

_MAX_OBJECTION = 1000  # characters


def is_proposal(request: Request) -> bool:
    """Return whether a commit, or what prepares it, is to be proposed only."""
    return request.query_params.get("create_pr", "").lower() in ("1", "true")


async def identify_proposer(hub: Hub, request: Request) -> tuple[Identity, str]:
    """Return who asks and the repository of the path, if they may propose something: before the body is read."""
    identity, name = hub.identify(request), name_of(request)
    if identity is None:
        raise NoTokenError

    def check(worker: Worker) -> None:
        visible_view(hub, worker, identity, name)
        proposals.upload_name(hub.access, identity, name)

    await hub.workers.run(check)
    return identity, name


async def propose(hub: Hub, request: Request) -> Response:
    """POST …/commit/{rev}?create_pr=1: propose a commit for `main`."""
    identity, name = await identify_proposer(hub, request)
    branch = path_part(request, "revision") or MAIN
    if branch != MAIN:
        raise RefusedError(f"{name}@{branch}", "is not main, which proposals are for", "Leave the revision out")
    staged = hub.stage_files(proposals.upload_name(hub.access, identity, name))
    try:
        changes = await read_changes(hub, request, name, staged)
        async with hub.change(name):
            number, proposal = await hub.workers.run(_open_proposal, hub, identity, name, changes)
        await hub.workers.read(staged.accept)
    finally:
        await asyncio.shield(hub.workers.read(staged.close))
    request_context.current().record_detail(proposal=number, state="opened")
    url = f"{hub.url(request)}/{name}"
    answer = {"success": True, "commitUrl": f"{url}/commit/{proposal.commit}", "commitOid": proposal.commit, "hookOutput": ""}
    note = f"adapterhub; {proposal.objection}"
    headers = {"x-hf-warning": printable(note).encode("latin-1", "replace").decode("latin-1")} if proposal.objection else None
    return JSONResponse({**answer, "pullRequestUrl": f"{url}/discussions/{number}"}, headers=headers)


def _open_proposal(worker: Worker, hub: Hub, identity: Identity, name: str, changes: Changes) -> tuple[str, Proposal]:
    """Propose changes; return the number of the proposal, which is an earlier one if the same was proposed already."""
    view, store = visible_view(hub, worker, identity, name), worker.registry.store
    counted_name, staged = proposals.upload_name(hub.access, identity, name), changes.staged
    parent = _parent(worker, view, changes.parent)
    changes = with_sizes(changes, name, partial(hub.blob_size, worker, view, counted_name))
    paths, _ = divide_names({*changes.apply_to(parent.files)} - {SIGNATURE})
    tree: Tree = {path: file for path, file in changes.apply_to(parent.files).items() if path in set(paths)}
    if has_same_files(tree, parent.files):
        raise RefusedError(name, "the proposal changes no file of an adapter", "Change one")
    publishing.check_tree(tree, name)
    for path in filter(is_weights, tree):
        hub.policy_gate.check_blob_not_withdrawn(worker, view, tree[path][0])
    title = changes.title.strip()[:200] or "Proposal"
    record = CommitRecord(tree, parent.id, title, changes.description, identity.account, now())
    for number, proposal in open_proposals(view.repository).items():
        if proposal.author == identity.account and _has_same_content(worker, view, proposal, record):
            return number, proposal
    check_history(view, record)
    objection = ""
    if publishing.is_whole(store, tree, staged.paths):
        objection = publishing.check_proposed(worker.registry, name, tree, policy=hub.settings.policy, staged=staged.paths)
    else:
        new_files = {path: tree[path] for path in changes.files if path in tree}
        publishing.check_contents(store, new_files, name, staged.paths)
    files = {tree[path][0]: tree[path][1] for path in changes.files if path in tree}
    new = {digest: size for digest, size in files.items() if hub.blob_size(worker, view, name, digest, uploads=False) is None}
    raw = record.dump()
    hub.quotas.check(worker, name, new, count=True, except_uploads=[staged.upload])
    hub.quotas.check_record(worker, name, len(raw) + document_size(worker, name), except_uploads=[staged.upload])
    proposal = Proposal(commit_id(sha256_bytes(raw)), identity.account, title, record.time, objection[:_MAX_OBJECTION])
    limits = hub.access.namespace_settings(name.partition("/")[0])
    size = sum(new.values()) + len(raw)
    proposals.reserve(worker.database, limits, name, proposal.commit, account=identity.account, size=size)
    try:
        with store.lease("hub"):
            staged.adopt(files)
            for digest, file_size in files.items():
                store.retain_if_present(digest, file_size)
            number = _record(worker, name, proposal, raw)
    except BaseException:
        proposals.release(worker.database, name, proposal.commit)
        raise
    proposals.settle(worker, hub.webhooks, name, proposal.commit)
    # Its reservation counts instead.
    hub.forget_uploads(counted_name, files)
    hub.quotas.recount(counted_name)
    return number, proposal


def _record(worker: Worker, name: str, proposal: Proposal, raw: bytes) -> str:
    """Write a proposal with its commit document `raw`; return its number."""
    number = ""

    def edit(state: Repository) -> Repository:
        nonlocal number
        opened = proposals.with_opened(state, proposal, sha256_bytes(raw))
        number = [*opened.proposals][-1]
        return opened

    worker.registry.store.put_bytes(raw)
    worker.repositories.change(name, edit, has_room=True)
    return number


def _parent(worker: Worker, view: View, ident: str) -> Commit:
    """Return the commit that a proposal is about: `main`, or the one that it names."""
    try:
        return commits.by_id(worker, view, ident) if ident else commits.find(worker, view, HEAD)
    except NotFoundError as error:
        raise ResponseError(412, "", f"{view.name} has no commit {ident[:40]}: propose it for main again") from error


def _has_same_content(worker: Worker, view: View, proposal: Proposal, record: CommitRecord) -> bool:
    """Return whether a proposal says the same as a commit, which was then sent again because its response was lost."""
    earlier = worker.repositories.commit(view.repository or Repository(), proposal.commit)
    return earlier is not None and (earlier.files, earlier.parent, earlier.title) == (record.files, record.parent, record.title)
