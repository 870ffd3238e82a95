"""Open a proposal: a commit with `create_pr`, by an account that may read a repository; or an empty one, and commits to it.

A proposal of one commit passes the checks of a push at once, so that nobody else has to look at what could not be accepted. One
that a client sends in several commits need not pass them in between: its objection says what they find, as it says what the
policy does, since maintainers may add what is missing. Both decide again when it is accepted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.digest import Digest, sha256_bytes
from adapterhub.hub import commits, proposals, publishing, request_context
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import HEAD, PROPOSALS, Commit, View
from adapterhub.hub.hub import Hub
from adapterhub.hub.staged_files import StagedFiles
from adapterhub.hub.workers import Worker
from adapterhub.manifest.package_files import SIGNATURE, divide_names
from adapterhub.registry.moves import now
from adapterhub.registry.repository_documents import MAIN, CommitRecord, Proposal, Repository, commit_id, open_proposals
from adapterhub_converters.display import printable
from adapterhub_converters.errors import NotFoundError, RefusedError

from .commit_requests import Changes, Tree, check_history, document_size, has_same_files, read_changes, with_sizes
from .hf_errors import ResponseError
from .reading import name_of, path_part, visible_view
from .repositories import read_document

_MAX_OBJECTION = 1000  # characters


@asynccontextmanager
async def turn(hub: Hub, name: str, counted_name: str = "") -> AsyncIterator[None]:
    """Wait until no request, in whichever process of the hub, changes a proposal to a repository, and hold the turn.

    `counted_name` is as for `Hub.change`.
    """
    async with hub.change(name, counted_name), hub.locks.commit_turn(name):
        yield


@asynccontextmanager
async def turn_of_account(hub: Hub, account: str, name: str, counted_name: str) -> AsyncIterator[None]:
    """Hold the turn as `turn` does, for one proposal of an account at a time: many of them delay a push by one."""
    async with hub.locks.change(f"proposals of {account}"), turn(hub, name, counted_name):
        yield


def is_proposal(request: Request) -> bool:
    """Return whether a commit, or what prepares it, is to be proposed only."""
    is_asked = request.query_params.get("create_pr", "").lower() in ("1", "true")
    return is_asked or path_part(request, "revision").startswith(PROPOSALS)


async def identify_proposer(hub: Hub, request: Request) -> tuple[Identity, str]:
    """Return who asks and the repository of the path, if they may propose something: before the body is read."""
    identity, name = hub.identify(request), name_of(request)
    if identity is None:
        raise NoTokenError

    def check(worker: Worker) -> None:
        visible_view(worker, hub, identity, name)
        proposals.upload_name(hub.access, identity, name)

    await hub.workers.run(check)
    return identity, name


async def propose(hub: Hub, request: Request) -> Response:
    """POST …/commit/{rev}: propose a commit for `main` with `create_pr`, or add it to the open proposal `refs/pr/N`."""
    identity, name = await identify_proposer(hub, request)
    branch = path_part(request, "revision") or MAIN
    if branch != MAIN and not branch.startswith(PROPOSALS):
        raise RefusedError(f"{name}@{branch}", "is not main, which proposals are for", "Leave the revision out")
    number = branch.removeprefix(PROPOSALS) if branch != MAIN else ""
    counted_name = proposals.upload_name(hub.access, identity, name)
    async with _staging(hub, counted_name) as staged:
        changes = await read_changes(hub, request, name, staged)
        async with turn_of_account(hub, identity.account, name, counted_name):
            number, proposal = await hub.workers.run(_propose, hub, identity, name, changes, number=number)
    request_context.current().record_detail(proposal=number, state="opened" if branch == MAIN else "changed")
    url = f"{hub.url(request)}/{name}"
    answer = {"success": True, "commitUrl": f"{url}/commit/{proposal.commit}", "commitOid": proposal.commit, "hookOutput": ""}
    note = f"adapterhub; {proposal.objection}"
    headers = {"x-hf-warning": printable(note).encode("latin-1", "replace").decode("latin-1")} if proposal.objection else None
    return JSONResponse({**answer, "pullRequestUrl": f"{url}/discussions/{number}"}, headers=headers)


async def create(hub: Hub, request: Request) -> Response:
    """POST …/discussions: open an empty proposal, to which a client then commits."""
    identity, name = await identify_proposer(hub, request)
    fields = await read_document(request)
    if fields.get("pullRequest") is not True:
        raise ResponseError(501, "NotImplemented", "this hub has proposals (pull requests), and no discussions")
    title, description = (str(fields.get(key) or "")[:10_000] for key in ("title", "description"))
    counted_name = proposals.upload_name(hub.access, identity, name)
    async with _staging(hub, counted_name) as staged, turn_of_account(hub, identity.account, name, counted_name):
        work = partial(_propose, is_draft=True)
        number, _ = await hub.workers.run(work, hub, identity, name, Changes(staged, title, description))
    request_context.current().record_detail(proposal=number, state="opened")
    return JSONResponse({"num": int(number), "url": f"{hub.url(request)}/{name}/discussions/{number}", "pullRequest": True})


async def propose_files(
    hub: Hub,
    identity: Identity,
    name: str,
    title: str,
    files: Tree,
    *,
    texts: Mapping[str, bytes] | None = None,
    parent: str = "",
) -> tuple[str, Proposal]:
    """Propose files; return the proposal with its number.

    Args:
        hub: The hub.
        identity: The account that proposes them.
        name: The repository.
        title: What they change.
        files: Files that were uploaded for proposals.
        texts: Bytes of further files, by path.
        parent: The id of the commit that they change; empty for the newest.
    """
    counted_name = proposals.upload_name(hub.access, identity, name)
    async with _staging(hub, counted_name) as staged:
        inline = {path: await hub.workers.read(staged.add, raw) for path, raw in (texts or {}).items()}
        changes = Changes(staged, title, parent=parent, files={**files, **inline}, inline={*inline})
        async with turn_of_account(hub, identity.account, name, counted_name):
            number, proposal = await hub.workers.run(_propose, hub, identity, name, changes)
    request_context.current().record_detail(proposal=number, state="opened")
    return number, proposal


@asynccontextmanager
async def _staging(hub: Hub, counted_name: str) -> AsyncIterator[StagedFiles]:
    """Stage the files of a proposal for the block, which accepts them unless it fails."""
    staged = hub.stage_files(counted_name)
    try:
        yield staged
        await hub.workers.read(staged.accept)
    finally:
        await asyncio.shield(hub.workers.read(staged.close))


def _propose(
    worker: Worker,
    hub: Hub,
    identity: Identity,
    name: str,
    changes: Changes,
    *,
    number: str = "",
    is_draft: bool = False,
) -> tuple[str, Proposal]:
    """Propose changes; return the number of the proposal, which is an earlier one if the same was proposed already.

    Args:
        worker: The worker of this thread.
        hub: The hub.
        identity: The account that proposes them.
        name: The repository.
        changes: The changes.
        number: The open proposal that they are added to; empty for a new one.
        is_draft: Whether there are none yet.
    """
    view, store = visible_view(worker, hub, identity, name), worker.registry.store
    counted_name, staged = proposals.upload_name(hub.access, identity, name), changes.staged
    earlier = _own_proposal(hub, identity, view, number) if number else None
    start = _start(worker, view, earlier.commit if earlier else "", changes.parent)
    proposed_sizes = _proposed_sizes(worker, view, identity.account)

    def stored_size(digest: Digest) -> int | None:
        return proposed_sizes.get(digest) or hub.blob_size(worker, view, counted_name, digest)

    changes = with_sizes(changes, name, stored_size)
    applied = changes.apply_to(start.files)
    paths, _ = divide_names({*applied} - {SIGNATURE})
    tree: Tree = {path: applied[path] for path in paths}
    if has_same_files(tree, start.files) and not is_draft:
        if earlier:  # a commit that is sent again
            return number, earlier
        raise RefusedError(name, "the proposal changes no file of an adapter", "Change one")
    publishing.check_tree(tree, name)
    hub.policy_gate.check_weights_not_withdrawn(worker, identity, view, ((path, digest) for path, (digest, _) in tree.items()))
    base = commits.by_id(worker, view, _parent_of(worker, view, earlier)) if earlier else start
    title = earlier.title if earlier else changes.title.strip()[:200] or "Proposal"
    author = earlier.author if earlier else identity.account
    record = CommitRecord(tree, base.id, title, changes.description, author, now())
    for open_number, proposal in open_proposals(view.repository).items():
        if not (number or is_draft) and _has_same_content(worker, view, proposal, record):
            return open_number, proposal
    check_history(view, record)
    publishing.check_contents(store, {path: tree[path] for path in changes.files if path in tree}, name, staged.paths)
    objection = "" if is_draft else _objection(worker, hub, name, changes, tree, is_part=bool(number))
    raw = record.dump()
    proposal = Proposal(commit_id(sha256_bytes(raw)), author, title, record.time, objection[:_MAX_OBJECTION])
    if earlier:
        others = {*earlier.co_authors, identity.account} - {author}
        proposal = replace(proposal, opened=earlier.opened, co_authors=tuple(sorted(others)))
    added = dict(tree[path] for path in tree if tree[path] != base.files.get(path))
    number = _write(worker, hub, view, proposal, raw, added=added, staged=staged, number=number, replaced=earlier)
    # Its reservation counts instead.
    hub.uploaded.forget(counted_name, added)
    hub.quotas.recount(counted_name)
    return number, proposal


def _write(
    worker: Worker,
    hub: Hub,
    view: View,
    proposal: Proposal,
    raw: bytes,
    *,
    added: dict[Digest, int],
    staged: StagedFiles,
    number: str,
    replaced: Proposal | None,
) -> str:
    """Write a proposal with its room: the document `raw` of its commit, and its files; return its number.

    `number` and `replaced` are those of the open proposal that it takes the place of, if any.
    """
    name, store = view.name, worker.registry.store
    new = {digest: size for digest, size in added.items() if hub.blob_size(worker, view, name, digest, uploads=False) is None}
    earlier = worker.repositories.commit(view.repository or Repository(), replaced.commit) if replaced else None
    counted = dict(earlier.files.values()) if earlier else {}
    size = sum(size for digest, size in new.items() if digest not in counted)
    room = proposals.Room(name, proposal.commit, proposal.author, size + len(raw))
    limits = hub.access.namespace_settings(name.partition("/")[0])
    proposals.reserve(worker.database, limits, room, replaced=replaced.commit if replaced else "", number=number)
    try:
        hub.quotas.check(worker, name, new, count=True, except_uploads=[staged.upload])
        hub.quotas.check_record(worker, name, len(raw) + document_size(worker, name), except_uploads=[staged.upload])
        with store.lease("hub"):
            # Before those that are new: a blob whose time was renewed is not taken back.
            for digest, size in added.items():
                store.retain_if_present(digest, size)
            staged.adopt(added)
            store.put_bytes(raw)
            number = proposals.record(worker, name, number, proposal, sha256_bytes(raw), replaced=replaced)
    except BaseException:
        proposals.release(worker.database, name, proposal.commit)
        raise
    if replaced:
        proposals.release(worker.database, name, replaced.commit)
    proposals.settle(worker, hub.webhooks, name, proposal.commit)
    return number


def _objection(worker: Worker, hub: Hub, name: str, changes: Changes, tree: Tree, *, is_part: bool) -> str:
    """Return why a tree would not be accepted; of a part, also what the checks of a push find, which else is raised."""
    store, staged = worker.registry.store, changes.staged.paths
    if not publishing.is_whole(store, tree, staged):
        return ""
    try:
        return publishing.check_proposed(worker.registry, name, tree, policy=hub.settings.policy, staged=staged)
    except RefusedError as error:
        if not is_part:
            raise
        return str(error)


def _proposed_sizes(worker: Worker, view: View, account: str) -> dict[Digest, int]:
    """Return the files of the open proposals of an account, digest to bytes: a commit may be sent again."""
    open_ones = [proposal for proposal in open_proposals(view.repository).values() if proposal.author == account]
    records = (worker.repositories.commit(view.repository or Repository(), proposal.commit) for proposal in open_ones)
    return dict(file for record in records if record for file in record.files.values())


def _own_proposal(hub: Hub, identity: Identity, view: View, number: str) -> Proposal:
    """Return an open proposal, for its author and the writers of the repository."""
    proposal = view.repository.proposals.get(number) if view.repository else None
    if proposal is None or proposal.author != identity.account:
        hub.access.check_write(identity, view.name)
    return proposals.find_open(view, number)


def _parent_of(worker: Worker, view: View, proposal: Proposal) -> str:
    """Return the id of the commit that a proposal is about."""
    record = worker.repositories.commit(view.repository or Repository(), proposal.commit)
    return record.parent if record else ""


def _start(worker: Worker, view: View, proposed: str, parent: str) -> Commit:
    """Return the commit that changes apply to: that of the proposal they are added to, the one that they name, or `main`."""
    ident = proposed or parent
    if proposed and parent not in ("", proposed):
        raise ResponseError(412, "", f"{view.name}: the proposal has moved to {proposed}: commit to that again")
    try:
        # Its author could read what another account has proposed, and it would be about a commit that goes.
        if not proposed and ident in {proposal.commit for proposal in open_proposals(view.repository).values()}:
            raise NotFoundError(f"{view.name}@{ident}", "is proposed only")
        return commits.by_id(worker, view, ident) if ident else commits.find(worker, view, HEAD)
    except NotFoundError as error:
        raise ResponseError(412, "", f"{view.name} has no commit {ident[:40]}: propose it for main again") from error


def _has_same_content(worker: Worker, view: View, proposal: Proposal, record: CommitRecord) -> bool:
    """Return whether a proposal says the same as a commit, which was then sent again because its response was lost."""
    earlier = worker.repositories.commit(view.repository or Repository(), proposal.commit)
    fields = ("files", "parent", "title", "author")
    return earlier is not None and all(getattr(earlier, field) == getattr(record, field) for field in fields)
