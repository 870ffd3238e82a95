"""Handlers of stars, which the API of the Hub calls likes."""

from __future__ import annotations

from itertools import islice

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import stars
from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.commits import source_name
from adapterhub.hub.hub import Hub
from adapterhub.hub.stars import Star
from adapterhub.hub.workers import Worker

from .accounts import user_documents
from .api_documents import time_of
from .reading import identify_reader, name_of, path_part, visible_view

_PAGE = 1000


def set_star(worker: Worker, hub: Hub, identity: Identity | None, name: str, *, given: bool) -> None:
    """Give the star of a client's account to a repository that it sees, or that of an alias, or take it away."""
    if identity is None:
        raise NoTokenError
    if given:
        stars.give(worker.database, source_name(visible_view(worker, hub, identity, name)), identity.account)
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
    after = request.query_params.get("cursor", "")

    def work(worker: Worker) -> list[Star]:
        # Hidden names are left out first: a page may not end at one, which its address would tell.
        hidden = hub.hidden_names(worker, identity)
        rows = stars.stars_of_account(worker.database, account, after=after, limit=stars.MAX_STARS)
        shown = (star for star in rows if star.name not in hidden and hub.visible(worker, identity, star.name))
        return [*islice(shown, _PAGE + 1)]

    listed = await hub.workers.run(work)
    documents = [{"createdAt": time_of(star.time), "repo": {"name": star.name, "type": "model"}} for star in listed[:_PAGE]]
    return JSONResponse(documents, headers=_link(hub, request, [star.name for star in listed]))


async def likers(hub: Hub, request: Request) -> Response:
    """GET …/likers: the accounts that have given a repository, or that of an alias, a star, in pages."""
    identity, name = hub.identify(request), name_of(request)
    after = request.query_params.get("cursor", "")

    def work(worker: Worker) -> tuple[list[str], list[dict[str, str]]]:
        starred_name = source_name(visible_view(worker, hub, identity, name))
        listed = stars.stars_of_name(worker.database, starred_name, after=after, limit=_PAGE + 1)
        accounts = [star.account for star in listed]
        return accounts, user_documents(worker.database, accounts[:_PAGE])

    accounts, documents = await hub.workers.run(work)
    return JSONResponse(documents, headers=_link(hub, request, accounts))


def _link(hub: Hub, request: Request, listed: list[str]) -> dict[str, str]:
    """Return the header that leads to the next page, if more than a page is listed."""
    if len(listed) <= _PAGE:
        return {}
    return {"link": f'<{hub.url(request)}{request.url.path}?cursor={listed[_PAGE - 1]}>; rel="next"'}
