"""The options and the report that the commands which collect garbage share."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import ages, output, progress, registry_choice
from adapterhub.cli.options import Settings, dry_run_option
from adapterhub.manifest.keep_rule import GRACE_HOURS

if TYPE_CHECKING:
    from adapterhub.maintenance.gc import GcResult
    from adapterhub.registry.registry import Registry
    from adapterhub.serve.prepared_versions import SweepResult

_NICENESS = 10  # while it packs, as a hub starts it


def sweep_options(min_hours: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of a gc, whose grace period has at least `min_hours` hours."""
    grace = click.option(
        "--grace",
        metavar="HOURS",
        type=click.FloatRange(min=min_hours),
        default=GRACE_HOURS,
        show_default=True,
        help="Keep objects newer than HOURS.",
    )
    last = click.option(
        "--keep-last",
        "last",
        metavar="N",
        type=click.IntRange(min=1),
        help="Remove versions except the N newest and the tagged.",
    )
    tagged = click.option("--keep-tagged", "tagged", is_flag=True, help="Remove versions without a tag.")
    ttl = click.option(
        "--ttl", metavar="AGE", help="Remove versions pushed longer ago, like 30d, except the newest and the tagged."
    )
    withdrawn = click.option(
        "--withdrawn", is_flag=True, help="Remove withdrawn versions, except those that a tag still means."
    )
    return lambda function: dry_run_option(grace(last(tagged(ttl(withdrawn(function))))))


def sweep(
    settings: Settings,
    *,
    grace: float,
    last: int | None,
    tagged: bool,
    ttl: str | None,
    withdrawn: bool,
    dry_run: bool,
) -> GcResult:
    """Collect the garbage of the registry that is meant, with the values of `sweep_options`."""
    # 0 keeps only the newest and the tagged versions; None drops no version that `adapterhub keep` does not.
    kept_count = last or (0 if tagged else None)
    options: dict[str, Any] = {
        "grace": grace,
        "last": kept_count,
        "ttl": None if ttl is None else ages.parse_age("--ttl", ttl),
        "dry_run": dry_run,
        "withdrawn": withdrawn,
    }
    with progress.count_bar("removing") as show:
        if hub_settings := registry_choice.shared_hub(settings):
            from adapterhub.hub.storage.bucket_gc import collect
            from adapterhub.hub.storage.shared_storage import open_shared

            with closing(open_shared(hub_settings)) as storage:
                return collect(storage, progress=show, **options)
        from adapterhub.maintenance.gc import gc

        with registry_choice.open_registry(settings) as registry:
            result = gc(registry, progress=show, **options)
            _pack_old(registry, result)
            return result


def _pack_old(registry: Registry, result: GcResult) -> None:
    """Pack what has been there for a day, if the registry asks for it, and add that to the result of its gc."""
    from adapterhub.maintenance import compress

    if not compress.is_wanted(registry):
        return
    # It can wait for everything else on the machine, and this process does little after it. A hub has lowered it already.
    if hasattr(os, "nice"):
        os.nice(max(0, _NICENESS - os.nice(0)))
    packed = [change for change in compress.pack_old(registry, dry_run=result.dry_run) if change.outcome == "packed"]
    result.packed, result.packed_saving = len(packed), sum(change.size - change.stored for change in packed)


def emit_swept(settings: Settings, swept: GcResult, served: SweepResult | None = None) -> None:
    """Print what a gc removed; `served` counts versions that were prepared for runtimes, which a hub doesn't have."""
    output.emit(_document(swept, served), as_json=settings.as_json, text=lambda: _text(swept, served))


def _document(swept: GcResult, served: SweepResult | None) -> dict[str, Any]:
    prepared = {"served": served.folders, "served_size": served.size, "served_held": served.in_use} if served else {}
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
        "packed": swept.packed,
        "packed_saving": swept.packed_saving,
        "waiting": swept.waiting,
        "waiting_size": swept.waiting_size,
        **prepared,
    }


def _text(swept: GcResult, served: SweepResult | None) -> None:
    remove, keep = ("would remove", "would keep") if swept.dry_run else ("removed", "kept")
    for ref in swept.dropped:
        output.write(f"{remove} {ref}")
    for ref in swept.parents:
        output.write(f"{keep} {ref}: a version that stays was made from it")
    counts = (
        (swept.blobs, swept.size, "blob"),
        (swept.conversions, swept.conversion_size, "cached conversion"),
        (served.folders if served else 0, served.size if served else 0, "served version"),
        (swept.leftovers, swept.leftover_size, "leftover"),
    )
    for count, size, noun in counts:
        if count:
            output.write(f"{remove} {output.plural(count, noun)}, {output.size(size)}")
    if swept.packed:
        pack = "would pack" if swept.dry_run else "packed"
        output.write(f"{pack} {output.plural(swept.packed, 'file')}, which saves {output.size(swept.packed_saving)}")
    if swept.waiting:
        output.write(
            f"{output.plural(swept.waiting, 'unused blob')}, {output.size(swept.waiting_size)}: within the grace period"
        )
    held_count = served.in_use if served else 0
    if held_count:
        output.write(f"{output.plural(held_count, 'served version')}: held by a running server")
    if not (swept.dropped or swept.packed or swept.waiting or held_count or any(count for count, _, _ in counts)):
        output.write("nothing to remove")
