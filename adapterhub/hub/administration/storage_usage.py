"""What a hub stores, by namespace, as its admins see it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from adapterhub.hub.access_control import check_admin
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.accounts.accounts import EVERYWHERE, Namespace
from adapterhub.hub.timed_value import TimedValue
from adapterhub.hub.workers import Worker
from adapterhub.index import queries
from adapterhub.index.queries import NamespaceTotals
from adapterhub_converters.lazy_dataclass import dataclass

Sums = TimedValue[list[NamespaceTotals]]
"""What each namespace stores."""


@dataclass(frozen=True)
class Disk:
    """The disk of the registry's folder, in bytes."""

    used: int
    free: int
    total: int


@dataclass(frozen=True)
class NamespaceUsage:
    """A namespace: what it stores, and its settings."""

    stored: NamespaceTotals
    settings: Namespace


@dataclass(frozen=True)
class StorageUsage:
    """The namespaces that store something or have settings, and the disk."""

    namespaces: Sequence[NamespaceUsage]
    disk: Disk


def storage_usage(worker: Worker, identity: Identity | None, sums: Sums) -> StorageUsage:
    """Return what the hub stores, for its admins; sums that took long are not computed anew each time."""
    check_admin(identity, EVERYWHERE)
    disk = shutil.disk_usage(worker.registry.root)
    totals = sums.get(lambda: queries.namespace_totals(worker.registry.index))
    stored = {total.namespace: total for total in totals}
    settings = {namespace.name: namespace for namespace in accounts.namespaces(worker.database)}
    # Namespaces with settings but without versions come last.
    names = [*stored, *sorted(settings.keys() - stored.keys())]
    spaces = [
        NamespaceUsage(stored.get(name, NamespaceTotals(name, 0, 0, 0)), settings.get(name, Namespace(name))) for name in names
    ]
    return StorageUsage(spaces, Disk(disk.used, disk.free, disk.total))
