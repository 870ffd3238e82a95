"""`adapterhub rm`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.environment import (
    complete_ref,
    open_registry,
)
from adapterhub.cli.options import EXPECT, Settings, command

if TYPE_CHECKING:
    pass


@command(
    "rm",
    short="Remove a tag or a name.",
    example="""
    adapterhub rm team/sql:prod
    adapterhub rm team/sql""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.option("--expect", metavar="DIGEST", help=EXPECT)
@click.option("--force", is_flag=True, help="Also a name from which others in the registry were made.")
@click.pass_obj
def rm(settings: Settings, *, ref: str, expect: str | None, force: bool) -> None:
    """Remove a tag, or a whole name with all its versions.

    A single version is never removed: versions are immutable. A removed name is not given to another adapter. The bytes stay
    until `adapterhub gc`. A name from which others were merged or converted is refused (exit 6), as those could not be made
    again.
    """
    from adapterhub.ref import Ref

    target = Ref.parse(ref)
    with open_registry(settings) as registry:
        registry.rm(target, expect=expect, force=force)
    kind = "tag" if target.tag else "name"
    output.emit(
        {"removed": str(target), "kind": kind}, as_json=settings.as_json, text=lambda: output.write(f"removed {kind} {target}")
    )
