"""The routes of Xet: a token with the address of the store, and uploads to that address.

Unknown addresses are 404, never 501: then a client that tries a newer protocol falls back to the older one.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from adapterhub.http_server.request_bodies import body_of
from adapterhub.hub import proposals
from adapterhub.hub.access_control import ForbiddenError, may_write
from adapterhub.hub.hf.hf_errors import ResponseError, endpoint_of, failure_response
from adapterhub.hub.hf.reading import name_of, visible_view
from adapterhub.hub.hub import Hub
from adapterhub.hub.quotas import proposal_scope
from adapterhub.hub.request_context import read_body, stream_body
from adapterhub.hub.signed_fields import signature, signed_purpose
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import AdapterhubError

from . import receiving, xet_formats

_LIFETIME = 3600  # seconds; clients ask again before the token expires
_WRITE, _PROPOSE = "xet", "xet for a proposal"  # what a token is for
_CAS = "/xet/{epoch}/{namespace}/{repo}"


async def write_token(hub: Hub, request: Request) -> Response:
    """GET …/xet-write-token/{rev}: where to send files of a repository, and the token for that."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> str:
        visible_view(worker, hub, identity, name)
        return receiving.epoch(hub, proposals.upload_name(hub.access, identity, name))

    epoch = await hub.workers.run(work)
    expires = int(time.time()) + _LIFETIME
    token_id = identity.token if identity else 0
    url = f"{hub.url(request)}/xet/{epoch}/{name}"
    purpose = _WRITE if may_write(identity, name) else _PROPOSE
    token = f"{expires}.{token_id}.{signature(hub.secret, purpose, epoch, name, expires, token_id)}"
    headers = {"x-xet-cas-url": url, "x-xet-access-token": token, "x-xet-token-expiration": str(expires)}
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


def _token_endpoint(work: Callable[[Hub, Request, str, str], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return the endpoint for requests with such a token, which ends with the one it was made for.

    Errors are 4xx, which a client does not retry.
    """

    async def endpoint(request: Request) -> Response:
        hub: Hub = request.app.state.hub
        epoch, name = request.path_params["epoch"], name_of(request)
        expires, _, rest = request.headers.get("authorization", "").partition(" ")[2].partition(".")
        token_id, _, sent = rest.partition(".")
        # The signature is checked first, so `expires` and `token_id` are numbers of ours.
        purpose = signed_purpose(hub.secret, sent, (_WRITE, _PROPOSE), epoch, name, expires, token_id)
        if not purpose:
            return JSONResponse({"error": "not a token of this store"}, 401)
        if int(expires) < time.time() or (identity := hub.access.identity_behind(int(token_id))) is None:
            return JSONResponse({"error": "the token has expired"}, 401)
        try:
            if purpose == _WRITE:
                hub.access.check_write(identity, name)
                return await work(hub, request, f"{epoch}/{name}", name)
            await hub.workers.run(lambda worker: visible_view(worker, hub, identity, name))
            return await work(hub, request, f"{epoch}/{name}", proposal_scope(identity.account, name))
        except (ForbiddenError, AdapterhubError, ResponseError) as error:
            return failure_response(error)

    return endpoint


async def _xorb(hub: Hub, request: Request, scope: str, name: str) -> Response:
    # Room for the headers of the chunks and the footer, beyond the chunks themselves.
    body = stream_body(request, xet_formats.MAX_XORB + (1 << 20))
    async with hub.uploads.hold(name, body, length=body_of(request).announced_size) as upload:
        new = await hub.workers.read(receiving.store_xorb, hub, scope, request.path_params["hash"], upload)
    return JSONResponse({"was_inserted": new})


async def _shard(hub: Hub, request: Request, scope: str, name: str) -> Response:
    raw = await read_body(request, xet_formats.MAX_SHARD)
    async with hub.locks.change(f"shards of {name.partition('/')[0]}"):  # one tenant must not occupy all threads
        await hub.workers.read(receiving.rebuild, hub, scope, name, raw)
    return JSONResponse({"result": 1})


async def _telemetry(_request: Request) -> Response:
    return JSONResponse({})


async def _unknown(_request: Request) -> Response:
    return JSONResponse({"error": "not here"}, 404)


def routes() -> list[BaseRoute]:
    """Return the routes, in the order in which they are tried."""
    methods: Any = ["GET", "HEAD", "POST", "PUT"]
    return [
        Route("/api/models/{namespace}/{repo}/xet-write-token/{revision}", endpoint_of(write_token)),
        Route(f"{_CAS}/v1/xorbs/default/{{hash}}", _token_endpoint(_xorb), methods=["POST"]),
        Route(f"{_CAS}/v1/shards", _token_endpoint(_shard), methods=["POST"]),
        Route(f"{_CAS}/v1/telemetry", _telemetry, methods=["POST"]),
        Route("/v1/telemetry", _telemetry, methods=["POST"]),
        Route("/xet/{path:path}", _unknown, methods=methods),
    ]
