"""Who asks, and what clients ask the Hub besides adapters."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.access import NoTokenError
from adapterhub.hub.hub import Hub
from adapterhub.hub.people.accounts import EVERYWHERE
from adapterhub.hub.people.tokens import Identity

from .answers import error
from .reading import found, name_of


async def whoami(hub: Hub, request: Request) -> Response:
    """GET /api/whoami-v2."""
    who = hub.identify(request)
    if who is None:
        raise NoTokenError
    token = {"displayName": f"{who.account}-{who.token}", "role": "read" if who.role == "read" else "write"}
    return JSONResponse(
        {
            "type": "user",
            "id": who.account,
            "name": who.account,
            "fullname": who.account,
            "canPay": False,
            "isPro": False,
            "orgs": [{"type": "org", "id": name, "name": name, "fullname": name} for name in _organizations(who)],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def _organizations(who: Identity) -> list[str]:
    """The namespaces that a token names or in which its account has a role."""
    named = who.namespaces or [name for name in who.roles or () if name not in (EVERYWHERE, who.account)]
    return [name for name in named if who.role_in(name)]


async def auth_check(hub: Hub, request: Request) -> Response:
    """GET …/auth-check: whether the client may read a repository."""
    who, name = hub.identify(request), name_of(request)
    await hub.workers.run(lambda worker: found(hub, worker, who, name))
    return JSONResponse({})


async def agent_harnesses(_hub: Hub, _request: Request) -> Response:
    """GET /api/agent-harnesses: asked at every command until something is answered, then remembered for a day."""
    return JSONResponse({"standardEnvVars": ["AGENT"], "harnesses": {}})


async def nothing(_hub: Hub, _request: Request) -> Response:
    """What is counted elsewhere, and not here."""
    return Response(status_code=204)


async def unknown(_hub: Hub, request: Request) -> Response:
    """What the Hugging Face Hub has and this hub has not."""
    return error(501, f"{request.url.path}: this hub has adapters, their versions and accounts; not this", "NotImplemented")
