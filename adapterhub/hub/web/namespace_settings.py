"""The settings of a namespace, for its admins: members, readers, quota, deploy keys, webhooks and publishers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from adapterhub.hub import read_log
from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.access_tokens import Token
from adapterhub.hub.accounts.accounts import Member, Namespace
from adapterhub.hub.accounts.audit_log import Event
from adapterhub.hub.accounts.publishers import Publisher
from adapterhub.hub.administration import hub_admins, integrations, namespace_admins, own_tokens
from adapterhub.hub.administration.namespace_admins import QuotaRequest
from adapterhub.hub.read_log import Read, ReadPosition
from adapterhub.hub.webhooks import Webhook
from adapterhub.hub.workers import Worker
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .account import SecretPage, token_options, token_page
from .form_requests import claims_in, count_in, gigabytes_in, number_in
from .site import Page, PageRequest, with_query

PATH = "/-/namespaces"
_READERS = {"anyone": "anyone", "accounts": "anyone with a token", "members": "only members"}
_MAX_ROWS, _MAX_READS = 50, 100  # of the audit log shown, and of the log of reads on a page


@dataclass(frozen=True)
class NamespaceSettingsPage(Page):
    """Everything about a namespace that its admins manage."""

    name: str
    settings: Namespace
    members: Sequence[Member]
    quota_request: QuotaRequest | None
    keys: Sequence[Token]
    webhooks: Sequence[Webhook]
    publishers: Sequence[Publisher]
    issuers: Sequence[str]
    log: Sequence[Event]
    readers: Mapping[str, str]
    template: ClassVar[str] = "namespace_settings.html"


def settings_page(page_request: PageRequest, worker: Worker) -> NamespaceSettingsPage:
    """GET /-/namespaces/{namespace}."""
    database, identity, name = worker.database, page_request.who, page_request.part("namespace")
    check_admin(identity, name)
    accounts.check_namespace(name)
    return NamespaceSettingsPage(
        name=name,
        settings=accounts.namespace_settings(database, name),
        members=namespace_admins.list_members(database, identity, name),
        quota_request=next(iter(namespace_admins.quota_requests(database, name)), None),
        keys=own_tokens.deploy_keys(database, identity, name),
        webhooks=integrations.list_webhooks(database, identity, name),
        publishers=integrations.list_publishers(database, identity, name),
        issuers=integrations.trusted_issuers(database),
        log=hub_admins.audit_events(database, identity, name=name, limit=_MAX_ROWS),
        readers=_READERS,
    )


@dataclass(frozen=True)
class ReadsPage(Page):
    """Who read which digest in a namespace, the last reads first.

    Attributes:
        fields: The filters that are set: `name` of a repository, and `account`.
        following: The address of the next page; empty on the last one.
        sample: Of how many reads of what everybody may read one is here.
    """

    namespace: str
    fields: Mapping[str, str]
    rows: Sequence[Read]
    following: str
    sample: int = read_log.SAMPLE
    template: ClassVar[str] = "reads.html"


def reads_page(page_request: PageRequest, worker: Worker) -> ReadsPage:
    """GET /-/namespaces/{namespace}/reads: for the admins of the namespace."""
    namespace = page_request.part("namespace")
    check_admin(page_request.who, namespace)
    fields = {key: value for key in ("name", "account") if (value := page_request.query(key).strip())}
    name = fields.get("name", namespace)
    if name.partition("/")[0] != namespace:
        raise UsageError("name", f"{name[:80]!r} is in another namespace")
    page_request.hub.read_log.write()
    before = ReadPosition.parse(page_request.query("before"))
    account, limit = fields.get("account", ""), _MAX_READS + 1
    rows = hub_admins.list_reads(worker.database, page_request.who, name=name, account=account, before=before, limit=limit)
    shown, path = rows[:_MAX_READS], f"{PATH}/{namespace}/reads"
    following = with_query(path, **fields, before=str(ReadPosition.of_row(shown[-1]))) if len(rows) > _MAX_READS else ""
    return ReadsPage(namespace, fields, shown, following)


def _namespace(page_request: PageRequest, fields: dict[str, str]) -> str:
    """Return the namespace that a form is about, if the client is its admin."""
    name = fields.get("namespace", "")
    check_admin(page_request.who, name)
    return accounts.check_namespace(name)


def set_member(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/member: give an account a role, or take it away."""
    name, account, force = _namespace(page_request, fields), fields.get("account", "").strip(), fields.get("force") == "true"
    database, identity = page_request.hub.database, page_request.who
    if fields.get("remove"):
        namespace_admins.remove_member(database, identity, name, account, force=force)
    else:
        namespace_admins.set_member(database, identity, name, account, fields.get("role", ""), force=force)
    # An account that took its own role away cannot open the settings any more.
    return f"{PATH}/{name}"


