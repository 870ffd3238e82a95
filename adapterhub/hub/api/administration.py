"""Handlers for the admins of a hub: accounts, tokens, rules for people who sign in, storage, and what was done."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.administration import hub_admins, namespace_admins
from adapterhub.hub.administration.storage_usage import storage_usage
from adapterhub.hub.hf.reading import query_number
from adapterhub.hub.hub import Hub
from adapterhub.hub.read_log import ReadPosition
from adapterhub.hub.workers import Worker

from .account_requests import Call, Document, account_of, change_handler, hub_admin, number_of, read_handler
from .request_fields import mapping_field, text_field

# ---- accounts


@read_handler()
def accounts(call: Call) -> Document:
    """GET …/accounts."""
    return {"accounts": [asdict(account) for account in hub_admins.list_accounts(call.database, call.identity)]}


@change_handler(by=hub_admin, status=201)
def invite(call: Call) -> Document:
    """POST …/accounts: add an account with roles; the answer is the only one with its first token."""
    account, roles = text_field(call.fields, "account"), mapping_field(call.fields, "roles")
    return {"account": account, "roles": roles, "token": hub_admins.invite(call.database, call.identity, account, roles)}


@change_handler(account_of, by=hub_admin)
def remove_account(call: Call, account: str) -> Document:
    """DELETE …/accounts/{account}."""
    hub_admins.remove_account(call.database, call.identity, account, force=call.force)
    return {"removed": account, "kind": "account"}


@change_handler(account_of, by=hub_admin)
def disable_account(call: Call, account: str) -> Document:
    """PUT or DELETE …/accounts/{account}/disabled."""
    disabled = call.request.method == "PUT"
    hub_admins.set_disabled(call.database, call.identity, account, disabled=disabled, force=call.force)
    return {"account": account, "disabled": disabled}


@change_handler(account_of, by=hub_admin)
def set_role(call: Call, account: str) -> Document:
    """PUT …/accounts/{account}/role: the role in every namespace."""
    role = text_field(call.fields, "role")
    namespace_admins.set_member(call.database, call.identity, EVERYWHERE, account, role, force=call.force)
    return {"account": account, "role": role}


@change_handler(account_of, by=hub_admin)
def remove_role(call: Call, account: str) -> Document:
    """DELETE …/accounts/{account}/role."""
    namespace_admins.remove_member(call.database, call.identity, EVERYWHERE, account, force=call.force)
    return {"removed": account, "kind": "member"}


# ---- tokens


@read_handler()
def tokens(call: Call) -> Document:
    """GET …/tokens: of all accounts."""
    return {"tokens": [asdict(token) for token in hub_admins.list_tokens(call.database, call.identity)]}


@change_handler(number_of, by=hub_admin)
def revoke_token(call: Call, ident: int) -> Document:
    """DELETE …/tokens/{ident}: of anybody."""
    hub_admins.revoke_token(call.database, call.identity, ident)
    return {"removed": ident, "kind": "token"}


# ---- rules for people who sign in


@read_handler()
def admissions(call: Call) -> Document:
    """GET …/admissions."""
    return {"admissions": [asdict(rule) for rule in hub_admins.list_admissions(call.database, call.identity)]}


@change_handler(by=hub_admin, status=201)
def add_admission(call: Call) -> Document:
    """POST …/admissions: admit people with certain claims, such as a group, and give them a role."""
    rule: dict[str, Any] = {"issuer": text_field(call.fields, "issuer"), "claims": mapping_field(call.fields, "claims")}
    rule |= {"namespace": text_field(call.fields, "namespace", EVERYWHERE), "role": text_field(call.fields, "role", "")}
    return {"id": hub_admins.add_admission(call.database, call.identity, **rule), **rule}


@change_handler(number_of, by=hub_admin)
def remove_admission(call: Call, ident: int) -> Document:
    """DELETE …/admissions/{ident}."""
    hub_admins.remove_admission(call.database, call.identity, ident)
    return {"removed": ident, "kind": "admission"}


# ---- what is stored, and what was done


async def storage(hub: Hub, request: Request) -> Response:
    """GET …/storage: what each namespace stores and may hold, the quotas asked for, and the disk."""
    identity = hub.identify(request)

    def work(worker: Worker) -> Document:
        usage = storage_usage(worker, identity, hub.namespace_totals)
        return {
            **asdict(usage),
            "quota_requests": [asdict(quota) for quota in namespace_admins.quota_requests(worker.database)],
        }

    return JSONResponse(await hub.workers.run(work), headers={"cache-control": "no-store"})


@read_handler()
def audit(call: Call) -> Document:
    """GET …/audit: the newest rows of the log, of a name or namespace (`name`), by an `account`, `before` a row."""
    params = call.request.query_params
    before, limit = query_number(call.request, "before"), query_number(call.request, "limit", 100)
    name, account = params.get("name", ""), params.get("account", "")
    rows = hub_admins.audit_events(call.database, call.identity, name=name, account=account, before=before, limit=limit)
    return {"events": [asdict(row) for row in rows]}


@read_handler()
def reads(call: Call) -> Document:
    """GET …/reads: who read which digest, the last first, of a name or namespace, by an `account`; `next` is for `before`."""
    params = call.request.query_params
    before, limit = ReadPosition.parse(params.get("before", "")), query_number(call.request, "limit", 100)
    name, account = params.get("name", ""), params.get("account", "")
    call.request.app.state.hub.read_log.write()
    rows = hub_admins.list_reads(call.database, call.identity, name=name, account=account, before=before, limit=limit)
    return {"reads": [asdict(row) for row in rows], "next": str(ReadPosition.of_row(rows[-1])) if rows else None}
