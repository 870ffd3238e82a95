"""`adapterhub list`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from adapterhub.cli import environment, output, remotes
from adapterhub.cli.environment import complete_ref, open_registry, remote_option
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.views import tree
from adapterhub.cli.views.versions import row_cells, row_document
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.index.queries import Row

_LIST = (
    Column("REF"),
    Column("TAGS", drop=1),
    Column("BASE", drop=3),
    Column("METHOD", drop=5),
    Column("R", right=True, drop=4),
    Column("SIZE", right=True, drop=2),
    Column("PUSHED", drop=6),
)


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
    cells = [[*row_cells(row), row.time[:10]] for row in rows]
    output.write_table(_LIST, cells)


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
    from adapterhub.remotes import location
    from adapterhub.remotes.configured import NOBODY, below, nobody
    from adapterhub.remotes.oci import credentials
    from adapterhub.remotes.oci.address import Address
    from adapterhub.remotes.oci.host import Host

    found = environment.remote(name)
    if as_tree or (prefix and "/" in prefix):
        _tags(settings, below(found.url, prefix or NOBODY), as_tree=as_tree)
        return
    if not isinstance(location.parse(nobody(found.url)), Address):
        raise UsageError(found.url, "this kind of remote cannot list its names", "Name one: namespace/name")
    place = Address.parse(below(found.url, prefix or NOBODY))
    who = remotes.surroundings()
    find = partial(credentials.find, place.host, who.docker, plain=place.plain)
    with Host(place, find, proxy=who.proxy) as host:
        root = place.name.removesuffix(prefix or NOBODY)
        names = [one.removeprefix(root) for one in host.names() if one.startswith(root)]
    names = [one for one in names if not prefix or one == prefix or one.startswith(f"{prefix}/")]
    if not names:
        output.say(output.one_line(f"no names{f' in {prefix}' if prefix else ''} at {found.url}"))
    document = {"remote": found.name, "url": found.url, "names": names}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_lines(names))
