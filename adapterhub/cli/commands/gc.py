"""`adapterhub gc`."""

from __future__ import annotations

import importlib
from typing import Any

import click

from adapterhub.cli.gc_report import emit_swept, sweep, sweep_options
from adapterhub.cli.options import Settings, command
from adapterhub.cli.registry_choice import workspace


@command(
    "gc",
    example="""
    adapterhub gc --dry-run
    adapterhub gc --grace 0
    adapterhub gc --keep-last 5
    adapterhub gc --ttl 30d""",
)
@sweep_options(0)
@click.pass_obj
def gc(settings: Settings, /, **options: Any) -> None:
    """Remove unused data: bytes of removed names and dropped versions, and leftovers of killed commands.

    Versions are dropped only where `adapterhub keep` or these options request it; `keep` wins. A version stays as long as
    another was merged or converted from it. Withdrawn versions stay for the audit until --withdrawn, which ignores both rules.
    Data released or stored less than HOURS ago stays, and so does whatever a running push or pull needs, so this is safe at
    any time. Versions that `adapterhub resolve` prepared for a runtime stay for 30 days after they were last resolved, and as
    long as a running server holds them. With `pack = true` in the registry's adapterhub.toml, it packs versions of over a day.
    """
    swept = sweep(settings, **options)
    # After the registry is closed: the cache of prepared versions is a folder of its own, and serving no part of a registry.
    resolving = importlib.import_module("adapterhub.serve.resolving")
    served = resolving.served_folder(workspace(settings)).sweep(dry_run=swept.dry_run)
    emit_swept(settings, swept, served)
