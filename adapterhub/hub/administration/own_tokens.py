"""Tokens that people make and revoke themselves, and the deploy keys of a namespace.

A token makes no other that may do more, or lasts longer, than itself: its role, namespaces and expiry limit the new one, which
ends with it. Only a session of somebody who signed in at a provider makes tokens that outlive it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from adapterhub.hub import request_context
from adapterhub.hub.access_control import ForbiddenError, NoTokenError, check_admin
from adapterhub.hub.accounts import access_tokens, accounts
from adapterhub.hub.accounts.access_tokens import DEPLOY, PERSONAL, SERVICE, Identity, Limits, Token
from adapterhub.hub.accounts.accounts import ROLES
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import is_name
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

MAX_TOKENS = 500
"""Tokens of an account that are not revoked."""
MAX_DAYS = 3660.0
_MAX_NAME = 100  # characters


@dataclass(frozen=True, slots=True)
class TokenOptions:
    """What a new token is for.

    Attributes:
        name: What its owner calls it.
        role: The highest role it can have, one of ROLES.
        namespaces: Namespaces or repositories it is limited to; empty for no limits but those of the token that makes it.
        days: Days until it expires; None for never, or with the token that makes it.
    """

    name: str
    role: str
    namespaces: Sequence[str] = ()
    days: float | None = None


@of_one_snapshot
def list_tokens(database: HubDatabase, identity: Identity | None) -> list[Token]:
    """Return the tokens that a client may see and revoke: all of its account; with a limited token, that and those it made."""
    if identity is None:
        raise NoTokenError
    tokens = access_tokens.list_tokens(database, account=identity.account)
    if identity.role == ROLES[-1] and not identity.namespaces:
        return tokens
    return [token for token in tokens if identity.token in (token.id, token.parent)]


def create_token(database: HubDatabase, identity: Identity | None, options: TokenOptions) -> tuple[str, Token]:
    """Make a token for the client's own account; return it, which is shown only once, and what lists show of it.

    Raises:
        ForbiddenError: It would be for more than the token that makes it.
        UsageError: An option is invalid, or it would expire later.
        RefusedError: The account has too many.
    """
    if identity is None:
        raise NoTokenError
    _check_options(options)
    if ROLES.index(options.role) > ROLES.index(identity.role):
        raise ForbiddenError(f"a token with the role {identity.role} makes none with the role {options.role}")
    namespaces = tuple(options.namespaces) or identity.namespaces
    for scope in options.namespaces:
        # A namespace that a token is limited to is this hub's own: nobody may claim one with a token of theirs.
        if not identity.role_in(scope):
            raise ForbiddenError(f"the token of {identity.account} has no role in {scope[:100]}, and makes none for it")
    request_context.current().record_change(identity.account)
    # Without roles of an account behind it, a service's token makes tokens of services.
    kind = SERVICE if identity.roles is None else PERSONAL
    return _issue(database, identity, options, namespaces, kind)


def revoke_token(database: HubDatabase, identity: Identity | None, ident: int) -> None:
    """Revoke one of the tokens that `list_tokens` returns; NotFoundError for any other."""
    with database.transaction():
        if ident not in [token.id for token in list_tokens(database, identity)]:
            raise _no_token(ident)
        access_tokens.revoke(database, ident)
    request_context.current().record_change(identity.account if identity else "")
    request_context.current().record_detail(token=ident)


# ---- deploy keys


def deploy_keys(database: HubDatabase, identity: Identity | None, namespace: str) -> list[Token]:
    """Return the deploy keys of a namespace, for its admins."""
    check_admin(identity, namespace)
    tokens = access_tokens.list_tokens(database, kind=DEPLOY)
    return [token for token in tokens if all(scope.partition("/")[0] == namespace for scope in token.namespaces)]


def create_deploy_key(
    database: HubDatabase, identity: Identity | None, namespace: str, options: TokenOptions
) -> tuple[str, Token]:
    """Make a token for programs that use a namespace, or some of its repositories.

    It keeps its role if its maker loses theirs, and ends with the account of its maker; errors as for `create_token`.
    """
    identity = check_admin(identity, namespace)
    _check_options(options)
    if options.role == ROLES[-1]:
        raise UsageError("role", "a deploy key reads or writes", "Choose read or write")
    scopes = tuple(options.namespaces) or (namespace,)
    if any(scope.partition("/")[0] != namespace for scope in scopes):
        raise ForbiddenError(f"a deploy key of {namespace[:100]} is for it, or for repositories in it")
    return _issue(database, identity, options, scopes, DEPLOY)


def revoke_deploy_key(database: HubDatabase, identity: Identity | None, namespace: str, ident: int) -> None:
    """Revoke a deploy key of a namespace. NotFoundError if it has none with this number."""
    with database.transaction():
        if ident not in [token.id for token in deploy_keys(database, identity, namespace)]:
            raise _no_token(ident)
        access_tokens.revoke(database, ident)
    request_context.current().record_detail(token=ident)


# ---- both


def _no_token(ident: int) -> NotFoundError:
    return NotFoundError(str(ident), "no such token", "List the tokens", code="no-such-number", kind="token")


def _check_options(options: TokenOptions) -> None:
    accounts.check_role(options.role)
    if not 0 < len(options.name.strip()) <= _MAX_NAME or not options.name.isprintable():
        raise UsageError("name", f"is not a text of 1 to {_MAX_NAME} characters", "Say what the token is for")
    if options.days is not None and not 0 < options.days <= MAX_DAYS:
        raise UsageError("days", f"{options.days} is not a number of days", f"Choose at most {MAX_DAYS:.0f}")
    if len(options.namespaces) > 100:
        raise UsageError("namespaces", "are more than 100")
    for scope in options.namespaces:
        if not is_name(scope):
            accounts.check_namespace(scope)


def _issue(
    database: HubDatabase, identity: Identity, options: TokenOptions, namespaces: tuple[str, ...], kind: str
) -> tuple[str, Token]:
    """Issue a token that ends no later than the token of `identity`."""
    with database.transaction():
        parent = access_tokens.parent_of(database, identity)
        lifetime = options.days * 86400 if options.days is not None else None
        if parent is not None and identity.expires is not None:
            remaining = identity.expires - time.time()
            if lifetime is not None and lifetime > remaining:
                problem = f"this token ends in {remaining / 86400:.1f} days, and so do those that it makes"
                raise UsageError("days", problem, "Ask for fewer days, or sign in")
            lifetime = min(lifetime or remaining, remaining)
        if len(access_tokens.list_tokens(database, account=identity.account)) >= MAX_TOKENS:
            raise RefusedError(identity.account, f"has {MAX_TOKENS} tokens", "Revoke those that are not used")
        limits = Limits(namespaces=namespaces, kind=kind, lifetime=lifetime, parent=parent, name=options.name.strip())
        secret, ident = access_tokens.issue(database, identity.account, options.role, **limits)
        tokens = access_tokens.list_tokens(database, account=identity.account)
    token = next(token for token in tokens if token.id == ident)
    scope = ",".join(namespaces) or "all"
    # The log has the prefix in each row of a change that is made with the token.
    details = {"prefix": token.prefix, "name": token.name, "role": token.role, "namespaces": scope, "days": options.days}
    request_context.current().record_detail(token=ident, **details)
    return secret, token
