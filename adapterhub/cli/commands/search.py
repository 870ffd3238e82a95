"""`adapterhub search`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.views.versions import row_cells, row_document

if TYPE_CHECKING:
    from adapterhub.index.search import Found, Query

_SEARCH = (
    Column("REF"),
    Column("TAGS", drop=2),
    Column("BASE", drop=1),
    Column("METHOD", drop=5),
    Column("R", right=True, drop=3),
    Column("SIZE", right=True, drop=4),
    Column("DESCRIPTION", drop=6, cut=True),
)


@command(
    "search",
    short="Find adapters by words and facts.",
    example="""
    adapterhub search text to sql
    adapterhub search sql --base Qwen3-0.6B --rank 4..16 --size '<10MB'
    adapterhub search --metric 'eval_loss<0.7' --license Apache-2.0 --facets""",
)
@click.argument("words", nargs=-1)
@click.option("--base", metavar="BASE", help="Trained on this model: org/name, or the name alone.")
@click.option("--method", metavar="METHOD", help="lora, dora or full.")
@click.option("--rank", metavar="N|A..B", help="The rank most modules have; also '<N', '>=N'.")
@click.option("--target", metavar="MODULE", multiple=True, help="Changes modules of this last name, like q_proj.")
@click.option("--license", metavar="ID", help="Under this license, as it was declared.")
@click.option("--size", metavar="BOUND", help="Bytes of all files: '<10MB', 1MB..1GB.")
@click.option("--metric", metavar="BOUND", multiple=True, help="A training's metric: 'eval_loss<0.7'.")
@click.option("--tag", metavar="TAG", multiple=True, help="Has this tag, in the registry or on its model card.")
@click.option("--language", metavar="LANG", multiple=True, help="In this language, as the model card says.")
@click.option("--all-versions", is_flag=True, help="Every version that matches, not the newest of each name.")
@click.option("--limit", metavar="N", type=click.IntRange(0), default=20, show_default=True, help="Show at most so many.")
@click.option("--facets", is_flag=True, help="Count bases, ranks, targets … of all that match.")
@click.pass_obj
def search(settings: Settings, /, *, facets: bool, **given: Any) -> None:
    """Find adapters by words and by what their facts say, the best match first.

    Words are looked for in names, tags, descriptions, facts (base, targets, license, languages) and model cards; each may be
    the beginning of a longer one, and all must be there. Without words the newest come first. Of each name the newest version
    that matches is shown. Words that over a thousand versions have tell these apart no more: of those the latest come first,
    after names and titles that have the words.
    """
    from adapterhub.index import search as finding

    query = _query(given)
    with open_registry(settings) as registry:
        found = finding.search(registry.index, query, facets=facets or settings.as_json)
        deprecated = registry.deprecations()
    document = {"adapters": [row_document(row, deprecated) for row in found.rows], "total": found.total, "facets": found.facets}
    output.emit(document, as_json=settings.as_json, text=lambda: _search_text(found, facets=facets))


def _query(given: Mapping[str, Any]) -> Query:
    """The query that the options say."""
    from adapterhub.index.search import Query, parse_bounds, parse_metric

    facets = [(kind, given[kind]) for kind in ("base", "method", "license") if given[kind] is not None]
    facets += [(kind, value) for kind in ("target", "language") for value in given[kind]]
    bounds = []
    if given["rank"] is not None:
        bounds.append(("r", parse_bounds(given["rank"], "--rank")))
    if given["size"] is not None:
        bounds.append(("size", parse_bounds(given["size"], "--size", size=True)))
    return Query(
        words=" ".join(given["words"]),
        facets=tuple(facets),
        tags=tuple(given["tag"]),
        bounds=tuple(bounds),
        metrics=tuple(parse_metric(text, "--metric") for text in given["metric"]),
        all_versions=given["all_versions"],
        limit=given["limit"],
    )


def _search_text(found: Found, *, facets: bool) -> None:
    cells = [[*row_cells(row), " ".join((row.description or "-").split())] for row in found.rows]
    if cells:
        for line in output.table(_SEARCH, cells, screen=output.width()):
            output.write(line)
    if not found.total and not cells:
        output.say("nothing matches")
    elif found.total > len(cells) or found.more:
        output.say(f"{len(cells)} of {'more than ' if found.more else ''}{found.total}; --limit shows more")
    counted = {kind: counts for kind, counts in found.facets.items() if counts} if facets else {}
    if counted:
        output.write()
        text = {kind: ", ".join(f"{value} {count}" for value, count in counts.items()) for kind, counts in counted.items()}
        for line in output.pairs(text, screen=output.width()):
            output.write(line)
