"""Open a hub's storage as its settings say."""

from __future__ import annotations

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import UsageError

from .folder_storage import Storage


def open_storage(settings: HubSettings) -> Storage:
    """Open the storage of a hub; create what is missing."""
    if bool(settings.database) != bool(settings.blobs):
        raise UsageError("hub", "a database and a bucket are of use only together", "Give both, or none")
    if not settings.database:
        return Storage.open(settings.registry)
    # Imported late: hubs in a folder run without psycopg and the bucket client.
    from .shared_storage import open_shared

    return open_shared(settings)


def open_registry(settings: HubSettings) -> Registry:
    """Open the registry of a hub in a database and a bucket, for one command; the folder keeps copies."""
    from .shared_storage import open_shared_registry

    return open_shared_registry(settings)


def open_database(settings: HubSettings) -> HubDatabase:
    """Open only the tables of a hub, as to create a token."""
    if settings.database:
        from .postgres import PostgresDatabase

        return PostgresDatabase(settings.database)
    Registry.init(settings.registry).close()
    return HubDatabase(settings.registry)
