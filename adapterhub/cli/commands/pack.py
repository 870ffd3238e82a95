"""`adapterhub pack`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.registry_choice import open_registry
from adapterhub.cli.views import packed_files as view

if TYPE_CHECKING:
    from adapterhub.maintenance.compress import PackingOutcome


@command(
    "pack",
    example="""
    adapterhub pack --dry-run
    adapterhub pack team/sql
    adapterhub pack --undo team/sql:v2""",
)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@dry_run_option
@click.option(
    "--level",
    metavar="N",
    type=click.IntRange(1, 22),
    default=3,
    show_default=True,
    help="Compression level (zstd) of text; higher levels do not help tensors.",
)
@click.option("--undo", is_flag=True, help="Undo it: decompress packed versions, every byte verified.")
@click.pass_obj
def pack(settings: Settings, names: Sequence[str], *, dry_run: bool, level: int, undo: bool) -> None:
    """Compress stored versions without loss: digests do not change, and every command reads packed files as before.

    NAME is a name, a namespace or a ref; without one, everything. skopeo and oras cannot read packed files in the store: --undo
    decompresses them first.
    """
    from adapterhub.maintenance import compress

    if undo:
        _unpack(settings, names, dry_run=dry_run)
        return
    with open_registry(settings) as registry, bytes_bar("packing") as progress:
        changes = compress.pack(registry, names, level=level, dry_run=dry_run, progress=progress)
    verb = "would be packed" if dry_run else "packed"
    view.show(settings, changes, lambda: _packed_line(changes, verb), dry_run=dry_run)


def _unpack(settings: Settings, names: Sequence[str], *, dry_run: bool) -> None:
    from adapterhub.maintenance import compress

    with open_registry(settings) as registry, bytes_bar("unpacking") as progress:
        changes = compress.unpack(registry, names, dry_run=dry_run, progress=progress)
    verb, size = "would be unpacked" if dry_run else "unpacked", output.size(sum(change.size for change in changes))
    view.show(settings, changes, lambda: f"{output.plural(len(changes), 'file')} {verb}, {size}", dry_run=dry_run)


def _packed_line(changes: Sequence[PackingOutcome], verb: str) -> str:
    packed = [change for change in changes if change.outcome == "packed"]
    before, after = sum(change.size for change in packed), sum(change.stored for change in packed)
    share = f" ({after / before:.0%})" if before else ""
    sizes = f": {output.size(before)} to {output.size(after)}{share}" if packed else ""
    words = {"already": "already packed", "kept": "not worth packing"}
    counts = {text: sum(change.outcome == word for change in changes) for word, text in words.items()}
    other_counts = [f"{output.plural(count, 'file')} {text}" for text, count in counts.items() if count]
    return "; ".join([f"{output.plural(len(packed), 'file')} {verb}{sizes}", *other_counts])
