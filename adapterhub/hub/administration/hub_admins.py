"""What admins of the hub manage: accounts and their tokens, rules for people who sign in, and the logs of changes and reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapterhub.hub import read_log, request_context
from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts import access_tokens, accounts, admissions, audit_log, id_tokens
from adapterhub.hub.accounts.access_tokens import Identity, Limits, Token
from adapterhub.hub.accounts.accounts import EVERYWHERE, ROLES, Account
from adapterhub.hub.accounts.admissions import Admission
from adapterhub.hub.accounts.audit_log import Event
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.read_log import Read, ReadPosition

_MAX_ROWS = 1000  # of the audit log in one answer


# ---- accounts


def list_accounts(database: HubDatabase, identity: Identity | None) -> list[Account]:
    """Return the accounts with their roles."""
    check_admin(identity, EVERYWHERE)
    return accounts.list_accounts(database)


def invite(database: HubDatabase, identity: Identity | None, account: str, roles: Mapping[str, str]) -> str:
    """Add an account with roles by namespace; return its first token, which is shown only once.

    The token may do what the account may; the account makes its own tokens with it, which end with it, and logs in on the
    pages. ConflictError if there is such an account.
    """
    check_admin(identity, EVERYWHERE)
    for namespace, role in roles.items():
        accounts.check_role(role)
        if namespace != EVERYWHERE:
            accounts.check_namespace(namespace)
    accounts.add(database, account)
    for namespace, role in roles.items():
        accounts.set_member(database, namespace, account, role)
    request_context.current().record_change(account)
    request_context.current().record_detail(**roles)
    limits = Limits(kind=access_tokens.PERSONAL, name="invitation")
    return access_tokens.create(database, account, ROLES[-1], **limits)


def set_disabled(
    database: HubDatabase, identity: Identity | None, account: str, *, disabled: bool, force: bool = False
) -> None:
    """Disable an account, with its tokens and sessions, or enable it; errors as for `accounts.set_disabled`."""
    check_admin(identity, EVERYWHERE)
    accounts.set_disabled(database, account, disabled=disabled, force=force)
    request_context.current().record_change(account)


def remove_account(database: HubDatabase, identity: Identity | None, account: str, *, force: bool = False) -> None:
    """Remove an account; errors as for `accounts.remove`."""
    check_admin(identity, EVERYWHERE)
    accounts.remove(database, account, force=force)
    request_context.current().record_change(account)


# ---- tokens


def list_tokens(database: HubDatabase, identity: Identity | None) -> list[Token]:
    """Return the tokens of all accounts."""
    check_admin(identity, EVERYWHERE)
    return access_tokens.list_tokens(database)


def revoke_token(database: HubDatabase, identity: Identity | None, ident: int) -> None:
    """Revoke a token of anybody; NotFoundError if there is none with this number."""
    check_admin(identity, EVERYWHERE)
    access_tokens.revoke(database, ident)
    request_context.current().record_detail(token=ident)


# ---- rules for people who sign in


def list_admissions(database: HubDatabase, identity: Identity | None) -> list[Admission]:
    """Return the rules."""
    check_admin(identity, EVERYWHERE)
    return admissions.list_rules(database)


def add_admission(
    database: HubDatabase,
    identity: Identity | None,
    *,
    issuer: str,
    claims: Mapping[str, str],
    namespace: str = EVERYWHERE,
    role: str = "",
) -> int:
    """Admit people with certain claims, such as a group, and give them a role; errors as for `admissions.add`."""
    check_admin(identity, EVERYWHERE)
    id_tokens.check_claims(claims)
    ident = admissions.add(database, issuer, claims, namespace=namespace, role=role)
    request_context.current().record_detail(
        admission=ident,
        issuer=issuer,
        claims=id_tokens.claims_text(claims),
        namespace=namespace,
        role=role or "none",
    )
    return ident


def remove_admission(database: HubDatabase, identity: Identity | None, ident: int) -> None:
    """Remove a rule, and the roles it gave; NotFoundError if there is none with this number."""
    check_admin(identity, EVERYWHERE)
    admissions.remove(database, ident)
    request_context.current().record_detail(admission=ident)


# ---- the audit log


def list_reads(
    database: HubDatabase,
    identity: Identity | None,
    *,
    name: str = "",
    account: str = "",
    before: ReadPosition | None = None,
    limit: int = 100,
) -> Sequence[Read]:
    """Return the last rows of the log of reads, after a position if given: of a name for its admins, of all for the hub's."""
    check_admin(identity, name.partition("/")[0] or EVERYWHERE)
    return read_log.reads(database, name=name, account=account, before=before, limit=max(1, min(limit, _MAX_ROWS)))


def audit_events(
    database: HubDatabase, identity: Identity | None, *, name: str = "", account: str = "", before: int = 0, limit: int = 100
) -> Sequence[Event]:
    """Return the newest rows of the audit log, those before the row `before` if it is given.

    Admins of a namespace see the rows of it and its names, admins of the hub all of them.
    """
    check_admin(identity, name.partition("/")[0] or EVERYWHERE)
    return audit_log.events(database, name=name, account=account, before=before, limit=max(1, min(limit, _MAX_ROWS)))
