"""`adapterhub push`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.conversion_options import conversion_options
from adapterhub.cli.options import Settings, base_option, command, dry_run_option, expect_option, force_option, transfer_options
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import ref_at_remote, remote_option
from adapterhub.cli.version_results import render_push, show_plan
from adapterhub.manifest.package_files import Selection
from adapterhub.operations import push as push_operation
from adapterhub.operations import source_names
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.registry.adapter_recipe import Conversion


@command(
    "push",
    example="""
    adapterhub push ./sql team/sql
    adapterhub push ./sql team/sql:prod --base ./Qwen3-0.6B
    adapterhub push ./sql team/sql -m "twice the data" --metric exact_match=0.71
    adapterhub push ./sql team/sql:prod --expect sha256:5f2c…
    adapterhub push ./sql team/sql --dry-run
    adapterhub push team/sql --remote
    adapterhub push team/sql:v2 oci://registry.example/team/sql:v2""",
)
@click.argument("source", metavar="SRC")
@click.argument("ref", required=False)
@base_option("pin it as the model the adapter was trained on; an adapter that does not fit is refused.")
@expect_option
@force_option("push even if `adapterhub validate` reports errors.")
@click.option("--include", metavar="GLOB", multiple=True, help="Package only files that match, besides weights and config.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out files that match, like `*.png`; repeatable.")
@click.option("-m", "--message", metavar="TEXT", default="", help="Record a reason, which `adapterhub log` shows.")
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Point a tag at the version as well; repeatable.")
@click.option(
    "--metric", "metrics", metavar="NAME=VALUE", multiple=True, help="Record a result of another program; repeatable."
)
@click.option("--private", is_flag=True, help="Create the Hub repository as private.")
@dry_run_option
@remote_option
@conversion_options("image")
@transfer_options
@click.pass_obj
def push(
    settings: Settings,
    *,
    source: str,
    ref: str | None,
    base: str | None,
    expect: str | None,
    force: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    message: str,
    tags: tuple[str, ...],
    metrics: tuple[str, ...],
    private: bool,
    dry_run: bool,
    remote: str | None,
    conversion: Conversion | None,
) -> None:
    """Store an adapter as the next version of a name.

    REF is namespace/name, or namespace/name:tag to move a tag as well; the version number, v1, v2 …, is assigned. Pushing the
    same files again creates no new version. An adapter with errors is refused. The registry is created if needed. Checkpoints,
    optimizer states, scripts and dotfiles are left out, and so is what --exclude or .adapterhubignore matches. REF may also be
    an address like oci://HOST/NAME[:TAG] or hf://ORG/NAME[@BRANCH], or a ref on a remote; with --remote alone, SRC is a ref and
    keeps its name and tag there. --to converts the adapter first and records SRC as its parent; `--to image`, at remotes only,
    pushes a container image.
    """
    ref = ref or _ref_of_source(source, settings, remote)
    if dry_run:
        from adapterhub.operations import transfer_plans

        plan = transfer_plans.plan_push(
            source,
            ref_at_remote(ref, remote),
            workspace(settings),
            base=inputs.read_base(base, settings) if base else None,
            conversion=conversion,
            expect=expect,
            force=force,
            name=None if remote is None else ref.partition(":")[0],
            selection=Selection(include, exclude) if include or exclude else None,
        )
        show_plan(plan, "pushed", as_json=settings.as_json)
        return
    result = push_operation.push(
        source,
        ref_at_remote(ref, remote),
        base=inputs.read_base(base, settings) if base else None,
        to=conversion,
        expect=expect,
        force=force,
        private=private,
        name=None if remote is None else ref.partition(":")[0],
        selection=Selection(include, exclude) if include or exclude else None,
        message=message,
        tags=tags,
        metrics=dict(map(_metric, metrics)),
        workspace=workspace(settings),
    )
    # A log has an entry only for a move, so there is nothing to record the message in.
    if message and not (result.new or result.moved):
        output.say("nothing has changed, so the message is not recorded")
    report = render_push(result)
    output.emit(report.document, as_json=settings.as_json, text=lambda: output.write(report.text))


def _metric(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise UsageError("--metric", f"{text[:80]!r} is not NAME=VALUE", "Write it like exact_match=0.71") from error


def _ref_of_source(source: str, settings: Settings, remote: str | None) -> str:
    """Return the name and tag of a ref that is pushed to a remote without another one; the number is assigned there."""
    if remote is None:
        example = shlex.join(["adapterhub", "push", source, source_names.suggested_name(Path(source))])
        raise UsageError("push", "Missing argument 'REF'", f"Name it, like `{example}`")
    source_ref = inputs.ref_of(source, settings)
    if source_ref is None:
        raise UsageError(source, "is not a ref, so it has no name on the remote", "Write NAMESPACE/NAME after it")
    return f"{source_ref.name}:{source_ref.tag}" if source_ref.tag else source_ref.name
