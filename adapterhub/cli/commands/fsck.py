"""`adapterhub fsck`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import ages, output, remotes
from adapterhub.cli.options import Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.registry_choice import open_registry, registry_folder, shared_hub
from adapterhub.cli.views import finding_report as view
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.hub.settings import HubSettings
    from adapterhub.maintenance.findings import Findings
    from adapterhub.maintenance.fsck import Scope
    from adapterhub.registry.registry import Registry

_MAX_PART = 9  # characters


@command(
    "fsck",
    example="""
    adapterhub fsck
    adapterhub fsck --part 3/30
    adapterhub fsck --rebuild-index --registry ~/adapters
    adapterhub fsck --repair --from /backup/adapters""",
)
@click.option("--rebuild-index", "rebuild", is_flag=True, help="Rebuild registry.db from the store first.")
@click.option("--repair", is_flag=True, help="Restore missing or damaged blobs first.")
@click.option("--from", "source", metavar="SRC", help="Source: a registry, an image layout or an adapter's folder.")
@click.option("--quick", is_flag=True, help="Skip hashing blobs that have the right size.")
@click.option("--part", metavar="N/OF", help="Hash only one of OF parts of the blobs, such as 3/30: another one each day.")
@click.option("--since", metavar="AGE", help="From when on: hash only blobs stored since, like 7d or a date in UTC.")
@click.pass_obj
def fsck(
    settings: Settings,
    *,
    rebuild: bool,
    repair: bool,
    source: str | None,
    quick: bool,
    part: str | None,
    since: str | None,
) -> int:
    """Check a whole registry: every blob against its digest, every ref against its log, the index against both.

    Of a large registry, hash a part of the bytes each time: refs, logs and sizes are always checked completely.

    Nothing changes without --rebuild-index or --repair; --repair takes bytes from SRC, a path or an address. Exits 0 when
    clean, else 1. Harmless leftovers of a killed push are notes.
    """
    from adapterhub.maintenance import fsck as checks

    if repair != (source is not None):
        option, required = ("--repair", "--from SRC") if repair else ("--from", "--repair")
        raise UsageError(option, f"requires {required}", f"Pass {required} too", code="conflicting-options")
    if quick and (part or since):
        raise UsageError("--quick", "hashes nothing", "Leave out --part and --since", code="conflicting-options")
    scope = None if quick else checks.Scope(ages.parse_since(since) if since else 0, *_parse_part(part or "1/1"))
    # Opening the registry would refuse a broken index, so it is rebuilt first.
    shared = shared_hub(settings)
    if shared or not rebuild:
        registry = open_registry(settings)
        findings = checks.broken_log_findings(registry.rebuild_index()) if rebuild else []
    else:
        registry, findings = checks.open_rebuilt(registry_folder(settings))
    with registry:
        restored = _repair(registry, source) if source else []
        with bytes_bar("checking") as progress:
            findings += checks.fsck(registry, scope=scope, progress=progress)
        root = shared.location if shared else str(registry.root)
    if shared and scope:
        findings += _bucket_findings(shared, scope)
    if source:
        output.say(f"restored {output.plural(len(restored), 'blob')} from {output.one_line(source)}")
    return view.show(settings, root, findings, success_text="clean")


def _parse_part(text: str) -> tuple[int, int]:
    """Return the number of a part, and that of all parts."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and len(text) <= _MAX_PART and 1 <= int(part) <= int(parts)):
        raise UsageError("--part", f"{text[:40]!r} is not a part", "Write it like 3/30: 1/30 to 30/30 read each blob once")
    return int(part), int(parts)


def _bucket_findings(shared: HubSettings, scope: Scope) -> Findings:
    """Return the damaged blobs of a hub's bucket."""
    from adapterhub.hub.storage import bucket_check
    from adapterhub.hub.storage.shared_storage import open_bucket

    with closing(open_bucket(shared.blobs, shared.environ)) as bucket, bytes_bar("checking the bucket") as progress:
        return list(bucket_check.check(bucket, scope, progress))


def _repair(registry: Registry, source: str) -> list[str]:
    from adapterhub.maintenance.repair import repair
    from adapterhub.remotes.address_schemes import is_address

    if not is_address(source):
        return repair(registry, Path(source))
    with remotes.open_address(source) as remote:
        return repair(registry, remote.open_digest)
