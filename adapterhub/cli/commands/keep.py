"""`adapterhub keep`."""

from __future__ import annotations

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import remote_option
from adapterhub_converters.errors import UsageError


@command(
    "keep",
    example="""
    adapterhub keep team/sql --last 5
    adapterhub keep team/sql --tagged
    adapterhub keep team/sql --all --remote""",
)
@click.argument("name")
@click.option("--last", metavar="N", type=click.IntRange(min=1), help="Keep the N newest versions and those with a tag.")
@click.option("--tagged", is_flag=True, help="Keep versions with a tag.")
@click.option("--all", "everything", is_flag=True, help="Keep every version (the default).")
@dry_run_option
@remote_option
@click.pass_obj
def keep(
    settings: Settings,
    *,
    name: str,
    last: int | None,
    tagged: bool,
    everything: bool,
    dry_run: bool,
    remote: str | None,
) -> None:
    """Choose which versions of a name `adapterhub gc` keeps. Without an option, show the choice.

    Tagged versions and the newest version are always kept. The choice is an entry in the name's log. NAME may be on a hub of
    adapterhub, where an admin of its namespace chooses.
    """
    from adapterhub.ref import parse_name

    if everything and (last or tagged):
        raise UsageError("--all", "cannot be combined with --last or --tagged", "Leave them out", code="conflicting-options")
    with catalogs.catalog_of(settings, name, remote, "retention of versions", dry_run=dry_run) as (catalog, target):
        kept_name = parse_name(str(target), name)
        if last or tagged or everything:
            # 0: only the newest version and those with a tag.
            count = None if everything else last or 0
            catalog.keep(kept_name, count)
        else:
            count = catalog.retention(kept_name)
    text = (
        f"{kept_name}: every version"
        if count is None
        else f"{kept_name}: {f'the {count} newest and ' if count > 1 else 'the newest and ' if count else ''}tagged versions"
    )
    document = {"name": kept_name, "last": count, "tagged": count is not None}
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
