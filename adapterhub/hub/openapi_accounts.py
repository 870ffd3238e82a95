"""The operations of the hub's API about accounts, namespaces and the hub itself, as the OpenAPI document describes them."""

from __future__ import annotations

from collections.abc import Mapping

from .openapi_schemas import BOOLEAN, COUNT, JSON, LOGIN, TEXT, Operation, Schema, list_of, object_of

_PREFIX = "/api/adapterhub/v1"
_TOKENS, _SPACE = f"{_PREFIX}/account/tokens", f"{_PREFIX}/namespaces/{{namespace}}"
_ACCOUNTS, _ACCOUNT = f"{_PREFIX}/accounts", f"{_PREFIX}/accounts/{{account}}"
_ROLE: Schema = {"type": "string", "enum": ["read", "write", "admin"]}
_LIMIT: Schema = {"type": ["integer", "null"], "minimum": 1}
_CLAIMS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_ROLES: Schema = {"type": "object", "additionalProperties": _ROLE}
_DAYS: Schema = {"type": ["number", "null"], "exclusiveMinimum": 0}
_FORCE: Mapping[str, Schema] = {"force": BOOLEAN}
_NEW_TOKEN = object_of("name", "role", name=TEXT, role=_ROLE, namespaces=list_of(TEXT), days=_DAYS)
_QUOTA = object_of(max_bytes=_LIMIT, max_files=_LIMIT)
_READERS: Schema = {"type": "string", "enum": ["anyone", "accounts", "members"]}


def _shown(summary: str, query: Mapping[str, Schema] | None = None) -> Operation:
    """Return an operation that shows something to who may manage it."""
    return Operation(summary, errors=(403,), query=query or {}, needs=LOGIN)


def _changed(summary: str, body: Schema | None = None, query: Mapping[str, Schema] | None = None) -> Operation:
    """Return an operation that changes something."""
    errors = (403, 404, 409, 413, 507)
    return Operation(summary, errors=errors, query=query or {}, body={JSON: body} if body else {}, needs=LOGIN)


def _added(summary: str, body: Schema) -> Operation:
    """Return an operation that adds something."""
    return Operation(summary, {201: JSON}, (403, 404, 409, 413, 507), body={JSON: body}, needs=LOGIN)


OPERATIONS: Mapping[str, Operation] = {
    f"GET {_PREFIX}/account": _shown("Tell about the account and the token of the client"),
    f"PUT {_PREFIX}/account/profile": _changed(
        "Set what the client's account says of itself", object_of(full_name=TEXT, about=TEXT, link=TEXT)
    ),
    f"GET {_TOKENS}": _shown("List the client's tokens"),
    f"POST {_TOKENS}": _added("Make a token, which may do no more than the client's", _NEW_TOKEN),
    f"DELETE {_TOKENS}/{{ident}}": _changed("Revoke one of the client's tokens"),
    f"GET {_SPACE}": _shown("Tell the settings of a namespace"),
    f"PATCH {_SPACE}": _changed("Change settings of a namespace", object_of(readers=_READERS, adapters_only=BOOLEAN)),
    f"GET {_SPACE}/members": _shown("List the members of a namespace"),
    f"PUT {_SPACE}/members/{{account}}": _changed(
        "Give an account a role in a namespace", object_of("role", role=_ROLE), _FORCE
    ),
    f"DELETE {_SPACE}/members/{{account}}": _changed("Take an account's role in a namespace away", query=_FORCE),
    f"PUT {_SPACE}/quota": _changed("Set what a namespace may hold", _QUOTA),
    f"PUT {_SPACE}/quota-request": _changed(
        "Ask the admins of the hub for a quota", object_of(max_bytes=_LIMIT, max_files=_LIMIT, reason=TEXT)
    ),
    f"DELETE {_SPACE}/quota-request": _changed("Withdraw or refuse a request for a quota"),
    f"GET {_SPACE}/deploy-keys": _shown("List the deploy keys of a namespace"),
    f"POST {_SPACE}/deploy-keys": _added("Make a deploy key for a namespace", _NEW_TOKEN),
    f"DELETE {_SPACE}/deploy-keys/{{ident}}": _changed("Revoke a deploy key of a namespace"),
    f"GET {_SPACE}/webhooks": _shown("List the webhooks of a namespace, and the newest events"),
    f"POST {_SPACE}/webhooks": _added("Add a webhook", object_of("url", url=TEXT, private=BOOLEAN)),
    f"DELETE {_SPACE}/webhooks/{{ident}}": _changed("Remove a webhook"),
    f"GET {_SPACE}/publishers": _shown("List the trusted publishers of a namespace"),
    f"POST {_SPACE}/publishers": _added(
        "Trust the jobs of a CI provider", object_of("issuer", "claims", scope=TEXT, issuer=TEXT, claims=_CLAIMS)
    ),
    f"DELETE {_SPACE}/publishers/{{ident}}": _changed("Trust a publisher no longer"),
    f"GET {_ACCOUNTS}": _shown("List the accounts"),
    f"POST {_ACCOUNTS}": _added("Add an account, with its first token", object_of("account", account=TEXT, roles=_ROLES)),
    f"DELETE {_ACCOUNT}": _changed("Remove an account", query=_FORCE),
    f"PUT {_ACCOUNT}/disabled": _changed("Disable an account", query=_FORCE),
    f"DELETE {_ACCOUNT}/disabled": _changed("Enable an account"),
    f"PUT {_ACCOUNT}/role": _changed("Give an account a role in every namespace", object_of("role", role=_ROLE), _FORCE),
    f"DELETE {_ACCOUNT}/role": _changed("Take an account's role in every namespace away", query=_FORCE),
    f"GET {_PREFIX}/tokens": _shown("List the tokens of all accounts"),
    f"DELETE {_PREFIX}/tokens/{{ident}}": _changed("Revoke a token of anybody"),
    f"GET {_PREFIX}/admissions": _shown("List the rules for people who sign in"),
    f"POST {_PREFIX}/admissions": _added(
        "Admit people with certain claims, such as a group, and give them a role",
        object_of(
            "issuer", "claims", issuer=TEXT, claims=_CLAIMS, namespace=TEXT, role={**_ROLE, "enum": ["", *_ROLE["enum"]]}
        ),
    ),
    f"DELETE {_PREFIX}/admissions/{{ident}}": _changed("Remove a rule, and the roles that it gave"),
    f"GET {_PREFIX}/storage": _shown("Tell what each namespace stores and may hold"),
    f"GET {_PREFIX}/reads": _shown(
        "List who read which digest, the last reads first", {"name": TEXT, "account": TEXT, "before": TEXT, "limit": COUNT}
    ),
    f"GET {_PREFIX}/audit": _shown(
        "List rows of the audit log, newest first", {"name": TEXT, "account": TEXT, "before": COUNT, "limit": COUNT}
    ),
}
