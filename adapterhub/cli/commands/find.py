"""`adapterhub find`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.inputs import existing_path, stored_form
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.remote_choice import remote_option
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.registry.content_search import ContentMatches


@command(
    "find",
    example="""
    adapterhub find adapter_model.safetensors
    adapterhub find ./sql
    adapterhub find --sha256 5f2c1a…""",
)
@click.argument("files", metavar="FILE…", nargs=-1)
@click.option(
    "--sha256", "digests", metavar="HEX", multiple=True, help="Digest of a file, version or tensor, or 6 digits or more."
)
@remote_option
@click.pass_obj
def find(settings: Settings, *, files: Sequence[str], digests: Sequence[str], remote: str | None) -> int:
    """Find the versions that contain a file, by the digest of its bytes; for a folder, the version it is.

    A folder that is not a version as a whole is searched by its weights. For weights that no version contains as a whole, the
    20 versions that share most of their tensors are shown: bytes are compared, whatever the tensors are called. Exits 3 unless
    each was found, as a whole or with all its tensors in one version. --remote searches a hub of adapterhub, which is sent the
    digests alone.
    """
    from adapterhub.index.version_search import parse_digest_prefix
    from adapterhub.registry import content_search
    from adapterhub.remotes.catalog import ContentQuery
    from adapterhub.remotes.content_documents import content_answer_document

    if not files and not digests:
        raise UsageError("find", "needs a FILE or --sha256", "Name one")
    with catalogs.catalog_below(settings, None, remote, "search by contents") as (catalog, _):
        queries = [ContentQuery(text, parse_digest_prefix(text)) for text in digests]
        for text in files:
            with stored_form(existing_path(text), text) as (path, _):
                queries.append(ContentQuery(text, content_search.read_contents(path, bytes_bar)))
        answer = catalog.find(queries, bytes_bar)
    results, unlisted = answer.matches, answer.unlisted
    missing = [item for item in results if not item.is_whole]
    # "Not found" would be too strong a claim if some tensors could not be searched.
    if unlisted and missing:
        files = output.plural(unlisted, "file")
        output.say(f"not searched: the tensors of {files}, missing or damaged; `adapterhub fsck` shows which")
    if not any(item.holders or item.shares for item in results):
        raise NotFoundError(
            results[0].source, "no version contains it" if len(results) == 1 else "no version contains it or the others"
        )
    output.emit(content_answer_document(answer), as_json=settings.as_json, text=lambda: _find_text(results))
    return NotFoundError.exit_code if missing else 0


def _find_text(results: Sequence[ContentMatches]) -> None:
    columns = [Column("REF"), Column("TAGS", drop=2), Column("FILE", drop=1)]
    if any(item.shares for item in results):
        columns.append(Column("TENSORS"))
    several = len(results) > 1
    if several:
        columns.insert(0, Column("SOURCE"))
    cells = []
    for item in results:
        for row, place, share in _holder_rows(item):
            cells.append([*([item.source] if several else []), str(row.ref), ", ".join(row.tags) or "-", place, share])
    output.write_table(columns, [row[: len(columns)] for row in cells])
    for item in results:
        if not item.holders:
            suffix = " as a whole" if item.shares else ""
            output.say(output.one_line(f"{item.source}: no version contains it{suffix}"))


def _holder_rows(result: ContentMatches) -> list[tuple[Any, str, str]]:
    """Return the row, the place and the share of each version that has the file."""
    whole_rows = [
        (holder.row, ": ".join(filter(None, (holder.path, holder.tensor))) or "(the whole adapter)", "all")
        for holder in result.holders
    ]
    return whole_rows + [(share.row, share.path, f"{share.count} of {result.tensors}") for share in result.shares]
