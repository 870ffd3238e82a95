"""`adapterhub gc`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output, progress
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings, command, dry_run_option

if TYPE_CHECKING:
    from adapterhub.maintenance.gc import Swept


@command(
    "gc",
    example="""
    adapterhub gc --dry-run
    adapterhub gc --grace 0
    adapterhub gc --keep-last 5""",
)
@dry_run_option
@click.option(
    "--grace",
    metavar="HOURS",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    help="Keep objects newer than HOURS.",
)
@click.option(
    "--keep-last", "last", metavar="N", type=click.IntRange(min=1), help="Remove versions except the N newest and the tagged."
)
@click.option("--keep-tagged", "tagged", is_flag=True, help="Remove versions without a tag.")
@click.pass_obj
def gc(settings: Settings, *, dry_run: bool, grace: float, last: int | None, tagged: bool) -> None:
    """Remove unused data: bytes of removed names and dropped versions, and leftovers of killed commands.

    Versions are dropped only where `adapterhub keep` or these options request it; `keep` wins. A version stays as long as
    another was merged or converted from it. Data released or stored less than HOURS ago stays, and so does whatever a running
    push or pull needs, so this is safe at any time.
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
    remove, keep = ("would remove", "would keep") if swept.dry_run else ("removed", "kept")
    for ref in swept.dropped:
        output.write(f"{remove} {ref}")
    for ref in swept.parents:
        output.write(f"{keep} {ref}: a version that stays was made from it")
    counts = (
        (swept.blobs, swept.size, "blob"),
        (swept.conversions, swept.conversion_size, "cached conversion"),
        (swept.leftovers, swept.leftover_size, "leftover"),
    )
    for count, size, noun in counts:
        if count:
            output.write(f"{remove} {output.plural(count, noun)}, {output.size(size)}")
    if swept.waiting:
        output.write(
            f"{output.plural(swept.waiting, 'unused blob')}, {output.size(swept.waiting_size)}: within the grace period"
        )
    if not (swept.dropped or swept.blobs or swept.conversions or swept.leftovers or swept.waiting):
        output.write("nothing to remove")
