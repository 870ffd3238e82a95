"""`adapterhub gc`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output, progress
from adapterhub.cli.environment import (
    open_registry,
)
from adapterhub.cli.options import Settings, command

if TYPE_CHECKING:
    from adapterhub.maintenance.gc import Swept


@command(
    "gc",
    short="Remove what nothing needs.",
    example="""
    adapterhub gc --dry-run
    adapterhub gc --grace 0
    adapterhub gc --keep-last 5""",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would go.")
@click.option(
    "--grace", metavar="HOURS", type=click.FloatRange(min=0), default=24.0, show_default=True, help="Spare the younger."
)
@click.option(
    "--keep-last",
    "last",
    metavar="N",
    type=click.IntRange(min=1),
    help="Drop versions but the N newest of a name and the tagged.",
)
@click.option("--keep-tagged", "tagged", is_flag=True, help="Drop versions without a tag.")
@click.pass_obj
def gc(settings: Settings, *, dry_run: bool, grace: float, last: int | None, tagged: bool) -> None:
    """Remove what nothing needs: bytes of removed names and of dropped versions, and what killed commands left.

    Versions are only dropped where `adapterhub keep` or these options say so; what was said of a name with `keep` comes first.
    A version from which another was merged or converted stays as long as that does.
    What was let go or stored less than HOURS ago stays, and so does what a push or a pull at work needs, so this may run at any
    time.
    """
    from adapterhub.maintenance import gc as collection

    with open_registry(settings) as registry, progress.count_bar("removing") as show:
        swept = collection.gc(registry, grace=grace, last=last or (0 if tagged else None), dry_run=dry_run, progress=show)
    output.emit(_document(swept), as_json=settings.as_json, text=lambda: _text(swept))


def _document(swept: Swept) -> dict[str, Any]:
    return {
        "dry_run": swept.dry_run,
        "dropped": [str(ref) for ref in swept.dropped],
        "parents": [str(ref) for ref in swept.parents],
        "blobs": swept.blobs,
        "size": swept.size,
        "conversions": swept.conversions,
        "conversion_size": swept.conversion_size,
        "leftovers": swept.leftovers,
        "leftover_size": swept.leftover_size,
        "waiting": swept.waiting,
        "waiting_size": swept.waiting_size,
    }


def _text(swept: Swept) -> None:
    drop, remove, keep = ("would drop", "would remove", "would keep") if swept.dry_run else ("dropped", "removed", "kept")
    for ref in swept.dropped:
        output.write(f"{drop} {ref}")
    for ref in swept.parents:
        output.write(f"{keep} {ref}: what stays was made from it")
    counts = (
        (swept.blobs, swept.size, "blob"),
        (swept.conversions, swept.conversion_size, "kept conversion"),
        (swept.leftovers, swept.leftover_size, "leftover"),
    )
    for count, size, noun in counts:
        if count:
            output.write(f"{remove} {output.plural(count, noun)}, {output.size(size)}")
    if swept.waiting:
        output.write(
            f"{output.plural(swept.waiting, 'unneeded blob')}, {output.size(swept.waiting_size)}: not to be removed yet"
        )
    if not (swept.dropped or swept.blobs or swept.conversions or swept.leftovers or swept.waiting):
        output.write("nothing to remove")
