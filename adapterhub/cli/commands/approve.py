"""`adapterhub approve`."""

from __future__ import annotations

import click

from adapterhub.cli import catalogs, output, signing_options
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import remote_option


@command(
    "approve",
    example="""
    adapterhub approve team/sql:v4 --for prod -m "read 40 answers" --key ana.key
    adapterhub approve team/sql:v4 --for prod -m "read 40 answers" --remote""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.option("--for", "tag", metavar="TAG", required=True, help="Tag that the version is approved for.")
@click.option("-m", "--message", metavar="TEXT", required=True, help="Record a reason, for the log: what was looked at.")
@signing_options.optional_signer
@dry_run_option
@remote_option
@click.pass_obj
def approve(
    settings: Settings,
    *,
    ref: str,
    tag: str,
    message: str,
    signer: signing_options.SignerOption | None,
    dry_run: bool,
    remote: str | None,
) -> None:
    """Approve a version for a tag: a statement about its digest, by your key or, on a hub, by your account.

    A requirement `approvals = 2` of the tag counts people: two accounts, or two of the keys in `approvers`, never one twice.
    The statement is an entry of the log, and counts for these bytes and this tag only.
    """
    with catalogs.catalog_of(settings, ref, remote, "approvals", dry_run=dry_run) as (catalog, target):
        bundle = b""
        if signer is not None:
            from adapterhub.trust import release_claims

            digest, claim = catalog.show(target)["digest"], release_claims.APPROVAL
            bundle = release_claims.sign(claim, target.name, digest, signer.read(), text=message, tag=tag)
        version = catalog.approve(target, tag, message, bundle)
    document = {"ref": str(version.ref), "digest": version.digest, "tag": tag, "signed": bool(bundle), "message": message}
    text = f"{version.ref} ({output.digest(version.digest)}) is approved for {tag}"
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
