"""Sums of recorded usage by key, version, day and so on, and what they cost."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field
from typing import Any

from adapterhub_converters.lazy_dataclass import dataclass

from . import record_place
from .price_list import PriceList
from .record_place import Place
from .usage_database import DAY, HOUR, UsageSum

GROUPS = ("key", "version", "route", "arm", "engine", "day")
"""The names that usage can be summed by."""
_COLUMNS = {name: name for name in GROUPS} | {"day": f"hour / {DAY}"}
_SUMS = ", ".join(f"sum({name})" for name in asdict(UsageSum()))


@dataclass(slots=True)
class UsageRow:
    """The usage of one group.

    Attributes:
        group: Its values, in the order of `by`.
        cost: What the tokens with a price cost; None if none has one.
    """

    group: tuple[str, ...]
    usage: UsageSum = field(default_factory=UsageSum)
    cost: float | None = None


@dataclass(slots=True)
class UsageReport:
    """Usage by group.

    Attributes:
        since: The begin of the first hour that was summed, in seconds of Unix time.
        total: The sum of all rows.
        unpriced: The versions without a price, if there are prices.
    """

    by: tuple[str, ...]
    since: int
    rows: list[UsageRow]
    total: UsageRow
    unpriced: tuple[str, ...] = ()


def report(place: Place, by: Sequence[str], since: int, prices: PriceList | None = None) -> UsageReport:
    """Sum what was recorded since a time, from the begin of that hour; by day first, then the largest groups first.

    Raises:
        NotFoundError: There is no such file.
    """
    since = since // HOUR * HOUR
    rows: dict[tuple[str, ...], UsageRow] = {}
    total, unpriced = UsageRow(()), dict[str, None]()
    for group, version, usage in _sums(place, by, since):
        price = prices.price_of(version) if prices else None
        if price is None:
            unpriced[version] = None
        for row in (rows.setdefault(group, UsageRow(group)), total):
            row.usage.merge(usage)
            if price is not None:
                row.cost = (row.cost or 0.0) + price.cost(
                    prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens, answer_tokens=usage.answer_tokens
                )
    day = by.index("day") if "day" in by else None

    def order(row: UsageRow) -> tuple[Any, ...]:
        first = "" if day is None else row.group[day]
        return first, -(row.usage.prompt_tokens + row.usage.answer_tokens), row.group

    return UsageReport(tuple(by), since, sorted(rows.values(), key=order), total, tuple(unpriced) if prices else ())


def _sums(place: Place, by: Sequence[str], since: int) -> Iterator[tuple[tuple[str, ...], str, UsageSum]]:
    """Yield the groups of each version, with the sum of their rows."""
    columns = ", ".join(_COLUMNS[name] for name in (*by, "version"))
    with record_place.reader(place) as database:
        if not database.has_table("usage"):  # a gateway is creating it at this moment
            return
        # Only names of `_COLUMNS` are in the statement.
        rows = database.select(f"SELECT {columns}, {_SUMS} FROM usage WHERE hour >= ? GROUP BY {columns}", since)  # noqa: S608
    for row in rows:
        group = tuple(_text(name, value) for name, value in zip(by, row, strict=False))
        yield group, row[len(by)], UsageSum(*map(int, row[len(by) + 1 :]))  # PostgreSQL sums to decimals


def _text(name: str, value: Any) -> str:
    return datetime.datetime.fromtimestamp(value * DAY, datetime.UTC).date().isoformat() if name == "day" else str(value)
