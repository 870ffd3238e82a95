"""`adapterhub pack`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.environment import (
    open_registry,
)
from adapterhub.cli.options import Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views import changes as view

if TYPE_CHECKING:
    from adapterhub.maintenance.compress import Change


@command(
    "pack",
    short="Compress what lies in the registry.",
    example="""
    adapterhub pack --dry-run
    adapterhub pack team/sql""",
)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Say what it would save; change nothing.")
@click.option(
    "--level",
    type=click.IntRange(1, 22),
    default=3,
    show_default=True,
    help="zstd's level for text. Numbers gain nothing by a higher one.",
)
@click.pass_obj
def pack(settings: Settings, names: Sequence[str], *, dry_run: bool, level: int) -> None:
    """Compress what versions need, bit for bit: their digests stay, and every command reads them as before.

    NAME is a name, a namespace or a ref; without one, everything. skopeo and oras read no packed file in the store: unpack
    those versions first.
    """
    from adapterhub.maintenance import compress

    with open_registry(settings) as registry, bytes_bar("packing") as progress:
        changes = compress.pack(registry, names, level=level, dry_run=dry_run, progress=progress)
    verb = "would be packed" if dry_run else "packed"
    view.show(settings, changes, lambda: _packed_line(changes, verb), dry_run=dry_run)


def _packed_line(changes: Sequence[Change], verb: str) -> str:
    new = [change for change in changes if change.outcome == "packed"]
    before, after = sum(change.size for change in new), sum(change.stored for change in new)
    share = f" ({after / before:.0%})" if before else ""
    sizes = f": {output.size(before)} to {output.size(after)}{share}" if new else ""
    rest = [f"{output.plural(count, 'file')} {what}" for what, count in _counts(changes).items() if count]
    return "; ".join([f"{output.plural(len(new), 'file')} {verb}{sizes}", *rest])


def _counts(changes: Sequence[Change]) -> dict[str, int]:
    words = {"already": "packed already", "kept": "gain too little and stay plain"}
    return {text: sum(change.outcome == word for change in changes) for word, text in words.items()}
