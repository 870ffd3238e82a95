"""Webhooks and trusted publishers, as the admins of a namespace manage them.

The hub sends requests to a webhook's URL and to a publisher's issuer. Only an admin of the hub can name addresses of its own
network, and issuers that neither serve everybody nor are trusted here already.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterhub.hub import request_context, webhooks
from adapterhub.hub.access_control import ForbiddenError, check_admin
from adapterhub.hub.accounts import accounts, id_tokens, publishers
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.accounts.publishers import Publisher
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.webhooks import Delivery, Webhook
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub_converters.errors import NotFoundError

PUBLIC_ISSUERS = ("https://token.actions.githubusercontent.com", "https://gitlab.com")
"""Issuers of ID tokens for CI jobs of everybody."""


# ---- webhooks


def list_webhooks(database: HubDatabase, identity: Identity | None, namespace: str) -> list[Webhook]:
    """Return the webhooks of a namespace, for its admins."""
    check_admin(identity, namespace)
    return [webhook for webhook in webhooks.list_webhooks(database) if webhook.namespace == namespace]


def list_deliveries(database: HubDatabase, identity: Identity | None, namespace: str) -> list[Delivery]:
    """Return the newest events for the webhooks of a namespace, sent or waiting."""
    check_admin(identity, namespace)
    return webhooks.deliveries(database, namespace=namespace)


def add_webhook(
    database: HubDatabase, identity: Identity | None, namespace: str, url: str, *, private: bool = False
) -> tuple[int, str]:
    """Add a webhook; return its number, and its secret, which is shown only once.

    Raises:
        ForbiddenError: It may lead to a private address (`private`), for which only an admin of the hub can ask.
        UsageError, RefusedError: As in `webhooks.add`.
    """
    check_admin(identity, namespace)
    if private:
        check_admin(identity, EVERYWHERE)
    ident, secret = webhooks.add(database, namespace, url, private=private)
    # The path of a webhook's URL may be a secret.
    request_context.current().record_detail(webhook=ident, host=url.partition("://")[2].partition("/")[0].rpartition("@")[2])
    return ident, secret


def remove_webhook(database: HubDatabase, identity: Identity | None, namespace: str, ident: int) -> None:
    """Remove a webhook of a namespace. NotFoundError if it has none with this number."""
    if ident not in [webhook.id for webhook in list_webhooks(database, identity, namespace)]:
        raise NotFoundError(str(ident), "no such webhook", "List the webhooks", code="no-such-number", kind="webhook")
    webhooks.remove(database, ident)
    request_context.current().record_detail(webhook=ident)


# ---- publishers


def list_publishers(database: HubDatabase, identity: Identity | None, namespace: str) -> list[Publisher]:
    """Return the publishers of a namespace and of its repositories, for its admins."""
    check_admin(identity, namespace)
    return [publisher for publisher in publishers.list_publishers(database) if publisher.scope.partition("/")[0] == namespace]


@of_one_snapshot
def trusted_issuers(database: HubDatabase) -> list[str]:
    """Return the issuers that every admin of a namespace can name."""
    sql = "SELECT issuer FROM publishers UNION SELECT issuer FROM admissions UNION SELECT issuer FROM identities"
    return sorted({*PUBLIC_ISSUERS, *(str(issuer) for (issuer,) in database.select(sql))})


def add_publisher(
    database: HubDatabase,
    identity: Identity | None,
    namespace: str,
    *,
    scope: str,
    issuer: str,
    claims: Mapping[str, str],
) -> int:
    """Trust jobs of an issuer for a namespace or a repository in it; they push as the account of who adds it.

    Raises:
        ForbiddenError: The repository is in another namespace, or only an admin of the hub can name the issuer.
        UsageError, RefusedError: As in `publishers.add`.
    """
    identity = check_admin(identity, namespace)
    if scope.partition("/")[0] != namespace:
        raise ForbiddenError(f"a publisher of {namespace[:100]} is trusted for it, or for repositories in it")
    id_tokens.check_claims(claims)
    if issuer not in trusted_issuers(database):
        check_admin(identity, EVERYWHERE)
    accounts.check_account(database, identity.account)
    ident = publishers.add(database, scope, issuer, claims, identity.account)
    request_context.current().record_detail(publisher=ident, scope=scope, issuer=issuer, claims=id_tokens.claims_text(claims))
    return ident


def remove_publisher(database: HubDatabase, identity: Identity | None, namespace: str, ident: int) -> None:
    """Stop trusting a publisher of a namespace. NotFoundError if it has none with this number."""
    if ident not in [publisher.id for publisher in list_publishers(database, identity, namespace)]:
        raise NotFoundError(str(ident), "no such publisher", "List the publishers", code="no-such-number", kind="publisher")
    publishers.remove(database, ident)
    request_context.current().record_detail(publisher=ident)
