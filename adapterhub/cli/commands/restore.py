"""`adapterhub restore`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings, command

if TYPE_CHECKING:
    from adapterhub.registry.version_lookup import RestoreResult


@command(
    "restore",
    example="""
    adapterhub restore team/sql""",
)
@click.argument("name")
@click.pass_obj
def restore(settings: Settings, *, name: str) -> None:
    """Restore a name that was removed, with its versions, tags and settings.

    Versions whose data `adapterhub gc` has removed are lost, and are listed. The name can be pushed to again in any case.
    """
    from adapterhub.ref import parse_name

    with open_registry(settings) as registry:
        result = registry.restore(parse_name(name, name))
    document = {"restored": result.name, "versions": list(result.numbers), "lost": list(result.lost)}
    output.emit(document, as_json=settings.as_json, text=lambda: _write(result))


def _write(result: RestoreResult) -> None:
    output.write(f"restored {result.name} with {output.plural(len(result.numbers), 'version')}")
    if result.lost:
        output.write(f"lost, because gc has removed their data: {', '.join(f'v{number}' for number in result.lost)}")
