"""Handlers that create, rename, hide and delete repositories, branches and tags."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import commits, gates, publishing, quotas, removals, renames, request_context
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import View
from adapterhub.hub.gates import Gate
from adapterhub.hub.hub import Hub
from adapterhub.hub.request_context import read_object
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.maintenance import name_moves
from adapterhub.manifest import card as cards
from adapterhub.ref import LATEST, Ref, is_tag, parse_name
from adapterhub.registry import signature_policy
from adapterhub.registry.moves import check_protected, now
from adapterhub.registry.repository_documents import MAIN, Repository, with_head, without_head
from adapterhub_converters.errors import ConflictError, NotFoundError, RefusedError, UsageError

from . import gating
from .hf_errors import MovedError, ResponseError, no_such_repository
from .reading import commit_at, name_of, path_part, visible_view

_MAX_BODY = 64 << 10  # bytes of a document with names and settings
_MAX_CARD = 2 << 20  # bytes of a document with a card


async def read_document(request: Request, limit: int = _MAX_BODY) -> dict[str, Any]:
    """Return the JSON object of at most `limit` bytes in the body of a request; an empty one without a body."""
    return await read_object(request, limit)


async def identify_writer(hub: Hub, request: Request) -> tuple[Identity | None, str]:
    """Return who asks and the repository of the path, if they may see it and write to it: before its body is read."""
    identity, name = hub.identify(request), name_of(request)
    await hub.workers.run(_check_writer, hub, identity, name)
    return identity, name


def _check_writer(worker: Worker, hub: Hub, identity: Identity | None, name: str) -> None:
    visible_view(worker, hub, identity, name)
    hub.access.check_write(identity, name)


def identify_account(hub: Hub, request: Request) -> Identity:
    """Return who asks, where the body names the repository; NoTokenError for a stranger, whose body is not read."""
    identity = hub.identify(request)
    if identity is None:
        raise NoTokenError
    return identity


def _repository_name(fields: dict[str, Any], account: str) -> str:
    """Return the repository a document names: `name`, `organization` and `name`, or a name in the account's own namespace."""
    if fields.get("type") not in (None, "model"):
        raise ResponseError(501, "NotImplemented", f"this hub has adapters (type model), no {str(fields['type'])[:40]}s")
    name = str(fields.get("name", ""))
    if "/" not in name:
        name = f"{fields.get('organization') or account}/{name}"
    return parse_name(name.lower(), name)


def _is_private(fields: dict[str, Any]) -> bool:
    return fields.get("private") is True or fields.get("visibility") in ("private", "protected")


async def create(hub: Hub, request: Request) -> Response:
    """POST /api/repos/create; 409 with the same body for a repository that exists."""
    identity, fields = identify_account(hub, request), await read_document(request)
    name = _repository_name(fields, identity.account)
    hub.access.check_write(identity, name)

    def work(worker: Worker) -> bool:
        if (view := commits.find_view(worker, name)) is not None:
            if not hub.access.may_read(identity, name, view.repository):
                raise no_such_repository(name)
            return False
        if hub.settings.policy is not None:
            hub.settings.policy.check_name(name)
        if worker.registry.ledger.current(name).deleted:
            # Not 409: clients with exist_ok ignore that.
            raise RefusedError(name, "this name was removed", "Ask the operator to restore it, or choose another name")
        worker.repositories.change(name, lambda _: Repository(private=_is_private(fields), created=now()))
        return True

    async with hub.change(name):
        is_new = await hub.workers.run(work)
    return JSONResponse({"url": f"{hub.url(request)}/{name}", "name": name, "id": name}, 200 if is_new else 409)


