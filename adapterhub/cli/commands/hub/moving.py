"""`adapterhub hub migrate` and `recover`, for a hub in a database and a bucket, and `hub gc`, for any hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import environment, output, registry_choice
from adapterhub.cli.gc_report import emit_swept, sweep, sweep_options
from adapterhub.cli.options import Command, Settings
from adapterhub.cli.progress import bytes_bar
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.hub.settings import HubSettings
    from adapterhub.hub.storage.postgres import PostgresDatabase
    from adapterhub.remotes.objects.bucket import Bucket


@click.command(
    "migrate",
    cls=Command,
    short_help="Move a hub into a database and a bucket, or back.",
    example="""
    adapterhub hub migrate
    adapterhub --registry NEW hub migrate --back""",
)
@click.option("--back", is_flag=True, help="Copy back, into the new folder --registry.")
@click.pass_obj
def migrate(settings: Settings, *, back: bool) -> None:
    """Copy the hub of the registry's folder into $ADAPTERHUB_DATABASE, which is empty, and $ADAPTERHUB_BLOBS.

    Stop the hub first. Adapters, accounts and tokens are copied byte for byte; the source does not change.
    """
    from adapterhub.hub.storage import migration

    hub_settings = _shared_settings(settings)
    with _open_places(hub_settings) as (database, bucket), bytes_bar("blobs") as callback:
        if back:
            counts = migration.move_out(database, bucket, hub_settings.registry, callback)
        else:
            counts = migration.move_in(hub_settings.registry, database, bucket, callback)
    document = {"entries": counts.entries, "blobs": counts.blobs, "bytes": counts.size}
    text = f"copied {counts.entries} moves and {counts.blobs} blobs ({output.size(counts.size)})"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


@click.command(
    "recover",
    cls=Command,
    short_help="Rebuild a lost database.",
    example="""
    adapterhub hub recover""",
)
@click.pass_obj
def recover(settings: Settings) -> None:
    """Fill the log in $ADAPTERHUB_DATABASE, which is empty, from its copies in $ADAPTERHUB_BLOBS.

    Every version is back then, with its tags. Accounts and tokens are in the database alone: restore its backup instead if
    there is one, or create tokens anew.
    """
    from adapterhub.hub.storage import migration

    with _open_places(_shared_settings(settings)) as (database, bucket):
        entries = migration.recover(database, bucket)
    output.emit({"entries": entries}, as_json=settings.as_json, text=lambda: output.write(f"recovered {entries} moves"))


@click.command(
    "gc",
    cls=Command,
    short_help="Remove unused data of the hub.",
    example="""
    adapterhub hub gc --dry-run
    adapterhub hub gc --keep-last 5""",
)
@sweep_options(2)
@click.pass_obj
def gc(settings: Settings, /, **options: Any) -> None:
    """Remove from $ADAPTERHUB_BLOBS the bytes of removed names and dropped versions, and abandoned uploads.

    Safe at any time, while any number of processes serve, if all of them have this command. The same as `adapterhub gc`.
    """
    swept = sweep(settings, **options)
    emit_swept(settings, swept)


def _shared_settings(settings: Settings) -> HubSettings:
    """Return the settings of a hub in a database and a bucket; raise UsageError unless both are known."""
    hub_settings = registry_choice.hub_settings(settings)
    variables = {environment.DATABASE: hub_settings.database, environment.BLOBS: hub_settings.blobs}
    if missing := " and ".join(name for name, value in variables.items() if not value):
        raise UsageError(missing, "not set, and this is for a hub in a database and a bucket", f"Set {missing}")
    return hub_settings


@contextmanager
def _open_places(hub_settings: HubSettings) -> Iterator[tuple[PostgresDatabase, Bucket]]:
    from adapterhub.hub.storage.postgres import PostgresDatabase
    from adapterhub.hub.storage.shared_storage import open_bucket

    with (
        closing(PostgresDatabase(hub_settings.database)) as database,
        closing(open_bucket(hub_settings.blobs, hub_settings.environ)) as bucket,
    ):
        yield database, bucket
