"""Repositories, branches and tags for those who write: created, moved, hidden and removed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import commits, moving, publishing, quotas
from adapterhub.hub.access import NoTokenError
from adapterhub.hub.commits import View
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.tokens import Identity
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.manifest import card as cards
from adapterhub.ref import LATEST, Ref, is_tag, parse_name
from adapterhub.registry import signatures
from adapterhub.registry.moves import check_protected, now
from adapterhub.registry.repositories import MAIN, Repository, with_head, without_head
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import ConflictError, NotFoundError, RefusedError, UsageError

from .answers import AnswerError, MovedError, no_such_repository
from .reading import at, body, found, name_of, part

_MAX_BODY = 2 << 20  # bytes


async def document(request: Request) -> dict[str, Any]:
    """The JSON object in the body of a request; an empty one without a body."""
    raw = await body(request, _MAX_BODY)
    return json_file.parse_object(raw, request.url.path) if raw.strip() else {}


def _named(fields: dict[str, Any], account: str) -> str:
    """The repository that a document names: `name`, or `organization` and `name`, or in the account's own namespace."""
    if fields.get("type") not in (None, "model"):
        raise AnswerError(501, "NotImplemented", f"this hub has adapters (type model), no {str(fields['type'])[:40]}s")
    name = str(fields.get("name", ""))
    if "/" not in name:
        name = f"{fields.get('organization') or account}/{name}"
    return parse_name(name.lower(), name)


def _is_private(fields: dict[str, Any]) -> bool:
    return fields.get("private") is True or fields.get("visibility") in ("private", "protected")


async def create(hub: Hub, request: Request) -> Response:
    """POST /api/repos/create; 409 with the same body for a repository that exists."""
    who, fields = hub.identify(request), await document(request)
    if who is None:
        raise NoTokenError
    name = _named(fields, who.account)
    hub.access.check_write(who, name)

    def work(worker: Worker) -> bool:
        if (of := commits.view(worker, name)) is not None:
            if not hub.access.may_read(who, name, of.repository):
                raise no_such_repository(name)
            return False
        if hub.settings.policy is not None:
            hub.settings.policy.check_name(name)
        if worker.registry.ledger.current(name).deleted:
            # Not a conflict, which clients that create what may exist pass over.
            raise RefusedError(name, "this name was removed", "Have it restored, or choose another name")
        worker.repositories.change(name, lambda _: Repository(private=_is_private(fields), created=now()))
        return True

    async with hub.turn(name):
        made = await hub.workers.run(work)
    return JSONResponse({"url": f"{hub.url(request)}/{name}", "name": name, "id": name}, 200 if made else 409)


async def delete(hub: Hub, request: Request) -> Response:
    """DELETE /api/repos/delete: the name and its versions are removed, and can be restored until a gc has run."""
    who, fields = hub.identify(request), await document(request)
    if who is None:
        raise NoTokenError
    name = _named(fields, who.account)

    def work(worker: Worker) -> None:
        of = found(hub, worker, who, name)
        hub.access.check_write(who, name)
        if of.newest:
            worker.registry.rm(Ref(name))
        if of.newest and of.repository and of.repository.private:
            # If the name is restored, it is as private as it was.
            worker.repositories.change(name, lambda state: Repository(private=True, created=state.created))
        else:
            worker.repositories.remove(name)

    async with hub.turn(name):
        await hub.workers.run(work)
    return JSONResponse({})


async def move(hub: Hub, request: Request) -> Response:
    """POST /api/repos/move: every version under another name; the old one leads there. Sent again, it finds itself done."""
    who, fields = hub.identify(request), await document(request)
    old, new = (parse_name(str(fields.get(key, "")).lower(), key) for key in ("fromRepo", "toRepo"))
    if old == new:
        raise ConflictError(new, "exists already", "Choose another name")
    async with hub.moving(old, new):
        await hub.workers.run(_move, hub, who, old, new)
    return JSONResponse({"url": f"{hub.url(request)}/{new}"})


def _move(worker: Worker, hub: Hub, who: Identity | None, old: str, new: str) -> None:
    try:
        of = found(hub, worker, who, old)
    except MovedError as moved:
        if moved.new == new:
            return
        raise ConflictError(old, f"was moved to {moved.new}", "Move that") from moved
    for name in (old, new):
        hub.access.check_write(who, name)
    begun = moving.begun(worker, old, new)  # by a process that was killed
    for names in begun:
        moving.finish(worker, *names)
    if begun:
        _move(worker, hub, who, old, new)
        return
    _check_move(worker, hub, of, new)
    moving.begin(worker, old, new)
    moving.finish(worker, old, new)


