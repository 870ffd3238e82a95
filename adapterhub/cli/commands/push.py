"""`adapterhub push`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub.cli import output, publish
from adapterhub.cli.environment import (
    at_remote,
    complete_ref,
    remote_option,
)
from adapterhub.cli.options import Settings, command, conversion_options, transfer_options

if TYPE_CHECKING:
    from adapterhub.registry.recipe import Conversion


@command(
    "push",
    short="Store an adapter as a new version.",
    example="""
    adapterhub push ./sql team/sql
    adapterhub push ./sql team/sql:prod --base ./Qwen3-0.6B
    adapterhub push ./sql team/sql:prod --expect sha256:5f2c…
    adapterhub push team/sql:v2 team/sql:v2 --remote
    adapterhub push team/sql:v2 oci://registry.example/team/sql:v2""",
)
@click.argument("source", metavar="SRC")
@click.argument("ref", shell_complete=complete_ref)
@click.option(
    "--base", metavar="BASE", help="Pin the model it was trained on (a folder, a file, a URL); refused when it does not fit."
)
@click.option("--expect", metavar="DIGEST", help="Fail (exit 7) unless REF still has this digest, or is `absent`.")
@click.option("--force", is_flag=True, help="Push in spite of what validate calls errors.")
@click.option("--private", is_flag=True, help="On a hub: a repository that has to be made is not for everybody to read.")
@remote_option
@conversion_options(
    "Convert it first, and name SRC as its parent; `image`, elsewhere only: a container image of it.", more=("image",)
)
@transfer_options
@click.pass_obj
def push(
    settings: Settings,
    *,
    source: str,
    ref: str,
    base: str | None,
    expect: str | None,
    force: bool,
    private: bool,
    remote: str | None,
    conversion: Conversion | None,
) -> None:
    """Store an adapter as the next version of a name.

    REF is namespace/name, or namespace/name:tag to move a tag as well; the version's number, v1, v2 …, is allotted.
    The same files again make no new version. What validate calls an error is refused. The registry is made if there is none.
    REF may be an address elsewhere, like oci://HOST/NAME[:TAG] or hf://ORG/NAME[@BRANCH], or on a remote.
    """
    name = None if remote is None else ref.partition(":")[0]
    made = publish.push(
        settings,
        source,
        at_remote(ref, remote),
        base=base,
        expect=expect,
        force=force,
        private=private,
        conversion=conversion,
        name=name,
    )
    output.emit(made.document, as_json=settings.as_json, text=lambda: output.write(made.text))
