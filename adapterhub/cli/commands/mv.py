"""`adapterhub mv`."""

from __future__ import annotations

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.remote_choice import place_words, ref_at_remote, remote_option


@command(
    "mv",
    example="""
    adapterhub mv team/sql team/text2sql
    adapterhub mv team/sql team/text2sql --remote""",
)
@click.argument("name", metavar="OLD", shell_complete=complete_ref)
@click.argument("new_name", metavar="NEW")
@dry_run_option
@remote_option
@click.pass_obj
def mv(settings: Settings, *, name: str, new_name: str, dry_run: bool, remote: str | None) -> None:
    """Rename a name: its versions keep their numbers, digests, tags, messages and what was recorded of them but approvals.

    The old name says where they are; on a hub of adapterhub, it leads there. NEW must be free, or a name that was moved to OLD,
    which is moved back. A tag that is protected or has requirements is refused. If it is interrupted, the same command goes on.
    """
    from adapterhub.ref import parse_name
    from adapterhub.remotes.address_schemes import is_address

    with catalogs.catalog_of(settings, name, remote, "renaming", dry_run=dry_run) as (catalog, target):
        old, new = parse_name(str(target), name), parse_name(new_name, new_name)
        versions = catalog.mv(old, new)
    document = {"from": old, "to": new, "versions": versions}
    address = ref_at_remote(name, remote)
    leads = f"; {old} leads there" if is_address(address) else ""
    # A remote whose address has a namespace is given names without it.
    undo = f"mv {new} {old}{place_words(remote)}" if str(target) == name else f"mv {address.removesuffix(old)}{new} {old}"
    text = f"{old} is now {new}, with {output.plural(versions, 'version')}{leads}; `adapterhub {undo}` undoes it"
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
