"""`adapterhub search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.remote_choice import remote_option
from adapterhub.cli.views.version_rows import write_rows
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.index.version_search import Query, SearchResult


@command(
    "search",
    example="""
    adapterhub search text to sql
    adapterhub search sql --base Qwen3-0.6B --rank 4..16 --size '<10MB'
    adapterhub search --metric 'eval_loss<0.7' --license Apache-2.0 --facets""",
)
@click.argument("words", nargs=-1)
@click.option("--base", metavar="BASE", help="Base model: org/name, or the name alone.")
@click.option("--method", metavar="METHOD", help="lora, dora or full.")
@click.option("--rank", metavar="BOUND", help="Largest rank of any module: 8, 4..16, '<16'.")
@click.option("--target", metavar="MODULE", multiple=True, help="Target module by its last name, like q_proj.")
@click.option("--license", metavar="ID", help="Declared license.")
@click.option("--size", metavar="BOUND", help="Size of all files: '<10MB', 1MB..1GB.")
@click.option("--metric", metavar="BOUND", multiple=True, help="Metric of training or evaluation: 'eval_loss<0.7'.")
@click.option("--tag", metavar="TAG", multiple=True, help="Tag in the registry or on the model card.")
@click.option("--language", metavar="LANG", multiple=True, help="Language on the model card.")
@click.option("--all-versions", is_flag=True, help="Show every match, not only the newest of each name.")
@click.option("--limit", metavar="N", type=click.IntRange(0), default=20, show_default=True, help="Show at most N.")
@click.option("--facets", is_flag=True, help="Count bases, ranks, targets … of all matches.")
@remote_option
@click.pass_obj
def search(settings: Settings, /, *, facets: bool, remote: str | None, **options: Any) -> None:
    """Search adapters by words and by the fields of their manifests, the best match first.

    Words are matched against names, tags, descriptions, bases, targets, licenses, languages and model cards; each may be the
    beginning of a longer word, and all must match. Without words the newest come first. The newest matching version of each
    name is shown. --remote searches a hub of adapterhub. For words that over a thousand versions contain, names and titles
    come first, then the latest versions.
    """
    from adapterhub.remotes.version_documents import search_document

    _refuse_address(options["words"])
    query = _query(options)
    with catalogs.catalog_below(settings, None, remote, "index to search") as (catalog, namespace):
        answer = catalog.search(replace(query, namespace=namespace or ""), facets=facets or settings.as_json)
    text = partial(_search_text, answer.result, answer.deprecations, facets=facets)
    output.emit(search_document(answer), as_json=settings.as_json, text=text)


def _refuse_address(words: Sequence[str]) -> None:
    """Refuse an address among the words: a place to search is named by --remote."""
    from adapterhub.remotes.remote_address import is_address

    if address := next(filter(is_address, words), None):
        raise UsageError(
            address,
            "is an address, not a word; --remote names a hub to search",
            f"List its names with `adapterhub list {address}`",
        )


def _query(options: Mapping[str, Any]) -> Query:
    """Build the query from the options."""
    from adapterhub.index.version_search import Query, parse_bounds, parse_metric

    facets = [(kind, options[kind]) for kind in ("base", "method", "license") if options[kind] is not None]
    facets += [(kind, value) for kind in ("target", "language") for value in options[kind]]
    bounds = []
    if options["rank"] is not None:
        bounds.append(("r", parse_bounds(options["rank"], "--rank")))
    if options["size"] is not None:
        bounds.append(("size", parse_bounds(options["size"], "--size", size=True)))
    return Query(
        words=" ".join(options["words"]),
        facets=tuple(facets),
        tags=tuple(options["tag"]),
        bounds=tuple(bounds),
        metrics=tuple(parse_metric(text, "--metric") for text in options["metric"]),
        all_versions=options["all_versions"],
        limit=options["limit"],
    )


def _search_text(result: SearchResult, deprecated: Mapping[tuple[str, int], str], *, facets: bool) -> None:
    row_count = len(result.rows)
    if row_count:
        last = Column("DESCRIPTION", drop=1, cut=True)
        write_rows(result.rows, last, lambda row: " ".join((row.description or "-").split()), deprecated)
    if not result.total and not row_count:
        output.say("no matches")
    elif result.total > row_count or result.has_more:
        output.say(f"{row_count} of {'more than ' if result.has_more else ''}{result.total}; --limit shows more")
    counted = {kind: counts for kind, counts in result.facets.items() if counts} if facets else {}
    if counted:
        output.write()
        text = {kind: ", ".join(f"{value} {count}" for value, count in counts.items()) for kind, counts in counted.items()}
        output.write_pairs(text)
