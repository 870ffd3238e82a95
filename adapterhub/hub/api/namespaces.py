"""Handlers that manage a namespace, for its admins: members, readers, quota, deploy keys, webhooks and publishers."""

from __future__ import annotations

from dataclasses import asdict

from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts import accounts
from adapterhub.hub.administration import integrations, namespace_admins, own_tokens

from .account_requests import (
    Call,
    Document,
    account_of,
    change_handler,
    hub_admin,
    namespace_admin,
    namespace_of,
    number_of,
    read_handler,
)
from .own_account import token_options
from .request_fields import count_field, flag_field, mapping_field, text_field


@read_handler(namespace_of)
def settings(call: Call, namespace: str) -> Document:
    """GET …/namespaces/{namespace}: its settings, and the quota that it asks for."""
    check_admin(call.identity, namespace)
    requests = [asdict(quota) for quota in namespace_admins.quota_requests(call.database, namespace)]
    return {**asdict(accounts.namespace_settings(call.database, namespace)), "quota_request": next(iter(requests), None)}


@change_handler(namespace_of, by=namespace_admin)
def change_settings(call: Call, namespace: str) -> Document:
    """PATCH …/namespaces/{namespace}: who reads its public adapters, and which artifacts it takes."""
    readers = text_field(call.fields, "readers") if "readers" in call.fields else None
    only = flag_field(call.fields, "adapters_only")
    return asdict(namespace_admins.set_readers(call.database, call.identity, namespace, readers=readers, adapters_only=only))


# ---- members


@read_handler(namespace_of)
def members(call: Call, namespace: str) -> Document:
    """GET …/namespaces/{namespace}/members."""
    return {"members": [asdict(member) for member in namespace_admins.list_members(call.database, call.identity, namespace)]}


@change_handler(namespace_of, account_of, by=namespace_admin)
def set_member(call: Call, namespace: str, account: str) -> Document:
    """PUT …/namespaces/{namespace}/members/{account}."""
    role = text_field(call.fields, "role")
    namespace_admins.set_member(call.database, call.identity, namespace, account, role, force=call.force)
    return {"namespace": namespace, "account": account, "role": role}


@change_handler(namespace_of, account_of, by=namespace_admin)
def remove_member(call: Call, namespace: str, account: str) -> Document:
    """DELETE …/namespaces/{namespace}/members/{account}."""
    namespace_admins.remove_member(call.database, call.identity, namespace, account, force=call.force)
    return {"removed": account, "kind": "member", "namespace": namespace}


# ---- quota


@change_handler(namespace_of, by=hub_admin)
def set_quota(call: Call, namespace: str) -> Document:
    """PUT …/namespaces/{namespace}/quota, for admins of the hub."""
    limits = count_field(call.fields, "max_bytes"), count_field(call.fields, "max_files")
    return asdict(namespace_admins.set_quota(call.database, call.identity, namespace, *limits))


@change_handler(namespace_of, by=namespace_admin)
def request_quota(call: Call, namespace: str) -> Document:
    """PUT …/namespaces/{namespace}/quota-request."""
    limits = {key: count_field(call.fields, key) for key in ("max_bytes", "max_files")}
    reason = text_field(call.fields, "reason", "")
    namespace_admins.request_quota(call.database, call.identity, namespace, **limits, reason=reason)
    return {"namespace": namespace, **limits}


@change_handler(namespace_of, by=namespace_admin)
def drop_quota_request(call: Call, namespace: str) -> Document:
    """DELETE …/namespaces/{namespace}/quota-request: withdraw it, or as an admin of the hub refuse it."""
    namespace_admins.drop_quota_request(call.database, call.identity, namespace)
    return {"removed": namespace, "kind": "quota request"}


# ---- deploy keys


@read_handler(namespace_of)
def deploy_keys(call: Call, namespace: str) -> Document:
    """GET …/namespaces/{namespace}/deploy-keys."""
    return {"deploy_keys": [asdict(key) for key in own_tokens.deploy_keys(call.database, call.identity, namespace)]}


@change_handler(namespace_of, by=namespace_admin, status=201)
def create_deploy_key(call: Call, namespace: str) -> Document:
    """POST …/namespaces/{namespace}/deploy-keys: make one; the answer is the only one with the secret."""
    secret, key = own_tokens.create_deploy_key(call.database, call.identity, namespace, token_options(call.fields))
    return {**asdict(key), "token": secret}


@change_handler(namespace_of, number_of, by=namespace_admin)
def revoke_deploy_key(call: Call, namespace: str, ident: int) -> Document:
    """DELETE …/namespaces/{namespace}/deploy-keys/{ident}."""
    own_tokens.revoke_deploy_key(call.database, call.identity, namespace, ident)
    return {"removed": ident, "kind": "token", "namespace": namespace}


# ---- webhooks


@read_handler(namespace_of)
def webhooks(call: Call, namespace: str) -> Document:
    """GET …/namespaces/{namespace}/webhooks: the webhooks, and the newest events for them."""
    hooks = [asdict(hook) for hook in integrations.list_webhooks(call.database, call.identity, namespace)]
    events = [asdict(event) for event in integrations.list_deliveries(call.database, call.identity, namespace)]
    return {"webhooks": hooks, "deliveries": events}


@change_handler(namespace_of, by=namespace_admin, status=201)
def add_webhook(call: Call, namespace: str) -> Document:
    """POST …/namespaces/{namespace}/webhooks: add one; the answer is the only one with the secret that signs its events."""
    url, private = text_field(call.fields, "url"), flag_field(call.fields, "private") or False
    ident, secret = integrations.add_webhook(call.database, call.identity, namespace, url, private=private)
    return {"id": ident, "namespace": namespace, "url": url, "private": private, "secret": secret}


@change_handler(namespace_of, number_of, by=namespace_admin)
def remove_webhook(call: Call, namespace: str, ident: int) -> Document:
    """DELETE …/namespaces/{namespace}/webhooks/{ident}."""
    integrations.remove_webhook(call.database, call.identity, namespace, ident)
    return {"removed": ident, "kind": "webhook", "namespace": namespace}


# ---- publishers


@read_handler(namespace_of)
def publishers(call: Call, namespace: str) -> Document:
    """GET …/namespaces/{namespace}/publishers."""
    publishers = [asdict(publisher) for publisher in integrations.list_publishers(call.database, call.identity, namespace)]
    return {"publishers": publishers, "issuers": integrations.trusted_issuers(call.database)}


@change_handler(namespace_of, by=namespace_admin, status=201)
def add_publisher(call: Call, namespace: str) -> Document:
    """POST …/namespaces/{namespace}/publishers: trust CI jobs with certain claims."""
    scope, issuer = text_field(call.fields, "scope", namespace), text_field(call.fields, "issuer")
    claims = mapping_field(call.fields, "claims")
    ident = integrations.add_publisher(call.database, call.identity, namespace, scope=scope, issuer=issuer, claims=claims)
    return {"id": ident, "scope": scope, "issuer": issuer, "claims": claims}


@change_handler(namespace_of, number_of, by=namespace_admin)
def remove_publisher(call: Call, namespace: str, ident: int) -> Document:
    """DELETE …/namespaces/{namespace}/publishers/{ident}."""
    integrations.remove_publisher(call.database, call.identity, namespace, ident)
    return {"removed": ident, "kind": "publisher", "namespace": namespace}
