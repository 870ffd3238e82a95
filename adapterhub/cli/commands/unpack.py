"""`adapterhub unpack`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from adapterhub.cli import output
from adapterhub.cli.options import Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.registry_choice import open_registry
from adapterhub.cli.views import packed_files as view


@command(
    "unpack",
    example="""
    adapterhub unpack team/sql:v2
    adapterhub unpack""",
)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.pass_obj
def unpack(settings: Settings, names: Sequence[str]) -> None:
    """Decompress packed versions, every byte verified, so that skopeo and oras can read the store.

    NAME is a name, a namespace or a ref; without one, everything.
    """
    from adapterhub.maintenance import compress

    with open_registry(settings) as registry, bytes_bar("unpacking") as progress:
        changes = compress.unpack(registry, names, progress=progress)
    size = sum(change.size for change in changes)
    view.show(settings, changes, lambda: f"{output.plural(len(changes), 'file')} unpacked, {output.size(size)}")
