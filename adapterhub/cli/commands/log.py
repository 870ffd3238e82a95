"""`adapterhub log`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import ref_at_remote, remote_option

if TYPE_CHECKING:
    from adapterhub.store.store import Entry

_AUTHOR = 100  # the most characters of an author; a log from elsewhere may have any number
_LOG = (
    Column("#", right=True),
    Column("WHEN", drop=1),
    Column("OP"),
    Column("VERSION"),
    Column("TAGS"),
    Column("DIGEST", drop=2),
    Column("BY", drop=3),
    Column("WHY", wrap=True),
)


@command(
    "log",
    example="""
    adapterhub log team/sql
    adapterhub log team/sql:prod --json""",
)
@click.argument("ref")
@remote_option
@click.pass_obj
def log(settings: Settings, ref: str, *, remote: str | None) -> None:
    """Show the history of a name's refs, newest first: when, what, which version, which tags, by whom and why.

    REF is a name, even a removed one; a tag or a version limits the history to itself. It may be on a hub of adapterhub, or an
    address of an object store, which keeps the same log. Times are UTC.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.address_schemes import is_address
    from adapterhub.remotes.version_documents import log_document

    address = ref_at_remote(ref, remote)
    opened = catalogs.open_hub(address) if is_address(address) else None
    if is_address(address) and opened is None:
        name, entries = _remote_log(address, settings)
    else:
        target = Ref.parse(ref) if opened is None else opened[1]
        with catalogs.open_local(settings) if opened is None else opened[0] as catalog:
            name, entries = target.name, catalog.log(target)

    def text() -> None:
        cells = [_cells(entry) for entry in entries]
        # The column of reasons is left out if no entry has one.
        columns = _LOG if any(row[-1] != "-" for row in cells) else _LOG[:-1]
        output.write_table(columns, [row[: len(columns)] for row in cells])

    output.emit(log_document(name, entries), as_json=settings.as_json, text=text)


def _remote_log(address: str, settings: Settings) -> tuple[str, Sequence[Entry]]:
    """Return the log of a remote, the newest entry first: all of it, or the entries about the tag or version at the address."""
    from adapterhub.registry import version_selection
    from adapterhub.remotes.remote_address import parse

    parsed = parse(address)
    with workspace(settings).connect(parsed) as remote:
        entries = remote.history()[::-1]
    if parsed.digest:
        return parsed.repository, [entry for entry in entries if entry.digest.startswith(parsed.digest)]
    number = version_selection.number(parsed.tag or "")
    if number:
        return parsed.repository, [entry for entry in entries if number in (entry.number, *entry.numbers)]
    return parsed.repository, [entry for entry in entries if parsed.tag is None or parsed.tag in entry.tags]


def _cells(entry: Entry) -> list[str]:
    from adapterhub.manifest import release_statement

    numbers = entry.numbers or ((entry.number,) if entry.number else ())
    reason = release_statement.log_summary(entry.op, entry.message)
    if entry.op == "keep":
        from adapterhub.manifest.keep_rule import KeepRule

        reason = str(KeepRule(entry.keep, entry.ttl))
    return [
        str(entry.seq),
        entry.time.replace("T", " ").removesuffix("Z"),
        entry.op,
        " ".join(f"v{number}" for number in numbers) or "-",
        " ".join(entry.tags) or "-",
        output.digest(entry.digest) or "-",
        output.one_line(entry.author[:_AUTHOR]) or "-",
        output.one_line(reason) or "-",
    ]
