"""Handlers for the client's own account and its tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.administration import own_tokens
from adapterhub.hub.administration.own_tokens import TokenOptions
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase

from .account_requests import Fields, answer_change, answer_read, number_of
from .request_fields import number_field, text_field, texts_field


async def account(hub: Hub, request: Request) -> Response:
    """GET …/account: who asks, their roles by namespace, and the limits of the token."""

    def read(_database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        if identity is None:
            raise NoTokenError
        token = {"id": identity.token, "role": identity.role, "namespaces": identity.namespaces, "expires": identity.expires}
        return {
            "account": identity.account,
            "roles": dict(identity.roles) if identity.roles is not None else None,
            "token": token,
        }

    return await answer_read(hub, request, read)


async def tokens(hub: Hub, request: Request) -> Response:
    """GET …/account/tokens."""

    def read(database: HubDatabase, identity: Identity | None) -> dict[str, Any]:
        return {"tokens": [asdict(token) for token in own_tokens.list_tokens(database, identity)]}

    return await answer_read(hub, request, read)


async def create_token(hub: Hub, request: Request) -> Response:
    """POST …/account/tokens: make one; the answer is the only one with the secret."""

    def change(database: HubDatabase, identity: Identity | None, fields: Fields) -> dict[str, Any]:
        secret, token = own_tokens.create_token(database, identity, token_options(fields))
        return {**asdict(token), "token": secret}

    return await answer_change(hub, request, change, status=201)


def token_options(fields: Fields) -> TokenOptions:
    """Return the options of a new token from a document."""
    name, role = text_field(fields, "name"), text_field(fields, "role")
    return TokenOptions(name, role, texts_field(fields, "namespaces"), number_field(fields, "days"))


async def revoke_token(hub: Hub, request: Request) -> Response:
    """DELETE …/account/tokens/{ident}."""
    ident = number_of(request)

    def change(database: HubDatabase, identity: Identity | None, _fields: Fields) -> dict[str, Any]:
        own_tokens.revoke_token(database, identity, ident)
        return {"removed": ident, "kind": "token"}

    return await answer_change(hub, request, change)
