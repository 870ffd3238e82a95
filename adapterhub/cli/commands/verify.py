"""`adapterhub verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs
from adapterhub.cli.environment import (
    complete_ref,
    open_registry,
)
from adapterhub.cli.options import Settings, command
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.views import findings as view
from adapterhub_converters.errors import IntegrityError

if TYPE_CHECKING:
    pass


@command(
    "verify",
    short="Compare bytes with their digests.",
    example="""
    adapterhub verify team/sql:v2
    adapterhub verify ./sql""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@click.pass_obj
def verify(settings: Settings, source: str) -> int:
    """Compare bytes with their digests: a folder with its adapter.json, a version here or elsewhere with its manifest.

    Exits 0 when every byte is right, 1 when one is not.
    """
    from adapterhub.maintenance import fsck
    from adapterhub.maintenance.fsck import Finding, verify_folder

    ref = inputs.ref_of(source, settings)
    try:
        if inputs.is_elsewhere(source):
            with inputs.opened(source, settings) as found:  # which compares as it fetches
                findings = verify_folder(found.folder)
            return view.show(settings, source, findings, good="every byte is right")
        with bytes_bar("verifying") as progress:
            if ref is None:
                findings = verify_folder(Path(source), progress)
            else:
                with open_registry(settings) as registry:
                    findings = fsck.verify(registry, ref, progress)
    except IntegrityError as error:  # the very document that names the digests
        findings = [Finding("unreadable", "error", error.where, error.what, error.hint, error.code)]
    return view.show(settings, source, findings, good="every byte is right")