def _check_move(worker: Worker, hub: Hub, of: View, new: str) -> None:
    """Refuse a move before anything moves: to a name that is taken, or of what the new name would not have."""
    old, policy = of.name, hub.settings.policy
    if policy is not None:
        policy.check_name(new)
    if commits.view(worker, new) is not None:
        raise ConflictError(new, "exists already", "Choose another name")
    if worker.registry.ledger.current(new).deleted:
        raise RefusedError(new, "this name was removed", "Have it restored, or choose another name")
    check_protected(worker.registry.ledger, old, *queries.marks(worker.registry.index, "protect", old))
    if old.partition("/")[0] != new.partition("/")[0]:
        moving.check_attached(worker, of, new, hub.access.settled(new.partition("/")[0]))
        hub.quotas.check(worker, new, quotas.files(worker, old), take=True)
    for row in queries.versions(worker.registry.index, name=old):
        attached = partial(publishing.attached_signatures, worker, old, row.digest)
        signatures.check(policy, worker.manifest(row), attached, name=new, where=f"{old}:v{row.number}")


async def settings(hub: Hub, request: Request) -> Response:
    """PUT …/settings: who can see a repository."""
    who, name, fields = hub.identify(request), name_of(request), await document(request)
    if fields.get("gated"):
        raise AnswerError(501, "NotImplemented", "this hub has no gated repositories: make it private")

    def work(worker: Worker) -> None:
        found(hub, worker, who, name)
        hub.access.check_write(who, name)
        if "private" in fields or "visibility" in fields:
            worker.repositories.change(name, lambda state: replace(state, private=_is_private(fields)))

    await hub.workers.run(work)
    return JSONResponse({"private": _is_private(fields)})


# ---- branches and tags


async def create_branch(hub: Hub, request: Request) -> Response:
    """POST …/branch/{b}."""
    who, name, branch, fields = hub.identify(request), name_of(request), part(request, "branch"), await document(request)

    def work(worker: Worker) -> None:
        of = found(hub, worker, who, name)
        hub.access.check_write(who, name)
        _check_free(worker, of, branch)
        start = at(worker, of, str(fields.get("startingPoint") or MAIN))
        worker.repositories.change(name, lambda state: with_head(state, branch, start.id, after=of.latest))

    await hub.workers.run(work)
    return JSONResponse({})


async def delete_branch(hub: Hub, request: Request) -> Response:
    """DELETE …/branch/{b}."""
    who, name, branch = hub.identify(request), name_of(request), part(request, "branch")

    def work(worker: Worker) -> None:
        of = found(hub, worker, who, name)
        hub.access.check_write(who, name)
        if branch == MAIN:
            raise RefusedError(f"{name}@{branch}", "the main branch cannot be deleted")
        if branch not in commits.branches(of):
            raise NotFoundError(f"{name}@{branch}", "no such branch")
        worker.repositories.change(name, lambda state: without_head(state, branch))
        if of.newest and branch in queries.tags(worker.registry.index, name):
            worker.registry.rm(Ref(name, tag=branch))

    await hub.workers.run(work)
    return JSONResponse({})


def _check_free(worker: Worker, of: View, ref: str) -> None:
    if not is_tag(ref) or ref in (LATEST, commits.HEAD):
        raise UsageError(ref, "cannot be the name of a branch or a tag", "Use letters, digits and . _ -")
    if ref in {**commits.branches(of), **commits.tags(worker, of)}:
        raise ConflictError(f"{of.name}@{ref}", "exists already")


async def create_tag(hub: Hub, request: Request) -> Response:
    """POST …/tag/{rev}: a tag of the registry, at a version."""
    who, name, revision, fields = hub.identify(request), name_of(request), part(request, "revision"), await document(request)
    tag = str(fields.get("tag", ""))

    def work(worker: Worker) -> None:
        of = found(hub, worker, who, name)
        hub.access.check_write(who, name)
        _check_free(worker, of, tag)
        commit = at(worker, of, revision)
        if commit.row is None:
            raise RefusedError(
                f"{name}@{revision}", "is not a whole adapter, and only versions have tags", "Upload the rest first"
            )
        worker.registry.tag(Ref(name, number=commit.row.number), tag)

    await hub.workers.run(work)
    return JSONResponse({})


async def delete_tag(hub: Hub, request: Request) -> Response:
    """DELETE …/tag/{tag}."""
    who, name, tag = hub.identify(request), name_of(request), part(request, "revision")

    def work(worker: Worker) -> None:
        found(hub, worker, who, name)
        hub.access.check_write(who, name)
        worker.registry.rm(Ref.parse(f"{name}:{tag}"))

    await hub.workers.run(work)
    return JSONResponse({})


# ---- cards


async def validate_yaml(hub: Hub, request: Request) -> Response:
    """POST /api/validate-yaml: the front matter of a card, before anything is uploaded."""
    text = str((await document(request)).get("content", ""))
    errors, warnings = await hub.workers.read(_judged, text)
    answer = {"errors": [{"message": one} for one in errors], "warnings": [{"message": one} for one in warnings]}
    return Response(json.dumps(answer), 400 if errors else 200, media_type="application/json")


def _judged(text: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings about a card."""
    lines = text.lstrip("\ufeff").splitlines()
    if lines and lines[0].strip() == "---" and not any(line.strip() in ("---", "...") for line in lines[1:]):
        return ["the front matter has no end: write --- below it"], []
    card = cards.parse(text)
    return [], [f"{key} is not declared: {why}" for key, why in _WANTED.items() if not card.values(key)]


_WANTED = {"license": "others cannot know what they may do with it", "base_model": "nobody finds it by its base model"}