async def delete(hub: Hub, request: Request) -> Response:
    """DELETE /api/repos/delete: remove the name and its versions, which can be restored until a gc has run."""
    identity, fields = identify_account(hub, request), await read_document(request)
    name = _repository_name(fields, identity.account)

    def check(worker: Worker) -> View:
        view = visible_view(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        return view

    def work(worker: Worker) -> None:
        removals.remove(worker, check(worker), partial(hub.may_read_name, worker, identity))

    await hub.workers.run(check)  # before it makes others wait
    async with hub.change(name):
        await hub.workers.run(work)
    return JSONResponse({})


async def move(hub: Hub, request: Request) -> Response:
    """POST /api/repos/move: rename a repository; the old name redirects. Repeating a finished request succeeds."""
    identity, fields = identify_account(hub, request), await read_document(request)
    old, new = (parse_name(str(fields.get(key, "")).lower(), key) for key in ("fromRepo", "toRepo"))
    if old == new:
        raise ConflictError(new, "exists already", "Choose another name")
    await hub.workers.run(check_may_move, hub, identity, old, new)
    # Both names stay locked until the move is finished, so no push can slip in between.
    async with hub.locks.move(old, new):
        await hub.workers.run(move_repository, hub, identity, old, new)
    return JSONResponse({"url": f"{hub.url(request)}/{new}"})


def check_may_move(worker: Worker, hub: Hub, identity: Identity | None, old: str, new: str) -> None:
    """Refuse a client that does not see a repository or the one that it was moved to, or may not write to both names."""
    with suppress(MovedError):
        visible_view(worker, hub, identity, old)
    for name in (old, new):
        hub.access.check_write(identity, name)


def move_repository(worker: Worker, hub: Hub, identity: Identity | None, old: str, new: str) -> None:
    """Rename a repository, for who may write to both names; the caller holds `Hub.locks.move`."""
    try:
        view = visible_view(worker, hub, identity, old)
    except MovedError as moved:
        if moved.new == new:
            return
        raise ConflictError(old, f"was moved to {moved.new}", "Move that") from moved
    for name in (old, new):
        hub.access.check_write(identity, name)
    unfinished = renames.pending_moves(worker, old, new)  # left by a killed process
    for names in unfinished:
        renames.finish(worker, *names)
    if unfinished:
        move_repository(worker, hub, identity, old, new)
        return
    _check_move(worker, hub, identity, view, new)
    renames.begin(worker, old, new)
    renames.finish(worker, old, new)


def _check_move(worker: Worker, hub: Hub, identity: Identity | None, view: View, new: str) -> None:
    """Refuse a rename before anything moves: the new name is taken, or would not accept what the old one has."""
    old, policy = view.name, hub.settings.policy
    if policy is not None:
        policy.check_name(new)
    target = worker.repositories.get(new)
    # The redirect to this repository gives way: it is moved back.
    if target is None or target.moved_to != old:
        if commits.find_view(worker, new) is not None:
            raise ConflictError(new, "exists already", "Choose another name")
        if worker.registry.ledger.current(new).deleted:
            raise RefusedError(new, "this name was removed", "Ask the operator to restore it, or choose another name")
    check_protected(worker.registry.ledger, old, *queries.marks(worker.registry.index, "protect", old))
    tags = {*queries.tags(worker.registry.index, old), *(view.repository.heads if view.repository else ())}
    # To leave evidence behind takes an admin.
    is_admin = identity is not None and identity.has_role("admin", old)
    name_moves.check_requirements(worker.registry, old, tags, leaves_evidence=is_admin)
    if old.partition("/")[0] != new.partition("/")[0]:
        renames.check_attached(worker, view, new, hub.access.namespace_settings(new.partition("/")[0]))
        hub.quotas.check(worker, new, quotas.repository_files(worker, old), count=True)
    for row in queries.versions(worker.registry.index, name=old):
        attached = partial(publishing.attached_signatures, worker, old, row.digest)
        signature_policy.check(policy, worker.manifest(row), attached, name=new, location=f"{old}:v{row.number}")


async def settings(hub: Hub, request: Request) -> Response:
    """PUT …/settings: who can see a repository, and whether it is gated."""
    (identity, name), fields = await identify_writer(hub, request), await read_document(request)
    if (mode := fields.get("gated")) is not None:
        await hub.workers.run(_set_mode, hub, identity, name, mode)
    if "private" in fields or "visibility" in fields:
        await hub.workers.run(set_private, hub, identity, name, private=_is_private(fields))
    return JSONResponse({"private": _is_private(fields)})


def _set_mode(worker: Worker, hub: Hub, identity: Identity | None, name: str, mode: object) -> None:
    """Gate a repository with the terms that it has, or no longer with False."""
    gate = gates.find_gate(worker.database, name) or Gate(gates.AUTO)
    request_context.current().record_detail(gated=mode)
    gating.set_gate(worker, hub, identity, name, replace(gate, mode=str(mode)) if mode else None)


def set_private(worker: Worker, hub: Hub, identity: Identity | None, name: str, *, private: bool) -> None:
    """Set whether only accounts with a role see a repository, for who may write to it."""
    visible_view(worker, hub, identity, name)
    hub.access.check_write(identity, name)
    worker.repositories.change(name, lambda state: replace(state, private=private))


# ---- branches and tags


async def create_branch(hub: Hub, request: Request) -> Response:
    """POST …/branch/{b}."""
    (identity, name), branch = await identify_writer(hub, request), path_part(request, "branch")
    fields = await read_document(request)

    def work(worker: Worker) -> None:
        view = visible_view(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        _check_free(worker, view, branch)
        start = commit_at(worker, view, str(fields.get("startingPoint") or MAIN))
        if start.row and worker.registry.gate.rules(branch):
            # Decided as every move of the tag is; the branch then follows it.
            worker.registry.tag(Ref(name, number=start.row.number), branch)
        worker.repositories.change(name, lambda state: with_head(state, branch, start.id, after=view.latest))

    await hub.workers.run(work)
    return JSONResponse({})


async def delete_branch(hub: Hub, request: Request) -> Response:
    """DELETE …/branch/{b}."""
    identity, name, branch = hub.identify(request), name_of(request), path_part(request, "branch")

    def work(worker: Worker) -> None:
        view = visible_view(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        if branch == MAIN:
            raise RefusedError(f"{name}@{branch}", "the main branch cannot be deleted")
        if branch not in commits.branches(view):
            raise NotFoundError(f"{name}@{branch}", "no such branch")
        worker.repositories.change(name, lambda state: without_head(state, branch))
        if view.newest and branch in queries.tags(worker.registry.index, name):
            worker.registry.rm(Ref(name, tag=branch))

    await hub.workers.run(work)
    return JSONResponse({})


def _check_free(worker: Worker, view: View, ref: str) -> None:
    if not is_tag(ref) or ref in (LATEST, commits.HEAD):
        raise UsageError(ref, "cannot be the name of a branch or a tag", "Use letters, digits and . _ -")
    if ref in commits.branches(view) or commits.has_tag(worker, view, ref):
        raise ConflictError(f"{view.name}@{ref}", "exists already")


async def create_tag(hub: Hub, request: Request) -> Response:
    """POST …/tag/{rev}: tag a version in the registry."""
    (identity, name), revision = await identify_writer(hub, request), path_part(request, "revision")
    fields = await read_document(request)
    tag = str(fields.get("tag", ""))

    def work(worker: Worker) -> None:
        view = visible_view(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        _check_free(worker, view, tag)
        commit = commit_at(worker, view, revision)
        if commit.row is None:
            raise RefusedError(
                f"{name}@{revision}", "is not a whole adapter, and only versions have tags", "Upload the rest first"
            )
        worker.registry.tag(Ref(name, number=commit.row.number), tag)

    await hub.workers.run(work)
    return JSONResponse({})


async def delete_tag(hub: Hub, request: Request) -> Response:
    """DELETE …/tag/{tag}."""
    identity, name, tag = hub.identify(request), name_of(request), path_part(request, "revision")

    def work(worker: Worker) -> None:
        visible_view(worker, hub, identity, name)
        hub.access.check_write(identity, name)
        worker.registry.rm(Ref.parse(f"{name}:{tag}"))

    await hub.workers.run(work)
    return JSONResponse({})


# ---- cards


async def validate_yaml(hub: Hub, request: Request) -> Response:
    """POST /api/validate-yaml: check the front matter of a card before anything is uploaded."""
    if hub.identify(request) is None and hub.access.require_login:
        raise NoTokenError
    text = str((await read_document(request, _MAX_CARD)).get("content", ""))
    errors, warnings = await hub.workers.read(_check_card, text)
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return Response(json.dumps(answer), 400 if errors else 200, media_type="application/json")


def _check_card(text: str) -> tuple[list[str], list[str]]:
    """Return the errors and warnings about a card."""
    lines = text.lstrip("\ufeff").splitlines()
    if lines and lines[0].strip() == "---" and not any(line.strip() in ("---", "...") for line in lines[1:]):
        return ["the front matter has no end: write --- below it"], []
    card = cards.parse(text)
    return [], [f"{key} is not declared: {reason}" for key, reason in _RECOMMENDED.items() if not card.values(key)]


_RECOMMENDED = {"license": "others cannot know what they may do with it", "base_model": "nobody finds it by its base model"}
