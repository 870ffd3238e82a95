"""`adapterhub verify`."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import inputs
from adapterhub.cli.environment import complete_ref, open_registry
from adapterhub.cli.options import Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views import findings as view
from adapterhub_converters.errors import IntegrityError


@command(
    "verify",
    example="""
    adapterhub verify team/sql:v2
    adapterhub verify ./sql""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@click.pass_obj
def verify(settings: Settings, source: str) -> int:
    """Compare bytes with digests: a folder with its adapter.json, a version here or at an address with its manifest.

    Exits 0 when every byte matches, else 1.
    """
    from adapterhub.maintenance import fsck
    from adapterhub.maintenance.findings import Finding
    from adapterhub.maintenance.fsck import verify_folder

    ref = inputs.ref_of(source, settings)
    try:
        if inputs.is_elsewhere(source):
            with inputs.opened(source, settings) as found:  # verified as it is fetched
                findings = verify_folder(found.folder)
            return view.show(settings, source, findings, good="every byte matches")
        with bytes_bar("verifying") as progress:
            if ref is None:
                findings = verify_folder(Path(source), progress)
            else:
                with open_registry(settings) as registry:
                    findings = fsck.verify(registry, ref, progress)
    except IntegrityError as error:  # the document with the digests
        findings = [Finding("unreadable", "error", error.where, error.what, error.hint, error.code)]
    return view.show(settings, source, findings, good="every byte matches")
