"""`adapterhub copy`."""

from __future__ import annotations

import click

from adapterhub.cli import attachments, output
from adapterhub.cli.options import Settings, command, dry_run_option, transfer_options
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.version_results import render_pull, render_push, show_plan
from adapterhub.operations import copy as copy_operation
from adapterhub.operations.pull import PullResult


@command(
    "copy",
    example="""
    adapterhub copy team/sql:v2 oci://registry.example/team/sql:v2
    adapterhub copy oci://registry.example/team/sql:v2 team/sql
    adapterhub copy oci://registry.example/team/sql:v2 ./sql""",
)
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--referrers", is_flag=True, help="Copy other attachments too, between registries and image layouts.")
@dry_run_option
@transfer_options
@click.pass_obj
def copy(settings: Settings, source: str, target: str, *, referrers: bool, dry_run: bool) -> None:
    """Copy a version under the same digest, between any two places.

    FROM and TO are each a ref in this registry, a folder, or an address: oci://HOST/NAME[:TAG|@DIGEST] or
    hf://ORG/NAME[@REVISION]. Write a folder that could be a ref as ./NAME. Blobs that TO already has are not sent again.
    Signatures are copied too, to a place that stores them.
    """
    if dry_run:
        from adapterhub.operations import transfer_plans

        plan = transfer_plans.plan_copy(source, target, workspace(settings))
        show_plan(plan, "copied", as_json=settings.as_json)
        return
    if referrers:  # attachments come first, so that a tag never leads to a version without them
        output.say(f"{output.plural(attachments.copy_attachments(source, target), 'attachment')} copied")
    result = copy_operation.copy(source, target, workspace(settings))
    document, text = render_pull(result) if isinstance(result, PullResult) else render_push(result)
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))
