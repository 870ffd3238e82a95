"""`adapterhub rm`."""

from __future__ import annotations

import sys

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.options import Settings, command, dry_run_option, expect_option, force_option, yes_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import place_words, ref_at_remote, remote_option
from adapterhub.operations import tag
from adapterhub_converters.errors import UsageError


@command(
    "rm",
    example="""
    adapterhub rm team/sql:prod
    adapterhub rm team/sql -y""",
)
@click.argument("ref")
@yes_option
@expect_option
@force_option("remove a name even if other adapters in the registry were made from it.")
@dry_run_option
@remote_option
@click.pass_obj
def rm(settings: Settings, *, ref: str, yes: bool, expect: str | None, force: bool, dry_run: bool, remote: str | None) -> None:
    """Remove a tag, or a name with all its versions.

    On a terminal, removing a name asks first. `adapterhub restore` brings a name back until `adapterhub gc` removes its
    data, and `adapterhub tag NAME:TAG --restore` a tag. A single version cannot be removed: versions are immutable. A name that
    others were merged or converted from is refused (exit 6), because they could not be rebuilt. REF may be on a hub of
    adapterhub; at other addresses, only a tag can be removed.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.address_schemes import is_address

    address = ref_at_remote(ref, remote)
    opened = catalogs.open_hub(address, dry_run=dry_run) if is_address(address) else None
    if is_address(address) and opened is None:
        if dry_run:
            catalogs.refuse_dry_run(address)
        if expect:
            raise UsageError("--expect", "is for a registry or a hub of adapterhub", "Leave it out", code="conflicting-options")
        tag.untag(address, workspace(settings))
        document = {"removed": address, "kind": "tag"}
        output.emit(document, as_json=settings.as_json, text=lambda: output.write(f"removed tag {address}"))
        return
    target = Ref.parse(ref) if opened is None else opened[1]
    kind = "tag" if target.tag else "name"
    with catalogs.open_to_change(settings, opened, dry_run=dry_run) as catalog:
        # Only a person at a terminal is asked: a program would wait forever.
        if kind == "name" and not (yes or dry_run or settings.as_json) and sys.stdin.isatty():
            versions = output.plural(len(catalog.list(target.name).rows), "version")
            if not output.confirm(f"Remove {target} with {versions}?"):
                output.say("nothing was removed")
                raise SystemExit(1)
        catalog.rm(target, expect=expect, force=force)
    undo = f"tag {ref} --restore" if target.tag else f"restore {ref}"
    text = f"removed {kind} {target}; `adapterhub {undo}{place_words(remote)}` undoes it"
    document = {"removed": str(target), "kind": kind}
    output.emit_change(document, as_json=settings.as_json, text=lambda: output.write(text), dry_run=dry_run)
