"""`adapterhub fsck`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output, remotes
from adapterhub.cli.options import Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.registry_choice import open_registry, registry_folder, shared_hub
from adapterhub.cli.views import finding_report as view
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.hub.settings import HubSettings
    from adapterhub.maintenance.findings import Findings
    from adapterhub.registry.registry import Registry


@command(
    "fsck",
    example="""
    adapterhub fsck
    adapterhub fsck --rebuild-index --registry ~/adapters
    adapterhub fsck --repair --from /backup/adapters""",
)
@click.option("--rebuild-index", "rebuild", is_flag=True, help="Rebuild registry.db from the store first.")
@click.option("--repair", is_flag=True, help="Restore missing or damaged blobs first.")
@click.option("--from", "source", metavar="SRC", help="Source: a registry, an image layout or an adapter's folder.")
@click.option("--quick", is_flag=True, help="Skip hashing blobs that have the right size.")
@click.pass_obj
def fsck(settings: Settings, *, rebuild: bool, repair: bool, source: str | None, quick: bool) -> int:
    """Check a whole registry: every blob against its digest, every ref against its log, the index against both.

    Nothing changes without --rebuild-index or --repair; --repair takes bytes from SRC, a path or an address. Exits 0 when
    clean, else 1. Harmless leftovers of a killed push are notes.
    """
    from adapterhub.maintenance import fsck as checks

    if repair != (source is not None):
        option, required = ("--repair", "--from SRC") if repair else ("--from", "--repair")
        raise UsageError(option, f"requires {required}", f"Pass {required} too", code="conflicting-options")
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
            findings += checks.fsck(registry, quick=quick, progress=progress)
        root = shared.location if shared else str(registry.root)
    if shared and not quick:
        findings += _bucket_findings(shared)
    if source:
        output.say(f"restored {output.plural(len(restored), 'blob')} from {output.one_line(source)}")
    return view.show(settings, root, findings, success_text="clean")


def _bucket_findings(shared: HubSettings) -> Findings:
    """Return the damaged blobs of a hub's bucket."""
    from adapterhub.hub.storage import bucket_check
    from adapterhub.hub.storage.shared_storage import open_bucket

    with closing(open_bucket(shared.blobs, shared.environ)) as bucket, bytes_bar("checking the bucket") as progress:
        return list(bucket_check.check(bucket, progress))


def _repair(registry: Registry, source: str) -> list[str]:
    from adapterhub.maintenance.repair import repair
    from adapterhub.remotes.address_schemes import is_address

    if not is_address(source):
        return repair(registry, Path(source))
    with remotes.open_address(source) as remote:
        return repair(registry, remote.open_digest)
