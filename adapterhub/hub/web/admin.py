"""The administration page of the hub, for admins of every namespace."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import Response

from adapterhub.hub import request_context
from adapterhub.hub.access_control import ForbiddenError, NoTokenError
from adapterhub.hub.people import access_tokens, accounts, audit_log
from adapterhub.hub.people.access_tokens import Token
from adapterhub.hub.people.accounts import Account, Namespace
from adapterhub.hub.people.audit_log import Event
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import NamespaceTotals
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .posting import answer_form
from .site import Page, PageRequest, redirect_to


@dataclass(frozen=True)
class Disk:
    """The disk of the registry, in bytes."""

    used: int
    free: int
    total: int


@dataclass(frozen=True)
class NamespaceUsage:
    """A namespace: what it stores, and its settings."""

    stored: NamespaceTotals
    settled: Namespace


@dataclass(frozen=True)
class AdminPage(Page):
    """Accounts and their tokens, the usage and limits of each namespace, the disk, and the audit log.

    Attributes:
        audited: The namespace or name whose rows of the log are shown; empty for all.
    """

    accounts: Sequence[Account]
    tokens: Sequence[Token]
    spaces: Sequence[NamespaceUsage]
    disk: Disk
    audited: str
    log: Sequence[Event]
    template: ClassVar[str] = "admin.html"


_MAX_ROWS = 100  # of the audit log shown
_ARTIFACTS = {"any": False, "adapters": True}  # the form's value, to `adapters_only`


def admin_page(page_request: PageRequest, worker: Worker) -> AdminPage:
    """GET /-/admin, with ?audit=NAMESPACE for a part of the log."""
    _check_admin(page_request)
    database, disk = page_request.hub.database, shutil.disk_usage(page_request.hub.settings.registry)
    stored = {total.namespace: total for total in queries.namespace_totals(worker.registry.index)}
    settings = {namespace.name: namespace for namespace in accounts.namespaces(database)}
    # Namespaces with settings but without versions come last.
    names = [*stored, *sorted(settings.keys() - stored.keys())]
    audited = page_request.query("audit").strip()
    return AdminPage(
        accounts.list_accounts(database),
        access_tokens.list_tokens(database),
        [
            NamespaceUsage(stored.get(name, NamespaceTotals(name, 0, 0, 0)), settings.get(name, Namespace(name)))
            for name in names
        ],
        Disk(disk.used, disk.free, disk.total),
        audited,
        audit_log.events(database, name=audited, limit=_MAX_ROWS),
    )


def _check_admin(page_request: PageRequest) -> None:
    if page_request.who is None:
        raise NoTokenError
    if not page_request.is_admin:
        raise ForbiddenError("This page is for the admins of the hub.")


async def settle(request: Request) -> Response:
    """POST /-/admin/settle: which artifacts may be pushed to a namespace."""

    def work(page_request: PageRequest, _worker: Worker, fields: dict[str, str]) -> Response:
        _check_admin(page_request)
        database, name = page_request.hub.database, accounts.check_namespace(fields.get("namespace", ""))
        request_context.current().record_change(name)
        if (artifacts := fields.get("artifacts", "")) not in _ARTIFACTS:
            raise UsageError("artifacts", f"{artifacts[:80]!r} is not one of {', '.join(_ARTIFACTS)}")
        # Read and write in one transaction: the CLI may change another setting at the same time.
        with database.transaction():
            accounts.set_namespace(
                database, replace(accounts.namespace_settings(database, name), adapters_only=_ARTIFACTS[artifacts])
            )
        return redirect_to("/-/admin")

    return await answer_form(request, work)


async def revoke(request: Request) -> Response:
    """POST /-/admin/revoke."""

    def work(page_request: PageRequest, _worker: Worker, fields: dict[str, str]) -> Response:
        _check_admin(page_request)
        request_context.current().record_change("tokens")
        ident = fields.get("token", "")
        if not ident.isdecimal() or len(ident) > 18:
            raise UsageError(ident[:80], "is not the number of a token")
        access_tokens.revoke(page_request.hub.database, int(ident))
        return redirect_to("/-/admin")

    return await answer_form(request, work)
