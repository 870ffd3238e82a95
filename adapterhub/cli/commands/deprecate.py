"""`adapterhub deprecate`."""

from __future__ import annotations

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import remote_option
from adapterhub_converters.errors import UsageError


@command(
    "deprecate",
    example="""
    adapterhub deprecate team/sql:v2 "overfits; use v3"
    adapterhub deprecate team/sql --undo""",
)
@click.argument("ref")
@click.argument("message", required=False, default="")
@click.option("-m", "--message", "reason", metavar="TEXT", default="", help="Record a reason, as MESSAGE does.")
@click.option("--undo", is_flag=True, help="Undo it: withdraw the warning.")
@dry_run_option
@remote_option
@click.pass_obj
def deprecate(
    settings: Settings, *, ref: str, message: str, reason: str, undo: bool, dry_run: bool, remote: str | None
) -> None:
    """Mark a version as deprecated, or with a bare name all its versions: every command that uses it prints a warning.

    Deprecated versions still work.
    """
    from adapterhub.ref import Ref

    if message and reason:
        raise UsageError("--message", "is there, and MESSAGE too", "Leave one out", code="conflicting-options")
    message = message or reason
    if undo and message:
        raise UsageError("--undo", "cannot be combined with MESSAGE", "Leave one out", code="conflicting-options")
    with catalogs.catalog_of(settings, ref, remote, "deprecation of versions", dry_run=dry_run) as (catalog, target):
        number = catalog.deprecate(target, message, undo=undo)
    name = str(Ref(target.name, number=number or None))
    document = {"name": target.name, "number": number or None, "deprecated": None if undo else message}
    text = f"{name} is {'no longer ' if undo else ''}deprecated"
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
