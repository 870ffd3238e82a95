"""The account of a token, and requests clients send to the Hub that are not about adapters."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.administration import profiles
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.workers import Worker
from adapterhub_converters.display import printable

from .hf_errors import error_response
from .reading import name_of, visible_view


async def whoami(hub: Hub, request: Request) -> Response:
    """GET /api/whoami-v2."""
    identity = hub.identify(request)
    if identity is None:
        raise NoTokenError
    profile = await hub.workers.run(lambda worker: profiles.find_profile(worker.database, identity.account))
    # Clients only distinguish read from write.
    token = {"displayName": f"{identity.account}-{identity.token}", "role": "read" if identity.role == "read" else "write"}
    return JSONResponse(
        {
            "type": "user",
            "id": identity.account,
            "name": identity.account,
            "fullname": profile.full_name or identity.account,
            "canPay": False,
            "isPro": False,
            "orgs": [{"type": "org", "id": name, "name": name, "fullname": name} for name in _organizations(identity)],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


def user_documents(database: HubDatabase, accounts: Sequence[str]) -> list[dict[str, str]]:
    """Return what lists show of a page of accounts."""
    profile_by_account = profiles.find_profiles(database, accounts)
    names = {account: profile.full_name for account, profile in profile_by_account.items()}
    same = {"avatarUrl": "", "type": "user"}
    return [{"_id": account, "user": account, "fullname": names.get(account) or account, **same} for account in accounts]


def _organizations(identity: Identity) -> list[str]:
    """Return the namespaces a token is limited to, or in which its account has a role."""
    candidates = identity.namespaces or [name for name in identity.roles or () if name not in (EVERYWHERE, identity.account)]
    return [name for name in candidates if identity.role_in(name)]


async def auth_check(hub: Hub, request: Request) -> Response:
    """GET …/auth-check: whether the client may read a repository and its files."""
    identity, name = hub.identify(request), name_of(request)

    def work(worker: Worker) -> None:
        visible_view(worker, hub, identity, name)
        hub.access.check_files(identity, name)

    await hub.workers.run(work)
    return JSONResponse({})


async def agent_harnesses(_hub: Hub, _request: Request) -> Response:
    """GET /api/agent-harnesses: clients ask with every command until they get an answer, which they then cache for a day."""
    return JSONResponse({"standardEnvVars": ["AGENT"], "harnesses": {}})


async def nothing(_hub: Hub, _request: Request) -> Response:
    """Accept telemetry that the Hugging Face Hub counts, and ignore it."""
    return Response(status_code=204)


async def git(hub: Hub, request: Request) -> Response:
    """GET …/info/refs: `git clone` and `git ls-remote`, which show a refusal in plain text."""
    name = name_of(request).removesuffix(".git")
    text = f"this hub does not speak git: download with `hf download {name}`, upload with `hf upload {name} FOLDER`"
    return PlainTextResponse(f"{printable(text)} (HF_ENDPOINT={hub.url(request)})\n", 501)


async def unknown(_hub: Hub, request: Request) -> Response:
    """Refuse anything of the Hugging Face Hub's API that this hub does not have."""
    return error_response(
        501, f"{request.url.path}: this hub has adapters, their versions and accounts; not this", "NotImplemented"
    )
