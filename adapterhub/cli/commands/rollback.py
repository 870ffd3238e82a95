"""`adapterhub rollback`."""

from __future__ import annotations

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import remote_option


@command(
    "rollback",
    example="""
    adapterhub rollback team/sql:prod -m "wrong dates since noon"
    adapterhub rollback team/sql:prod --remote""",
)
@click.argument("ref", metavar="NAME:TAG", shell_complete=complete_ref)
@click.option("-m", "--message", metavar="TEXT", default="", help="Record a reason, for the log.")
@dry_run_option
@remote_option
@click.pass_obj
def rollback(settings: Settings, *, ref: str, message: str, dry_run: bool, remote: str | None) -> None:
    """Point a tag at the version it had before: one step back, to a version that was not withdrawn.

    That version met the requirements of the tag when it had it, so that they are not asked again. Another rollback goes a
    further step back. A protected tag stays.
    """
    with catalogs.catalog_of(settings, ref, remote, "rollbacks", dry_run=dry_run) as (catalog, target):
        left, current = catalog.rollback(target, message)
    document = {
        "name": current.name,
        "tag": target.tag,
        "number": current.number,
        "digest": current.digest,
        "left": {"number": left.number, "digest": left.digest},
        "message": message or None,
    }
    text = f"{current.name}:{target.tag} is {current.ref} again, and was v{left.number}"
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
