"""The administration page of the hub, for admins of every namespace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts.access_tokens import Token
from adapterhub.hub.accounts.accounts import EVERYWHERE, Account
from adapterhub.hub.accounts.admissions import Admission
from adapterhub.hub.accounts.audit_log import Event
from adapterhub.hub.administration import hub_admins, namespace_admins
from adapterhub.hub.administration.namespace_admins import QuotaRequest
from adapterhub.hub.administration.storage_usage import StorageUsage, storage_usage
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .account import SecretPage
from .form_requests import claims_in, count_in, gigabytes_in, number_in
from .site import Page, PageRequest

PATH = "/-/admin"


@dataclass(frozen=True)
class AdminPage(Page):
    """Accounts and their tokens, rules for people who sign in, what namespaces store and may hold, and the audit log.

    Attributes:
        audited: The namespace or name whose rows of the log are shown; empty for all.
    """

    accounts: Sequence[Account]
    tokens: Sequence[Token]
    rules: Sequence[Admission]
    usage: StorageUsage
    quota_requests: Sequence[QuotaRequest]
    audited: str
    log: Sequence[Event]
    template: ClassVar[str] = "admin.html"


_MAX_ROWS = 100  # of the audit log shown
_ARTIFACTS = {"any": False, "adapters": True}  # the form's value, to `adapters_only`


def admin_page(page_request: PageRequest, worker: Worker) -> AdminPage:
    """GET /-/admin, with ?audit=NAMESPACE for a part of the log."""
    database, identity, audited = worker.database, page_request.who, page_request.query("audit").strip()
    check_admin(identity, EVERYWHERE)
    return AdminPage(
        hub_admins.list_accounts(database, identity),
        hub_admins.list_tokens(database, identity),
        hub_admins.list_admissions(database, identity),
        storage_usage(worker, identity, page_request.hub.namespace_totals),
        namespace_admins.quota_requests(database),
        audited,
        hub_admins.audit_events(database, identity, name=audited, limit=_MAX_ROWS),
    )


def settle(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/admin/settle: which artifacts may be pushed to a namespace."""
    check_admin(page_request.who, EVERYWHERE)
    if (artifacts := fields.get("artifacts", "")) not in _ARTIFACTS:
        raise UsageError("artifacts", f"{artifacts[:80]!r} is not one of {', '.join(_ARTIFACTS)}")
    namespace, only = fields.get("namespace", ""), _ARTIFACTS[artifacts]
    namespace_admins.set_readers(page_request.hub.database, page_request.who, namespace, adapters_only=only)
    return PATH


def set_quota(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/admin/quota."""
    limits = gigabytes_in(fields, "gigabytes"), count_in(fields, "files")
    namespace_admins.set_quota(page_request.hub.database, page_request.who, fields.get("namespace", "").strip(), *limits)
    return PATH


def refuse_quota(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/admin/refuse-quota."""
    check_admin(page_request.who, EVERYWHERE)
    namespace_admins.drop_quota_request(page_request.hub.database, page_request.who, fields.get("namespace", ""))
    return PATH


def invite(page_request: PageRequest, fields: dict[str, str]) -> SecretPage:
    """POST /-/admin/invite."""
    account, namespace = fields.get("account", "").strip(), fields.get("namespace", "").strip()
    roles = {namespace: fields.get("role", "")} if namespace else {}
    secret = hub_admins.invite(page_request.hub.database, page_request.who, account, roles)
    use = f"Give it to the person, who signs in with it as {account} and makes their own tokens."
    return SecretPage("Invitation", use, secret, f"{PATH}#accounts")


def change_account(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/admin/account: disable, enable or remove an account."""
    check_admin(page_request.who, EVERYWHERE)
    database, account, action = page_request.hub.database, fields.get("account", ""), fields.get("action", "")
    force = fields.get("force") == "true"
    if action == "remove":
        hub_admins.remove_account(database, page_request.who, account, force=force)
    elif action in ("disable", "enable"):
        hub_admins.set_disabled(database, page_request.who, account, disabled=action == "disable", force=force)
    else:
        raise UsageError("action", f"{action[:80]!r} is not one of disable, enable, remove")
    return f"{PATH}#accounts"


def add_rule(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/admin/rule: admit people with certain claims, such as a group."""
    issuer, claims = fields.get("issuer", "").strip(), claims_in(fields, "claims")
    namespace, role = fields.get("namespace", "").strip() or EVERYWHERE, fields.get("role", "")
    database, identity = page_request.hub.database, page_request.who
    hub_admins.add_admission(database, identity, issuer=issuer, claims=claims, namespace=namespace, role=role)
    return f"{PATH}#rules"


def remove_rule(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/admin/remove-rule."""
    check_admin(page_request.who, EVERYWHERE)
    hub_admins.remove_admission(page_request.hub.database, page_request.who, number_in(fields, "rule"))
    return f"{PATH}#rules"


def revoke(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/admin/revoke: a token of anybody."""
    check_admin(page_request.who, EVERYWHERE)
    hub_admins.revoke_token(page_request.hub.database, page_request.who, number_in(fields, "token"))
    return PATH
