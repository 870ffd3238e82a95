"""`adapterhub attach`."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import attachments, output
from adapterhub.cli.options import Settings, command


@command(
    "attach",
    example="""
    adapterhub attach oci://registry.example/team/sql:v2 scan.json --type application/vnd.example.scan+json
    adapterhub attach layout://adapters.tar:team/sql:v2 model.sig --type application/vnd.example.signature""",
)
@click.argument("address", metavar="ADDRESS")
@click.argument("files", metavar="FILE…", nargs=-1, required=True)
@click.option("--type", "kind", metavar="TYPE", required=True, help="Media type: how others find the attachment.")
@click.pass_obj
def attach(settings: Settings, *, address: str, files: tuple[str, ...], kind: str) -> None:
    """Attach files to a version in an OCI registry or an image layout; the version and its digest do not change.

    An attachment is a manifest of its own with the version as its subject (an OCI referrer), which `oras discover` and cosign
    find too. Attaching the same files under the same type again changes nothing.
    """
    from adapterhub.remotes.oci import referrers

    with attachments.open_referrers(address) as (registry, parsed):
        subject = registry.manifest(parsed.reference)
        added = referrers.attach_files(registry, subject, kind, [Path(file) for file in files])
    document = {"ref": str(parsed), "subject": subject.digest, **attachments.document(added)}
    text = (
        f"{parsed.repository}@{output.digest(added.digest)}  {added.artifact_type}, attached to {output.digest(subject.digest)}"
    )
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
