"""`adapterhub list`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterhub.cli import environment, output, remotes
from adapterhub.cli.environment import complete_ref, open_registry, remote_option
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.views import tree
from adapterhub.cli.views.versions import row_document, write_rows
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.index.queries import Row


@command(
    "list",
    example="""
    adapterhub list
    adapterhub list team --tree
    adapterhub list team/sql --json
    adapterhub list team --remote
    adapterhub list oci://registry.example/team/sql""",
)
@click.argument("prefix", metavar="[PREFIX]", required=False, shell_complete=complete_ref)
@click.option("--tree", "as_tree", is_flag=True, help="Group by namespace and name, with the parents of each version.")
@remote_option
@click.pass_obj
def list_(settings: Settings, prefix: str | None, *, as_tree: bool, remote: str | None) -> None:
    """List versions, the newest of each name first.

    PREFIX is a namespace or a name. An address, oci://HOST/NAME or hf://ORG/NAME, lists the tags there; a remote lists its
    names, or the tags of one name. A narrow terminal shows fewer columns, and of a tree the newest and the tagged versions; a
    pipe and --json get everything.
    """
    from adapterhub.remotes.location import is_address

    if remote is not None:
        _on_remote(settings, prefix, remote, as_tree=as_tree)
        return
    if prefix and is_address(prefix):
        _tags(settings, prefix, as_tree=as_tree)
        return
    with open_registry(settings) as registry:
        rows = registry.list(prefix)
        if prefix and not rows:
            raise NotFoundError(prefix, "no adapter of this name or namespace", "Run `adapterhub list`")
        found = registry.deprecations()
    for (name, number), message in sorted(found.items()) if rows else ():
        if any(row.name == name and number in (0, row.number) for row in rows):
            output.deprecated(f"{name}:v{number}" if number else name, message)
    document = tree.document(rows, found) if as_tree else {"adapters": [row_document(row, found) for row in rows]}
    output.emit(document, as_json=settings.as_json, text=lambda: _list_text(rows, as_tree=as_tree))


def _list_text(rows: Sequence[Row], *, as_tree: bool) -> None:
    if not rows:
        output.say("no adapters yet; store one with `adapterhub push SRC namespace/name`")
        return
    if as_tree:
        for line in tree.lines(rows, screen=output.width()):
            output.write(line)
        return
    write_rows(rows, Column("PUSHED", drop=6), lambda row: row.time[:10])


def _tags(settings: Settings, text: str, *, as_tree: bool) -> None:
    """List the tags at an address."""
    from adapterhub.remotes.location import parse

    address = parse(text)
    if as_tree or address.tag or address.digest:
        raise UsageError("--tree" if as_tree else text, "an address lists the tags of a name", f"Write {address.repository}")
    with remotes.connect(address) as remote:
        tags = remote.tags()
        commits = remote.commits
    if not tags:
        output.say("no tags")
    lines = [f"{address.repository}{address.mark}{tag}  {commits.get(tag, '')}".rstrip() for tag in tags]
    document = {"repository": address.repository, "tags": tags, **({"commits": commits} if commits else {})}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_lines(lines))


def _on_remote(settings: Settings, prefix: str | None, name: str, *, as_tree: bool) -> None:
    """List the tags of a name on a remote, or its names."""
    from adapterhub.remotes import access
    from adapterhub.remotes.configured import NOBODY, below

    found = environment.remote_to_ask(name)
    if as_tree or (prefix and "/" in prefix):
        _tags(settings, below(found.url, prefix or NOBODY), as_tree=as_tree)
        return
    names = access.names(found.url, prefix, remotes.surroundings())
    if not names:
        output.say(output.one_line(f"no names{f' in {prefix}' if prefix else ''} at {found.url}"))
    document = {"remote": found.name, "url": found.url, "names": names}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_lines(names))
