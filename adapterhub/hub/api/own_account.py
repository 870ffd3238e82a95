"""Handlers for the client's own account: its profile and its tokens."""

from __future__ import annotations

from dataclasses import asdict

from adapterhub.hub.access_control import NoTokenError
from adapterhub.hub.administration import own_tokens, profiles
from adapterhub.hub.administration.own_tokens import TokenOptions
from adapterhub.hub.administration.profiles import Profile

from .account_requests import Call, Document, Fields, change_handler, number_of, read_handler
from .request_fields import number_field, text_field, texts_field


@read_handler()
def account(call: Call) -> Document:
    """GET …/account: who asks, their profile, their roles by namespace, and the limits of the token."""
    identity = call.identity
    if identity is None:
        raise NoTokenError
    token = {"id": identity.token, "role": identity.role, "namespaces": identity.namespaces, "expires": identity.expires}
    roles = dict(identity.roles) if identity.roles is not None else None
    profile = asdict(profiles.find_profile(call.database, identity.account))
    return {"account": identity.account, "profile": profile, "roles": roles, "token": token}


@change_handler()
def set_profile(call: Call) -> Document:
    """PUT …/account/profile: what is missing is empty from now on."""
    profile = Profile(*(text_field(call.fields, key, "").strip() for key in ("full_name", "about", "link")))
    profiles.set_profile(call.database, call.identity, profile)
    return asdict(profile)


@read_handler()
def tokens(call: Call) -> Document:
    """GET …/account/tokens."""
    return {"tokens": [asdict(token) for token in own_tokens.list_tokens(call.database, call.identity)]}


@change_handler(status=201)
def create_token(call: Call) -> Document:
    """POST …/account/tokens: make one; the answer is the only one with the secret."""
    secret, token = own_tokens.create_token(call.database, call.identity, token_options(call.fields))
    return {**asdict(token), "token": secret}


def token_options(fields: Fields) -> TokenOptions:
    """Return the options of a new token from a document."""
    name, role = text_field(fields, "name"), text_field(fields, "role")
    return TokenOptions(name, role, texts_field(fields, "namespaces"), number_field(fields, "days"))


@change_handler(number_of)
def revoke_token(call: Call, ident: int) -> Document:
    """DELETE …/account/tokens/{ident}."""
    own_tokens.revoke_token(call.database, call.identity, ident)
    return {"removed": ident, "kind": "token"}
