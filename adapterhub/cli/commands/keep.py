"""`adapterhub keep`."""

from __future__ import annotations

from contextlib import nullcontext

import click

from adapterhub.cli import output
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.registry_choice import open_registry
from adapterhub_converters.errors import UsageError


@command(
    "keep",
    example="""
    adapterhub keep team/sql --last 5
    adapterhub keep team/sql --tagged
    adapterhub keep team/sql --all""",
)
@click.argument("name")
@click.option("--last", metavar="N", type=click.IntRange(min=1), help="Keep the N newest versions and those with a tag.")
@click.option("--tagged", is_flag=True, help="Keep versions with a tag.")
@click.option("--all", "everything", is_flag=True, help="Keep every version (the default).")
@dry_run_option
@click.pass_obj
def keep(settings: Settings, *, name: str, last: int | None, tagged: bool, everything: bool, dry_run: bool) -> None:
    """Choose which versions of a name `adapterhub gc` keeps. Without an option, show the choice.

    Tagged versions and the newest version are always kept. The choice is an entry in the name's log.
    """
    from adapterhub.maintenance import retention
    from adapterhub.ref import Ref
    from adapterhub.registry.rehearsal import rehearsal

    if everything and (last or tagged):
        raise UsageError("--all", "cannot be combined with --last or --tagged", "Leave them out", code="conflicting-options")
    target = Ref.parse(name)
    with open_registry(settings) as registry, rehearsal(registry) if dry_run else nullcontext():
        if last or tagged or everything:
            # 0: only the newest version and those with a tag.
            retention.keep(registry, target, None if everything else last or 0)
        count = retention.retention_limit(registry, target)
    text = (
        f"{name}: every version"
        if count is None
        else f"{name}: {f'the {count} newest and ' if count > 1 else 'the newest and ' if count else ''}tagged versions"
    )
    document = {"name": name, "last": count, "tagged": count is not None}
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
