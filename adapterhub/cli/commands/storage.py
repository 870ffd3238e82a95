"""Commands that compress what lies in a registry, and make it plain again: pack, unpack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar

if TYPE_CHECKING:
    from adapterhub.maintenance.compress import Change

_CHANGES = (Column("REF"), Column("FILE"), Column("SIZE", right=True), Column("STORED", right=True), Column("AS", drop=1))
_SHORT = 12 + len("sha256:")


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
    _changes(settings, changes, lambda: _packed_line(changes, verb), dry_run=dry_run)


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


@command(
    "unpack",
    short="Make packed files plain again.",
    example="""
    adapterhub unpack team/sql:v2
    adapterhub unpack""",
)
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.pass_obj
def unpack(settings: Settings, names: Sequence[str]) -> None:
    """Make plain what `pack` compressed, every byte verified; skopeo and oras then read it in the store.

    NAME is a name, a namespace or a ref; without one, everything.
    """
    from adapterhub.maintenance import compress

    with open_registry(settings) as registry, bytes_bar("unpacking") as progress:
        changes = compress.unpack(registry, names, progress=progress)
    size = sum(change.size for change in changes)
    _changes(settings, changes, lambda: f"{output.plural(len(changes), 'file')} unpacked, {output.size(size)}")


def _changes(settings: Settings, changes: Sequence[Change], summary: Callable[[], str], **more: object) -> None:
    document = {
        "files": [dataclasses.asdict(change) for change in changes],
        "size": sum(change.size for change in changes),
        "stored": sum(change.stored for change in changes),
        **more,
    }

    def text() -> None:
        shown = [change for change in changes if change.outcome in ("packed", "unpacked")]
        if shown:
            cells = [[change.ref, change.path, output.size(change.size), _stored(change), _how(change)] for change in shown]
            for line in output.table(_CHANGES, cells, screen=output.width()):
                output.write(line)
        output.write(summary())

    output.emit(document, as_json=settings.as_json, text=text)


def _stored(change: Change) -> str:
    return f"{output.size(change.stored)} ({change.stored / change.size:.0%})" if change.size else output.size(change.stored)


def _how(change: Change) -> str:
    if change.outcome == "unpacked":
        return "plain"
    return f"difference to {change.parent[:_SHORT]}" if change.parent else "alone"
