"""`adapterhub restore`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import remote_option

if TYPE_CHECKING:
    from adapterhub.registry.version_lookup import RestoreResult


@command(
    "restore",
    example="""
    adapterhub restore team/sql
    adapterhub restore team/sql --remote""",
)
@click.argument("name")
@dry_run_option
@remote_option
@click.pass_obj
def restore(settings: Settings, *, name: str, dry_run: bool, remote: str | None) -> None:
    """Restore a name that was removed, with its versions, tags and settings.

    Versions whose data `adapterhub gc` has removed are lost, and are listed. The name can be pushed to again in any case. NAME
    may be on a hub of adapterhub.
    """
    from adapterhub.ref import parse_name
    from adapterhub.remotes.version_documents import restore_document

    with catalogs.catalog_of(settings, name, remote, "removed names", dry_run=dry_run) as (catalog, target):
        result = catalog.restore(parse_name(str(target), name))
    output.emit_change(restore_document(result), as_json=settings.as_json, text=lambda: _write(result), dry_run=dry_run)


def _write(result: RestoreResult) -> None:
    output.write(f"restored {result.name} with {output.plural(len(result.numbers), 'version')}")
    if result.lost:
        output.write(f"lost, because gc has removed their data: {', '.join(f'v{number}' for number in result.lost)}")
