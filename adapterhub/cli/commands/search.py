"""`adapterhub search`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.inputs import existing_path, stored_form
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.remote_choice import remote_option
from adapterhub.cli.views.content_matches import write_matches
from adapterhub.cli.views.version_rows import write_rows
from adapterhub_converters.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from adapterhub.index.version_search import Query, SearchResult


@command(
    "search",
    example="""
    adapterhub search text to sql
    adapterhub search sql --base Qwen3-0.6B --rank 4..16 --size '<10MB'
    adapterhub search --metric 'eval_loss<0.7' --license Apache-2.0 --facets
    adapterhub search --file adapter_model.safetensors
    adapterhub search --sha256 5f2c1a…""",
)
@click.argument("words", nargs=-1)
@click.option("--file", "files", metavar="FILE", multiple=True, help="Versions that contain this file or folder; repeatable.")
@click.option(
    "--sha256", "digests", metavar="HEX", multiple=True, help="Digest of a file, version or tensor, or 6 digits or more."
)
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
@click.pass_context
def search(
    context: click.Context,
    /,
    *,
    files: Sequence[str],
    digests: Sequence[str],
    facets: bool,
    remote: str | None,
    **options: Any,
) -> int:
    """Search adapters by words and by the fields of their manifests, the best match first.

    Words are matched against names, tags, descriptions, bases, targets, licenses, languages and model cards; each may be the
    beginning of a longer word, and all must match. Without words the newest come first. The newest matching version of each
    name is shown. --remote searches a hub of adapterhub. For words that over a thousand versions contain, names and titles
    come first, then the latest versions.

    --file finds versions by the digest of a file's bytes, or the version that a folder is, else by its weights. For weights
    that no version contains as a whole, the 20 versions that share most of their tensors are shown: bytes are compared,
    whatever the tensors are called. It exits 3 unless each was found, as a whole or with all its tensors in one version. A hub
    is sent the digests alone.
    """
    from adapterhub.remotes.version_documents import search_document

    settings = context.ensure_object(Settings)
    if files or digests:
        _refuse_other_filters(context)
        return _search_contents(settings, files, digests, remote)
    _refuse_address(options["words"])
    query = _query(options)
    with catalogs.catalog_below(settings, None, remote, "index to search") as (catalog, namespace):
        answer = catalog.search(replace(query, namespace=namespace or ""), facets=facets or settings.as_json)
    text = partial(_search_text, answer.result, answer.deprecations, facets=facets)
    output.emit(search_document(answer), as_json=settings.as_json, text=text)
    return 0


def _refuse_other_filters(context: click.Context) -> None:
    """Refuse words and filters beside --file: contents are compared with every version."""
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in ("files", "digests", "remote") or name not in context.params:
            continue
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT and context.params[name]:
            option = parameter.opts[0] if isinstance(parameter, click.Option) else "WORDS"
            problem = "is not for --file and --sha256, which compare contents with every version"
            raise UsageError(option, problem, "Leave it out", code="conflicting-options")


def _search_contents(settings: Settings, files: Sequence[str], digests: Sequence[str], remote: str | None) -> int:
    """Print the versions that contain files or what has these digests."""
    from adapterhub.index.version_search import parse_digest_prefix
    from adapterhub.registry import content_search
    from adapterhub.remotes.catalog import ContentQuery
    from adapterhub.remotes.content_documents import content_answer_document

    with catalogs.catalog_below(settings, None, remote, "search by contents") as (catalog, _):
        queries = [ContentQuery(text, parse_digest_prefix(text)) for text in digests]
        for text in files:
            with stored_form(existing_path(text), text) as (path, _):
                queries.append(ContentQuery(text, content_search.read_contents(path, bytes_bar)))
        answer = catalog.find(queries, bytes_bar)
    results, unlisted = answer.matches, answer.unlisted
    missing = [result for result in results if not result.is_whole]
    # "Not found" would be too strong a claim if some tensors could not be searched.
    if unlisted and missing:
        count = output.plural(unlisted, "file")
        output.say(f"not searched: the tensors of {count}, missing or damaged; `adapterhub fsck` shows which")
    if not any(result.holders or result.shares for result in results):
        raise NotFoundError(
            results[0].source, "no version contains it" if len(results) == 1 else "no version contains it or the others"
        )
    output.emit(content_answer_document(answer), as_json=settings.as_json, text=partial(write_matches, results))
    return NotFoundError.exit_code if missing else 0


def _refuse_address(words: Sequence[str]) -> None:
    """Refuse an address among the words: a place to search is named by --remote."""
    from adapterhub.remotes.address_schemes import is_address

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
        if result.has_more:
            output.write(f"facets of the {result.total} newest matches:")
        text = {kind: ", ".join(f"{value} {count}" for value, count in counts.items()) for kind, counts in counted.items()}
        output.write_pairs(text)
