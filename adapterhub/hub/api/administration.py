"""Handlers for the admins of a hub: accounts, tokens, rules for people who sign in, storage and the audit log."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.administration import hub_admins, namespace_admins
from adapterhub.hub.administration.storage_usage import storage_usage
from adapterhub.hub.hf.reading import path_part, query_number
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.workers import Worker

from .account_requests import Fields, answer_change, answer_read, number_of
from .api_requests import is_set
from .request_fields import mapping_field, text_field

# ---- accounts


async def accounts(hub: Hub, request: Request) -> Response:
    """GET …/accounts."""

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        return {"accounts": [asdict(account) for account in hub_admins.list_accounts(database, identity)]}

    return await answer_read(hub, request, read)


async def invite(hub: Hub, request: Request) -> Response:
    """POST …/accounts: add an account with roles; the answer is the only one with its first token."""

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        account, roles = text_field(fields, "account"), mapping_field(fields, "roles")
        return {"account": account, "roles": roles, "token": hub_admins.invite(database, identity, account, roles)}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE, status=201)


async def remove_account(hub: Hub, request: Request) -> Response:
    """DELETE …/accounts/{account}."""
    account = path_part(request, "account")

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        hub_admins.remove_account(database, identity, account, force=is_set(request, "force"))
        return {"removed": account, "kind": "account"}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE)


async def disable_account(hub: Hub, request: Request) -> Response:
    """PUT or DELETE …/accounts/{account}/disabled."""
    account, disabled = path_part(request, "account"), request.method == "PUT"

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        hub_admins.set_disabled(database, identity, account, disabled=disabled, force=is_set(request, "force"))
        return {"account": account, "disabled": disabled}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE)


async def set_role(hub: Hub, request: Request) -> Response:
    """PUT …/accounts/{account}/role: the role in every namespace."""
    account = path_part(request, "account")

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        role = text_field(fields, "role")
        namespace_admins.set_member(database, identity, EVERYWHERE, account, role, force=is_set(request, "force"))
        return {"account": account, "role": role}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE)


async def remove_role(hub: Hub, request: Request) -> Response:
    """DELETE …/accounts/{account}/role."""
    account = path_part(request, "account")

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        namespace_admins.remove_member(database, identity, EVERYWHERE, account, force=is_set(request, "force"))
        return {"removed": account, "kind": "member"}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE)


# ---- tokens


async def tokens(hub: Hub, request: Request) -> Response:
    """GET …/tokens: of all accounts."""

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        return {"tokens": [asdict(token) for token in hub_admins.list_tokens(database, identity)]}

    return await answer_read(hub, request, read)


async def revoke_token(hub: Hub, request: Request) -> Response:
    """DELETE …/tokens/{ident}: of anybody."""
    ident = number_of(request)

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        hub_admins.revoke_token(database, identity, ident)
        return {"removed": ident, "kind": "token"}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE)


# ---- rules for people who sign in


async def admissions(hub: Hub, request: Request) -> Response:
    """GET …/admissions."""

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        return {"admissions": [asdict(rule) for rule in hub_admins.list_admissions(database, identity)]}

    return await answer_read(hub, request, read)


async def add_admission(hub: Hub, request: Request) -> Response:
    """POST …/admissions: admit people with certain claims, such as a group, and give them a role."""

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        rule: dict[str, Any] = {"issuer": text_field(fields, "issuer"), "claims": mapping_field(fields, "claims")}
        rule |= {"namespace": text_field(fields, "namespace", EVERYWHERE), "role": text_field(fields, "role", "")}
        return {"id": hub_admins.add_admission(database, identity, **rule), **rule}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE, status=201)


async def remove_admission(hub: Hub, request: Request) -> Response:
    """DELETE …/admissions/{ident}."""
    ident = number_of(request)

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        hub_admins.remove_admission(database, identity, ident)
        return {"removed": ident, "kind": "admission"}

    return await answer_change(hub, request, change, admin_of=EVERYWHERE)


# ---- what is stored, and what was done


async def storage(hub: Hub, request: Request) -> Response:
    """GET …/storage: what each namespace stores and may hold, the quotas asked for, and the disk."""
    identity = hub.identify(request)

    def work(worker: Worker) -> dict[str, Any]:
        usage = storage_usage(worker, identity, hub.settings.registry)
        return {
            **asdict(usage),
            "quota_requests": [asdict(quota) for quota in namespace_admins.quota_requests(worker.database)],
        }

    return JSONResponse(await hub.workers.run(work), headers={"cache-control": "no-store"})


async def audit(hub: Hub, request: Request) -> Response:
    """GET …/audit: the newest rows of the log, of a name or namespace (`name`), by an `account`, `before` a row."""
    params = request.query_params
    before, limit = query_number(request, "before"), query_number(request, "limit", 100)

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        name, account = params.get("name", ""), params.get("account", "")
        rows = hub_admins.audit_events(database, identity, name=name, account=account, before=before, limit=limit)
        return {"events": [asdict(row) for row in rows]}

    return await answer_read(hub, request, read)
