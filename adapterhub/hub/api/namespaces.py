"""Handlers that manage a namespace, for its admins: members, readers, quota, deploy keys, webhooks and publishers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.administration import integrations, namespace_admins, own_tokens
from adapterhub.hub.hf.reading import path_part
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase

from .account_requests import Fields, answer_change, answer_read, number_of
from .api_requests import is_set
from .own_account import token_options
from .request_fields import count_field, flag_field, mapping_field, text_field


def _namespace(request: Request) -> str:
    return accounts.check_namespace(path_part(request, "namespace"))


async def settings(hub: Hub, request: Request) -> Response:
    """GET …/namespaces/{namespace}: its settings, and the quota that it asks for."""
    namespace = _namespace(request)

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        check_admin(identity, namespace)
        requests = [asdict(quota) for quota in namespace_admins.quota_requests(database, namespace)]
        return {**asdict(accounts.namespace_settings(database, namespace)), "quota_request": next(iter(requests), None)}

    return await answer_read(hub, request, read)


async def change_settings(hub: Hub, request: Request) -> Response:
    """PATCH …/namespaces/{namespace}: who reads its public adapters, and which artifacts it takes."""
    namespace = _namespace(request)

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        readers = text_field(fields, "readers") if "readers" in fields else None
        only = flag_field(fields, "adapters_only")
        return asdict(namespace_admins.set_readers(database, identity, namespace, readers=readers, adapters_only=only))

    return await answer_change(hub, request, change, admin_of=namespace)


# ---- members


async def members(hub: Hub, request: Request) -> Response:
    """GET …/namespaces/{namespace}/members."""
    namespace = _namespace(request)

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        return {"members": [asdict(member) for member in namespace_admins.list_members(database, identity, namespace)]}

    return await answer_read(hub, request, read)


async def set_member(hub: Hub, request: Request) -> Response:
    """PUT …/namespaces/{namespace}/members/{account}."""
    namespace, account = _namespace(request), path_part(request, "account")

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        role = text_field(fields, "role")
        namespace_admins.set_member(database, identity, namespace, account, role, force=is_set(request, "force"))
        return {"namespace": namespace, "account": account, "role": role}

    return await answer_change(hub, request, change, admin_of=namespace)


async def remove_member(hub: Hub, request: Request) -> Response:
    """DELETE …/namespaces/{namespace}/members/{account}."""
    namespace, account = _namespace(request), path_part(request, "account")

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        namespace_admins.remove_member(database, identity, namespace, account, force=is_set(request, "force"))
        return {"removed": account, "kind": "member", "namespace": namespace}

    return await answer_change(hub, request, change, admin_of=namespace)


# ---- quota


async def set_quota(hub: Hub, request: Request) -> Response:
    """PUT …/namespaces/{namespace}/quota, for admins of the hub."""
    namespace = _namespace(request)

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        limits = count_field(fields, "max_bytes"), count_field(fields, "max_files")
        return asdict(namespace_admins.set_quota(database, identity, namespace, *limits))

    return await answer_change(hub, request, change, admin_of=EVERYWHERE)


async def request_quota(hub: Hub, request: Request) -> Response:
    """PUT …/namespaces/{namespace}/quota-request."""
    namespace = _namespace(request)

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        limits = {key: count_field(fields, key) for key in ("max_bytes", "max_files")}
        reason = text_field(fields, "reason", "")
        namespace_admins.request_quota(database, identity, namespace, **limits, reason=reason)
        return {"namespace": namespace, **limits}

    return await answer_change(hub, request, change, admin_of=namespace)


async def drop_quota_request(hub: Hub, request: Request) -> Response:
    """DELETE …/namespaces/{namespace}/quota-request: withdraw it, or as an admin of the hub refuse it."""
    namespace = _namespace(request)

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        namespace_admins.drop_quota_request(database, identity, namespace)
        return {"removed": namespace, "kind": "quota request"}

    return await answer_change(hub, request, change, admin_of=namespace)


# ---- deploy keys


async def deploy_keys(hub: Hub, request: Request) -> Response:
    """GET …/namespaces/{namespace}/deploy-keys."""
    namespace = _namespace(request)

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        return {"deploy_keys": [asdict(key) for key in own_tokens.deploy_keys(database, identity, namespace)]}

    return await answer_read(hub, request, read)


async def create_deploy_key(hub: Hub, request: Request) -> Response:
    """POST …/namespaces/{namespace}/deploy-keys: make one; the answer is the only one with the secret."""
    namespace = _namespace(request)

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        secret, key = own_tokens.create_deploy_key(database, identity, namespace, token_options(fields))
        return {**asdict(key), "token": secret}

    return await answer_change(hub, request, change, admin_of=namespace, status=201)


async def revoke_deploy_key(hub: Hub, request: Request) -> Response:
    """DELETE …/namespaces/{namespace}/deploy-keys/{ident}."""
    namespace, ident = _namespace(request), number_of(request)

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        own_tokens.revoke_deploy_key(database, identity, namespace, ident)
        return {"removed": ident, "kind": "token", "namespace": namespace}

    return await answer_change(hub, request, change, admin_of=namespace)


# ---- webhooks


async def webhooks(hub: Hub, request: Request) -> Response:
    """GET …/namespaces/{namespace}/webhooks: the webhooks, and the newest events for them."""
    namespace = _namespace(request)

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        hooks = [asdict(hook) for hook in integrations.list_webhooks(database, identity, namespace)]
        events = [asdict(event) for event in integrations.list_deliveries(database, identity, namespace)]
        return {"webhooks": hooks, "deliveries": events}

    return await answer_read(hub, request, read)


async def add_webhook(hub: Hub, request: Request) -> Response:
    """POST …/namespaces/{namespace}/webhooks: add one; the answer is the only one with the secret that signs its events."""
    namespace = _namespace(request)

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        url, private = text_field(fields, "url"), flag_field(fields, "private") or False
        ident, secret = integrations.add_webhook(database, identity, namespace, url, private=private)
        return {"id": ident, "namespace": namespace, "url": url, "private": private, "secret": secret}

    return await answer_change(hub, request, change, admin_of=namespace, status=201)


async def remove_webhook(hub: Hub, request: Request) -> Response:
    """DELETE …/namespaces/{namespace}/webhooks/{ident}."""
    namespace, ident = _namespace(request), number_of(request)

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        integrations.remove_webhook(database, identity, namespace, ident)
        return {"removed": ident, "kind": "webhook", "namespace": namespace}

    return await answer_change(hub, request, change, admin_of=namespace)


# ---- publishers


async def publishers(hub: Hub, request: Request) -> Response:
    """GET …/namespaces/{namespace}/publishers."""
    namespace = _namespace(request)

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        publishers = [asdict(publisher) for publisher in integrations.list_publishers(database, identity, namespace)]
        return {"publishers": publishers, "issuers": integrations.trusted_issuers(database)}

    return await answer_read(hub, request, read)


async def add_publisher(hub: Hub, request: Request) -> Response:
    """POST …/namespaces/{namespace}/publishers: trust CI jobs with certain claims."""
    namespace = _namespace(request)

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        scope, issuer = text_field(fields, "scope", namespace), text_field(fields, "issuer")
        claims = mapping_field(fields, "claims")
        ident = integrations.add_publisher(database, identity, namespace, scope=scope, issuer=issuer, claims=claims)
        return {"id": ident, "scope": scope, "issuer": issuer, "claims": claims}

    return await answer_change(hub, request, change, admin_of=namespace, status=201)


async def remove_publisher(hub: Hub, request: Request) -> Response:
    """DELETE …/namespaces/{namespace}/publishers/{ident}."""
    namespace, ident = _namespace(request), number_of(request)

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        integrations.remove_publisher(database, identity, namespace, ident)
        return {"removed": ident, "kind": "publisher", "namespace": namespace}

    return await answer_change(hub, request, change, admin_of=namespace)
