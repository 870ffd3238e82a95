"""`adapterhub keep`."""

from __future__ import annotations

import click

from adapterhub.cli import ages, catalogs, output
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import remote_option
from adapterhub_converters.errors import UsageError


@command(
    "keep",
    example="""
    adapterhub keep team/sql --last 5
    adapterhub keep team/sql --last 3 --for 90d
    adapterhub keep team/sql --tagged
    adapterhub keep team/sql --all --remote""",
)
@click.argument("name")
@click.option("--last", metavar="N", type=click.IntRange(min=1), help="Keep the N newest versions and those with a tag.")
@click.option("--for", "ttl", metavar="AGE", help="Keep versions pushed within AGE, like 90d, the newest and those with a tag.")
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
    ttl: str | None,
    tagged: bool,
    everything: bool,
    dry_run: bool,
    remote: str | None,
) -> None:
    """Choose which versions of a name `adapterhub gc` keeps. Without an option, show the choice.

    Tagged versions and the newest version are always kept. The choice is an entry in the name's log. NAME may be on a hub of
    adapterhub, where an admin of its namespace chooses.
    """
    from adapterhub.manifest.keep_rule import keep_rule
    from adapterhub.ref import parse_name

    if everything and (last or ttl or tagged):
        problem = "cannot be combined with --last, --for or --tagged"
        raise UsageError("--all", problem, "Leave them out", code="conflicting-options")
    # 0: of those without a tag, only what --for says.
    rule = keep_rule(last or (0 if tagged else None), None if ttl is None else ages.parse_age("--for", ttl))
    with catalogs.catalog_of(settings, name, remote, "retention of versions", dry_run=dry_run) as (catalog, target):
        kept_name = parse_name(str(target), name)
        if rule or everything:
            catalog.keep(kept_name, rule)
        else:
            rule = catalog.retention(kept_name)
    text = f"{kept_name}: {rule or 'every version'}"
    ttl_seconds = rule.ttl or None if rule else None
    document = {"name": kept_name, "last": rule.last if rule else None, "ttl": ttl_seconds, "tagged": rule is not None}
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