def set_readers(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/readers."""
    name, artifacts = _namespace(page_request, fields), fields.get("artifacts")
    if artifacts not in ("any", "adapters"):
        raise UsageError("artifacts", f"{str(artifacts)[:80]!r} is not one of any, adapters")
    database, only = page_request.hub.database, artifacts == "adapters"
    namespace_admins.set_readers(database, page_request.who, name, readers=fields.get("readers", ""), adapters_only=only)
    return f"{PATH}/{name}#readers"


def ask_quota(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/ask-quota."""
    name = _namespace(page_request, fields)
    limits = {"max_bytes": gigabytes_in(fields, "gigabytes"), "max_files": count_in(fields, "files")}
    reason = fields.get("reason", "")
    namespace_admins.request_quota(page_request.hub.database, page_request.who, name, **limits, reason=reason)
    return f"{PATH}/{name}#quota"


def drop_quota(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/drop-quota: withdraw a request."""
    name = _namespace(page_request, fields)
    namespace_admins.drop_quota_request(page_request.hub.database, page_request.who, name)
    return f"{PATH}/{name}#quota"


def create_key(page_request: PageRequest, fields: dict[str, str]) -> SecretPage:
    """POST /-/namespaces/key."""
    name, options = _namespace(page_request, fields), token_options(fields)
    secret, _ = own_tokens.create_deploy_key(page_request.hub.database, page_request.who, name, options)
    return token_page(secret, f"{PATH}/{name}#keys")


def revoke_key(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/revoke-key."""
    name, ident = _namespace(page_request, fields), number_in(fields, "token")
    own_tokens.revoke_deploy_key(page_request.hub.database, page_request.who, name, ident)
    return f"{PATH}/{name}#keys"


def add_webhook(page_request: PageRequest, fields: dict[str, str]) -> SecretPage:
    """POST /-/namespaces/webhook."""
    name, url = _namespace(page_request, fields), fields.get("url", "").strip()
    _, secret = integrations.add_webhook(page_request.hub.database, page_request.who, name, url)
    use = "It signs what is posted to the webhook: check X-Hub-Signature-256 with it."
    return SecretPage("Secret of the webhook", use, secret, f"{PATH}/{name}#webhooks")


def remove_webhook(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/remove-webhook."""
    name, ident = _namespace(page_request, fields), number_in(fields, "webhook")
    integrations.remove_webhook(page_request.hub.database, page_request.who, name, ident)
    return f"{PATH}/{name}#webhooks"


def add_publisher(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/publisher."""
    name, scope, issuer = _namespace(page_request, fields), fields.get("scope", "").strip(), fields.get("issuer", "")
    database, identity, claims = page_request.hub.database, page_request.who, claims_in(fields, "claims")
    integrations.add_publisher(database, identity, name, scope=scope, issuer=issuer, claims=claims)
    return f"{PATH}/{name}#publishers"


def remove_publisher(page_request: PageRequest, fields: dict[str, str]) -> str:
    """POST /-/namespaces/remove-publisher."""
    name, ident = _namespace(page_request, fields), number_in(fields, "publisher")
    integrations.remove_publisher(page_request.hub.database, page_request.who, name, ident)
    return f"{PATH}/{name}#publishers"
