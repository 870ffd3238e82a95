"""`adapterhub list`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import catalogs, output, remote_choice, remotes
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.remote_choice import remote_option
from adapterhub.cli.views import tree
from adapterhub.cli.views.version_rows import write_rows
from adapterhub.ref import is_pattern
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.index.queries import VersionRow
    from adapterhub.remotes.catalog import Catalog


# Schemes of registries that list their names, and the most parts of an address without one.
_LISTED_SCHEMES = {"oci": 1, "oci+http": 1, "oci+https": 1, "hub+http": 2, "hub+https": 2}
_REMOTE_COLUMNS = (
    Column("REF"),
    Column("TAGS", drop=1),
    Column("BASE", drop=3),
    Column("SIZE", right=True, drop=2),
    Column("CREATED", drop=6),
    Column("DIGEST", drop=4),
    Column("KIND", drop=5),
)


@command(
    "list",
    example="""
    adapterhub list
    adapterhub list team --tree
    adapterhub list team/sql --json
    adapterhub list 'team/sql-*'
    adapterhub list team --remote
    adapterhub list oci://registry.example/team/sql""",
)
@click.argument("prefix", metavar="[PREFIX]", required=False)
@click.option("--tree", "as_tree", is_flag=True, help="Group by namespace and name, with the parents of each version.")
@remote_option
@click.pass_obj
def list_(settings: Settings, prefix: str | None, *, as_tree: bool, remote: str | None) -> None:
    """List versions, the newest of each name first.

    PREFIX is a namespace, a name, or a pattern of names. An address, oci://HOST/NAME or hf://ORG/NAME, lists the versions
    there, and oci://HOST or hub+https://HOST the names; a remote lists its names, or the versions of one. A hub of adapterhub
    is listed as the registry is. A narrow terminal shows fewer columns, and of a tree the newest and tagged versions; a pipe
    and --json get everything.
    """
    from adapterhub.remotes.address_schemes import is_address

    opened: tuple[Catalog, str | None] | None
    if prefix and remote is None and (url := _registry_url(prefix)):
        opened = catalogs.open_hub_below(None, url)
        if opened is None:
            _list_names(settings, None, url, None)
            return
    elif remote is not None:
        opened = catalogs.open_hub_below(prefix, remote_choice.remote_at(remote).url)
        if opened is None:
            _list_remote(settings, prefix, remote, as_tree=as_tree)
            return
    elif prefix and is_address(prefix):
        at_hub = catalogs.open_hub(prefix)
        if at_hub is None:
            _list_versions(settings, prefix, as_tree=as_tree)
            return
        opened = at_hub[0], str(at_hub[1])
    else:
        opened = catalogs.open_local(settings), prefix
    with opened[0] as catalog:
        _list_catalog(catalog, opened[1], settings, as_tree=as_tree)


def _list_catalog(catalog: Catalog, prefix: str | None, settings: Settings, *, as_tree: bool) -> None:
    from adapterhub.remotes.version_documents import listing_document

    listing = catalog.list(None if prefix and is_pattern(prefix) else prefix)
    if prefix and is_pattern(prefix):
        listing = replace(listing, rows=[row for row in listing.rows if fnmatchcase(row.name, prefix)])
    rows, deprecations = listing.rows, listing.deprecations
    if prefix and not rows:
        if "://" in prefix:
            from adapterhub.ref import Ref

            Ref.parse(prefix)  # raises the error that says how to write it
        raise catalogs.no_such_prefix(catalog, prefix)
    for (name, number), message in sorted(deprecations.items()):
        if any(row.name == name and number in (0, row.number) for row in rows):
            output.warn_deprecated(f"{name}:v{number}" if number else name, message)
    document = tree.document(rows, deprecations) if as_tree else {"adapters": listing_document(listing)["adapters"]}
    output.emit(document, as_json=settings.as_json, text=lambda: _list_text(catalog, rows, deprecations, as_tree=as_tree))


def _list_text(
    catalog: Catalog, rows: Sequence[VersionRow], deprecated: Mapping[tuple[str, int], str], *, as_tree: bool
) -> None:
    if not rows:
        problem = f"no adapters yet in {catalog.location}"
        output.say(output.one_line(f"{problem}; store one with `adapterhub push`"))
        return
    if as_tree:
        for line in tree.lines(rows, catalog.versions_with, screen=output.width()):
            output.write(line)
        return
    write_rows(rows, Column("PUSHED", drop=3), lambda row: row.time[:10], deprecated)


def _list_versions(settings: Settings, text: str, *, as_tree: bool) -> None:
    """List the tagged versions at an address."""
    from adapterhub.remotes import version_listing
    from adapterhub.remotes.remote_address import parse

    address = parse(text)
    if as_tree or address.tag or address.digest:
        raise UsageError(
            "--tree" if as_tree else text, "an address lists the versions of a name", f"Write {address.repository}"
        )
    with remotes.connect(address) as remote:
        tags = remote.tags()
        commits = dict(remote.commits)
        versions = version_listing.list_versions(remote, tags)
    if not tags:
        output.say("no tags")
    rows = [asdict(version) | {"ref": f"{address.repository}{address.mark}{version.tags[0]}"} for version in versions]
    document = {
        "repository": address.repository,
        "tags": tags,
        "adapters": rows,
        **({"commits": commits} if commits else {}),
    }
    columns = (*_REMOTE_COLUMNS, Column("COMMIT", drop=7)) if commits else _REMOTE_COLUMNS
    cells = [_cells(row, commits) for row in rows]
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_table(columns, cells) if cells else None)


def _cells(row: Mapping[str, Any], commits: Mapping[str, str]) -> list[str]:
    return [
        str(row["ref"]),
        output.one_line(", ".join(row["tags"][1:])) or "-",
        output.one_line(row["base"] or "-").rpartition("/")[2],
        output.size(row["size"]) if row["size"] is not None else "-",
        output.one_line((row["created"] or "-")[:10]),
        output.digest(row["digest"]) or "-",
        str(row["kind"]),
        *([commits.get(row["tags"][0], "-")] if commits else []),
    ]


def _list_remote(settings: Settings, prefix: str | None, name: str, *, as_tree: bool) -> None:
    """List the tags of a name on a remote, or its names."""
    from adapterhub.remotes.named_remotes import UNUSED_NAME, address_below

    remote_entry = remote_choice.trusted_remote(name)
    if as_tree or (prefix and "/" in prefix):
        _list_versions(settings, address_below(remote_entry.url, prefix or UNUSED_NAME), as_tree=as_tree)
        return
    _list_names(settings, prefix, remote_entry.url, remote_entry.name)


def _list_names(settings: Settings, prefix: str | None, url: str, remote: str | None) -> None:
    from adapterhub.remotes import remote_access

    names = remote_access.names(url, prefix, remotes.surroundings())
    if not names:
        output.say(output.one_line(f"no names{f' in {prefix}' if prefix else ''} at {url}"))
    document = {"remote": remote, "url": url, "adapters": [{"name": name} for name in names]}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write_lines(names))


def _registry_url(text: str) -> str | None:
    """Return the checked URL of a registry or a hub without a name, `oci://HOST`; None for any other text."""
    from adapterhub.remotes.named_remotes import check_url

    scheme, _, remainder = text.partition("://")
    # A hub's may name an organization.
    parts = len(remainder.rstrip("/").split("/")) if remainder else 0
    return check_url(text) if 0 < parts <= _LISTED_SCHEMES.get(scheme.lower(), 0) else None
