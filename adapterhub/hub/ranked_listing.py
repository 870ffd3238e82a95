"""Pages of names by a ranking: those in it by their counts, and the others by the time of their last push.

The position of a name in the ranking has its count, after a `#`, in the place of a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from adapterhub.index import version_listing
from adapterhub.index.index_database import Index
from adapterhub.index.version_listing import Conditions, Page, Position
from adapterhub_converters.errors import UsageError

from .popularity import Ranking

_SCANNED = 200  # the most names of the ranking that a page compares with its conditions
_MAX_DIGITS = 18


def ranked_page(
    index: Index, ranking: Ranking, wanted: Conditions, *, after: Position | None, limit: int, ascending: bool = False
) -> Page:
    """Return names that meet the conditions, those with the highest counts first, or with `ascending` last."""
    place = _place(after)
    is_in_ranking = place is not None or (after is None and not ascending)
    first, second = (_of_ranking, _of_others) if is_in_ranking else (_of_others, _of_ranking)
    page = first(index, ranking, wanted, after=after, limit=limit, ascending=ascending)
    # Those of the ranking come last if the lowest counts come first.
    if page.end or is_in_ranking == ascending:
        return page
    if len(page.rows) >= limit:
        return replace(page, end=page.positions[page.rows[-1].name])
    rest = second(index, ranking, wanted, after=None, limit=limit - len(page.rows), ascending=ascending)
    return Page([*page.rows, *rest.rows], rest.end, {**page.positions, **rest.positions})


def _place(position: Position | None) -> tuple[int, str] | None:
    """Return the place in a ranking that a position is at; None for one of the other names."""
    if position is None or not position.time.startswith("#"):
        return None
    digits = position.time[1:]
    if not (digits.isdecimal() and len(digits) <= _MAX_DIGITS):
        raise UsageError("cursor", "is not from a page of this list", "Follow the link of the page before")
    return int(digits), position.name


def _of_ranking(
    index: Index, ranking: Ranking, wanted: Conditions, *, after: Position | None, limit: int, ascending: bool
) -> Page:
    left_out, among = wanted.without, None if wanted.among is None else frozenset(wanted.among)
    candidates: Iterator[tuple[int, str]] = (
        place
        for place in ranking.after(_place(after), ascending=ascending)
        if place[1] not in left_out and (among is None or place[1] in among)
    )
    places = [*islice(candidates, _SCANNED + 1)]
    scanned = places[:_SCANNED]
    names = tuple(name for _, name in scanned)
    page = version_listing.page(index, replace(wanted, among=names), limit=_SCANNED) if names else Page([], None)
    row_by_name = {row.name: row for row in page.rows}
    positions = {name: Position(f"#{count}", name) for count, name in scanned}
    rows = [row_by_name[name] for name in names if name in row_by_name]
    if len(rows) > limit:
        return Page(rows[:limit], positions[rows[limit - 1].name], positions)
    return Page(rows, positions[names[-1]] if len(places) > _SCANNED else None, positions)


def _of_others(
    index: Index, ranking: Ranking, wanted: Conditions, *, after: Position | None, limit: int, ascending: bool
) -> Page:
    others = replace(wanted, without=wanted.without.union(ranking.names))
    return version_listing.page(index, others, after=after, limit=limit, oldest_first=ascending)
