"""Handlers of stars, which the API of the Hub calls likes."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import stars
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import source_name
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.stars import Star
from adapterhub.hub.workers import Worker

from .api_documents import time_of
from .reading import identify_reader, name_of, path_part, visible_view

_PAGE = 1000


def set_star(worker: Worker, hub: Hub, identity: Identity | None, name: str, *, given: bool) -> None:
    """Give the star of a client's account to a repository that it sees, or that of an alias, or take it away."""
    if identity is None:
        raise NoTokenError
    if given:
        stars.give(worker.database, source_name(visible_view(hub, worker, identity, name)), identity.account)
    else:  # also from one that it sees no more
        view = hub.visible(worker, identity, name)
        stars.take_away(worker.database, source_name(view) if view else name, identity.account)


async def like(hub: Hub, request: Request) -> Response:
    """POST and DELETE …/like."""
    identity, name = hub.identify(request), name_of(request)
    await hub.workers.run(set_star, hub, identity, name, given=request.method == "POST")
    return JSONResponse({})


async def liked(hub: Hub, request: Request) -> Response:
    """GET /api/users/{name}/likes: the repositories with a star of an account, as far as the client sees them, in pages."""
    identity, account = identify_reader(hub, request), path_part(request, "namespace").lower()
    given, headers = await _page(
        hub, request, lambda database, after: stars.stars_of_account(database, account, after=after, limit=_PAGE)
    )

    def visible(worker: Worker) -> list[Star]:
        return [star for star in given if hub.visible(worker, identity, star.name)]

    documents = [
        {"createdAt": time_of(star.time), "repo": {"name": star.name, "type": "model"}}
        for star in await hub.workers.run(visible)
    ]
    return JSONResponse(documents, headers=headers)


async def likers(hub: Hub, request: Request) -> Response:
    """GET …/likers: the accounts that have given a repository a star, in pages."""
    identity, name = hub.identify(request), name_of(request)
    await hub.workers.run(lambda worker: visible_view(hub, worker, identity, name))
    given, headers = await _page(
        hub, request, lambda database, after: stars.stars_of_name(database, name, after=after, limit=_PAGE)
    )
    documents = [
        {"_id": star.account, "user": star.account, "fullname": star.account, "avatarUrl": "", "type": "user"} for star in given
    ]
    return JSONResponse(documents, headers=headers)


async def _page(
    hub: Hub, request: Request, read: Callable[[HubDatabase, str], list[Star]]
) -> tuple[list[Star], dict[str, str]]:
    """Return a page of stars, and the header that leads to the next one."""
    given = await hub.workers.run(lambda worker: read(worker.database, request.query_params.get("cursor", "")))
    if len(given) < _PAGE:
        return given, {}
    last = given[-1].account if "repo" in request.path_params else given[-1].name
    return given, {"link": f'<{hub.url(request)}{request.url.path}?cursor={last}>; rel="next"'}
