"""`adapterhub rm`."""

from __future__ import annotations

import click

from adapterhub.cli import output
from adapterhub.cli.environment import complete_ref, open_registry
from adapterhub.cli.options import Settings, command, expect_option, force_option


@command(
    "rm",
    example="""
    adapterhub rm team/sql:prod
    adapterhub rm team/sql""",
)
@click.argument("ref", shell_complete=complete_ref)
@expect_option
@force_option("remove a name even if other adapters in the registry were made from it.")
@click.pass_obj
def rm(settings: Settings, *, ref: str, expect: str | None, force: bool) -> None:
    """Remove a tag, or a name with all its versions.

    A single version cannot be removed: versions are immutable. A removed name is never given to another adapter. The bytes
    stay until `adapterhub gc`. A name that others were merged or converted from is refused (exit 6), because they could not be
    rebuilt.
    """
    from adapterhub.ref import Ref

    target = Ref.parse(ref)
    with open_registry(settings) as registry:
        registry.rm(target, expect=expect, force=force)
    kind = "tag" if target.tag else "name"
    output.emit(
        {"removed": str(target), "kind": kind}, as_json=settings.as_json, text=lambda: output.write(f"removed {kind} {target}")
    )
