"""`adapterhub usage`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import ages, output
from adapterhub.cli.options import Settings, command, usage_file_option
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import registry_folder
from adapterhub_converters.display import printable
from adapterhub_converters.errors import UsageError

if TYPE_CHECKING:
    from adapterhub.serve.usage.record_place import Place
    from adapterhub.serve.usage.usage_report import UsageReport, UsageRow

_SUMS = (
    Column("REQUESTS", right=True),
    Column("ESTIMATED", right=True, drop=2),
    Column("PROMPT", right=True),
    Column("CACHED", right=True, drop=1),
    Column("ANSWER", right=True),
)


@command(
    "usage",
    example="""
    adapterhub usage
    adapterhub usage --by key,version --since 7d
    adapterhub usage --by day --since 2026-11-01 --prices prices.toml --csv""",
)
@click.option(
    "--by",
    metavar="NAMES",
    default="version",
    show_default=True,
    help="What to sum by, separated by commas: key, version, route, arm, engine, day.",
)
@click.option(
    "--since", metavar="AGE", default="30d", show_default=True, help="From when on: an age like 12h, 7d, 2w, or a date in UTC."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option(
    "--prices", "prices_file", metavar="FILE", type=click.Path(path_type=Path), help="TOML file of prices of a million tokens."
)
@usage_file_option("what `adapterhub serve` recorded.")
@click.pass_obj
def usage(
    settings: Settings, *, by: str, since: str, as_csv: bool, prices_file: Path | None, usage_place: Place | None
) -> None:
    """Sum the requests and tokens that `adapterhub serve` answered.

    PROMPT includes CACHED, the tokens that the engine took from its cache. ESTIMATED counts the requests whose tokens are
    estimates. Requests that no engine was asked are not recorded; those of the last half second may be missing.
    """
    from adapterhub.serve.usage import price_list, record_place, usage_report

    if as_csv and settings.as_json:
        raise UsageError("", "--csv and --json exclude each other", "Leave one out")
    groups = tuple(dict.fromkeys(name.strip() for name in by.split(",")))
    for name in groups:
        if name not in usage_report.GROUPS:
            raise UsageError("--by", f"{name[:40]!r} is unknown", f"There are {', '.join(usage_report.GROUPS)}")
    prices = price_list.read(prices_file) if prices_file else None
    place = usage_place or registry_folder(settings) / record_place.FILE
    report = usage_report.report(place, groups, ages.parse_since(since), prices)
    if report.unpriced:
        output.say(output.one_line(f"no price: {', '.join(report.unpriced)}"))
    currency = prices.currency if prices else ""
    if as_csv:
        output.write_document(_csv_text(report, has_prices=prices is not None))
    else:
        document = _document(report, currency, has_prices=prices is not None)
        output.emit(
            document, as_json=settings.as_json, text=lambda: _write_text(report, currency, has_prices=prices is not None)
        )


def _document(report: UsageReport, currency: str, *, has_prices: bool) -> dict[str, Any]:
    rows = [dict(zip(report.by, row.group, strict=True)) | _sums(row, has_prices=has_prices) for row in report.rows]
    document: dict[str, Any] = {"since": output.utc_time(report.since), "by": list(report.by), "rows": rows}
    document["total"] = _sums(report.total, has_prices=has_prices)
    return document | ({"currency": currency, "unpriced": list(report.unpriced)} if has_prices else {})


def _sums(row: UsageRow, *, has_prices: bool) -> dict[str, Any]:
    cost = None if row.cost is None else round(row.cost, 6)
    return {**asdict(row.usage), **({"cost": cost} if has_prices else {})}


def _csv_text(report: UsageReport, *, has_prices: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*report.by, *_sums(report.total, has_prices=has_prices)])
    for row in report.rows:
        writer.writerow([*map(printable, row.group), *_sums(row, has_prices=has_prices).values()])
    return text.getvalue().rstrip("\n")


def _write_text(report: UsageReport, currency: str, *, has_prices: bool) -> None:
    if not report.rows:
        output.write(f"no requests since {output.utc_time(report.since)}")
        return
    columns = [*(Column(name.upper()) for name in report.by), *_SUMS]
    if has_prices:
        columns.append(Column(f"COST {currency}".rstrip(), right=True))
    output.write_table(columns, list(_table_rows(report, has_prices=has_prices)))


def _table_rows(report: UsageReport, *, has_prices: bool) -> Iterator[list[str]]:
    """Yield the cells of each row, and of the total if there are several."""
    groups = [([output.pinned(text) or "-" for text in row.group], row) for row in report.rows]
    if len(groups) > 1:
        groups.append((["total", *[""] * (len(report.by) - 1)], report.total))
    for cells, row in groups:
        usage = row.usage
        counts = (usage.requests, usage.estimated, usage.prompt_tokens, usage.cached_tokens, usage.answer_tokens)
        cost = [f"{row.cost:,.4f}" if row.cost is not None else "-"] if has_prices else []
        yield [*cells, *(f"{count:,}" for count in counts), *cost]
