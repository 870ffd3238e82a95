"""`adapterhub keep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.environment import (
    complete_ref,
    open_registry,
)
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    pass


@command(
    "keep",
    short="Say which versions gc keeps.",
    example="""
    adapterhub keep team/sql --last 5
    adapterhub keep team/sql --tagged
    adapterhub keep team/sql --all""",
)
@click.argument("name", shell_complete=complete_ref)
@click.option("--last", metavar="N", type=click.IntRange(min=1), help="The N newest, and what has a tag.")
@click.option("--tagged", is_flag=True, help="What has a tag.")
@click.option("--all", "everything", is_flag=True, help="Everything, as when nothing was said.")
@click.pass_obj
def keep(settings: Settings, *, name: str, last: int | None, tagged: bool, everything: bool) -> None:
    """Say which versions of a name `adapterhub gc` keeps. Without an option it says what holds.

    What a tag points to is always kept, and so is the newest version. This is an entry of the name's log.
    """
    from adapterhub.maintenance import retention
    from adapterhub.ref import Ref

    if everything and (last or tagged):
        raise UsageError("--all", "keeps everything", "Leave out --last and --tagged")
    target = Ref.parse(name)
    with open_registry(settings) as registry:
        if last or tagged or everything:
            retention.keep(registry, target, None if everything else last or 0)
        held = retention.kept(registry, target)
    text = f"{name}: every version" if held is None else f"{name}: {_newest(held)}what has a tag"
    document = {"name": name, "last": held, "tagged": held is not None}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


def _newest(last: int) -> str:
    return f"the {last} newest and " if last > 1 else "the newest and " if last else ""
