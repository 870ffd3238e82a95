"""Pages of the newest versions: the same versions as one list of all, each page at the same cost."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.index import index_database, schema, version_listing, version_search
from adapterhub.index.index_database import Index
from adapterhub.index.version_listing import Conditions, Page, Position
from adapterhub.index.version_search import Bound, Query
from adapterhub.manifest.measurement import REPORTED
from adapterhub_converters.errors import UsageError
from tests.support.many_names import BASES, add_names

BASE, OF_BASE = (("base",), BASES[3]), f"base = '{BASES[3]}'"
HIDDEN = frozenset({"team07/adapter-7", "team99/adapter-599"})
HUGE = (("parameters", (Bound(">=", 10**9),)),)
MIT = "'mit' IN (SELECT value FROM facets f WHERE version = v.id)"
WITH = "EXISTS (SELECT 1 FROM texts t WHERE t.version = v.id AND ' ' || card LIKE '% {}%')"


def filled(count: int) -> Index:
    connection = index_database.connect_memory()
    schema.create(connection)
    add_names(connection, count)
    return Index(Path("memory"), connection)


@pytest.fixture(scope="module")
def index() -> Iterator[Index]:
    with closing(filled(600)) as index:
        losses = [(ident, (ident % 50) / 50) for ident in range(1, 400)]
        index.connection.executemany("INSERT INTO metrics (version, name, value) VALUES (?, 'eval_loss', ?)", losses)
        index.connection.execute(f"INSERT INTO metrics (version, name, value) VALUES (7, '{REPORTED}_exact', 0.9)")
        yield index


def pages(index: Index, conditions: Conditions, limit: int, **options: Any) -> Iterator[Page]:
    page = version_listing.page(index, conditions, limit=limit, **options)
    yield page
    while page.end:
        page = version_listing.page(index, conditions, after=Position.parse(str(page.end)), limit=limit, **options)
        yield page


@pytest.mark.parametrize("common_limit", [0, 5000])
@pytest.mark.parametrize("oldest_first", [False, True])
@pytest.mark.parametrize(
    ("conditions", "condition"),
    [
        (Conditions(), "1"),
        (Conditions(facets=(BASE,)), OF_BASE),
        (Conditions(facets=(BASE, (("license",), "MIT"))), f"{OF_BASE} AND {MIT}"),
        (Conditions(facets=((("language", "tag"), "subject-7"),)), "name LIKE '%-7'"),
        (Conditions(namespace="team07"), "name LIKE 'team07/%'"),
        (Conditions(words="b"), WITH.format("b")),
        (Conditions(words="ba", facets=(BASE,)), f"{OF_BASE} AND {WITH.format('ba')}"),
        (Conditions(bounds=(("parameters", (Bound(">=", 1025),)),)), "0"),
        (Conditions(bounds=(("parameters", (Bound("<=", 1024),)),), without=HIDDEN), "id NOT IN (8, 600)"),
        (Conditions(bounds=(("r", (Bound("=", 8),)), ("size", (Bound(">", 4096),)))), "0"),
        (Conditions(metrics=(("eval_loss", (Bound("<", 0.5),)),)), "id % 50 < 25 AND id < 400"),
        (Conditions(metrics=(("exact", (Bound(">", 0.5),)),)), "id = 7"),
    ],
)  # fmt: skip
def test_pages_are_the_parts_of_one_list(
    index: Index, monkeypatch: pytest.MonkeyPatch, conditions: Conditions, condition: str, oldest_first: bool, common_limit: int
) -> None:
    monkeypatch.setattr(version_search, "COMMON", common_limit)
    monkeypatch.setattr(version_listing, "SCANNED", 50)
    monkeypatch.setattr(version_listing, "_SCANNED_FOR_WORDS", 20)
    order = "time, name" if oldest_first else "time DESC, name DESC"
    expected = [name for (name,) in index.connection.execute(f"SELECT name FROM versions v WHERE {condition} ORDER BY {order}")]
    listed = [*pages(index, conditions, 7, oldest_first=oldest_first)]
    assert [row.name for page in listed for row in page.rows] == expected
    assert all(len(page.rows) <= 7 for page in listed)


@pytest.mark.parametrize("common_limit", [0, 5000])
@pytest.mark.parametrize("oldest_first", [False, True])
@pytest.mark.parametrize("conditions", [Conditions(), Conditions(facets=(BASE,)), Conditions(words="b")])
def test_pages_by_creation_have_each_name_at_the_time_of_its_first_version(
    monkeypatch: pytest.MonkeyPatch, conditions: Conditions, oldest_first: bool, common_limit: int
) -> None:
    monkeypatch.setattr(version_search, "COMMON", common_limit)
    monkeypatch.setattr(version_listing, "SCANNED", 20)
    with closing(filled(60)) as index:
        by_push = [row.name for page in pages(index, conditions, 7, oldest_first=oldest_first) for row in page.rows]
        # Every second name gets an earlier version, in the opposite order.
        names = sorted(name for (name,) in index.connection.execute("SELECT name FROM versions"))
        times = {name: f"20{50 - number:02}-01-01T00:00:00Z" for number, name in enumerate(names[::2])}
        sql = (
            "INSERT INTO versions (name, number, digest, manifest_size, time, parents) SELECT name, 0, name, 1, ?, '[]'"
            " FROM versions WHERE name = ?"
        )
        for name, time in times.items():
            index.connection.execute(sql, (time, name))
        first = version_listing.first_times(index, names)
        assert {name: first[name] for name in times} == times
        listed = [*pages(index, conditions, 7, oldest_first=oldest_first, by_creation=True)]
        assert {row.number for page in listed for row in page.rows} == {1}
        expected = sorted(by_push, key=lambda name: (first[name], name), reverse=not oldest_first)
        assert [row.name for page in listed for row in page.rows] == expected


def test_where_a_page_ends_does_not_tell_of_names_that_are_left_out(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_listing, "SCANNED", 10)
    names = [row.name for page in pages(index, Conditions(), 100) for row in page.rows]
    hidden = frozenset(names[5:500])
    ends = [page.end.name for page in pages(index, Conditions(bounds=HUGE, without=hidden), 7) if page.end]
    assert ends
    assert not {*ends} & {*hidden}


def steps(index: Index, call: Callable[[], Any]) -> int:
    """How many tens of steps of SQLite's virtual machine a call takes."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    index.connection.set_progress_handler(tick, 10)
    call()
    index.connection.set_progress_handler(None, 0)
    return count


@pytest.mark.parametrize(
    "conditions",
    [
        Conditions(),
        Conditions(facets=(BASE,)),
        Conditions(facets=((("tag",), "subject-7"),)),
        Conditions(bounds=HUGE),
    ],
)
def test_a_page_costs_the_same_wherever_it_is_and_however_many_names_there_are(
    monkeypatch: pytest.MonkeyPatch, conditions: Conditions
) -> None:
    monkeypatch.setattr(version_search, "COMMON", 5)
    monkeypatch.setattr(version_listing, "SCANNED", 200)
    costs = []
    for count in (1_000, 3_000):
        with closing(filled(count)) as index:
            for at in (0, count // 2, count - 400):
                sql = "SELECT time, name FROM versions ORDER BY time DESC, name DESC LIMIT 1 OFFSET ?"
                ((time, name),) = index.connection.execute(sql, (at,))
                after = Position(time, name) if at else None
                costs.append(steps(index, lambda: version_listing.page(index, conditions, after=after, limit=10)))  # noqa: B023
    assert max(costs) < 2 * min(costs) + 200


@pytest.mark.parametrize("facets", [False, True])
@pytest.mark.parametrize(
    "query",
    [
        Query("b"),
        Query("adapter"),
        Query("b", facets=(("license", "mit"),)),
        Query(facets=(("license", "mit"),)),
        Query(facets=(("base", BASES[3]), ("license", "mit"))),
        Query(bounds=(("r", (Bound("=", 8),)),)),
        Query("b", tags=("subject-7",)),
        Query("b", namespace="team07"),
        Query(tags=("latest",), all_versions=True),
    ],
)
def test_a_search_costs_the_same_however_many_names_match(
    monkeypatch: pytest.MonkeyPatch, query: Query, *, facets: bool
) -> None:
    monkeypatch.setattr(version_search, "COMMON", 30)
    costs = []
    for count in (2_000, 6_000):
        with closing(filled(count)) as index:
            costs.append(steps(index, lambda: version_search.search(index, query, facets=facets)))
    assert costs[1] < 2 * costs[0] + 2000


def test_names_and_facets_are_found_by_an_index(index: Index) -> None:
    assert version_listing.names_after(index, "team50/adapter-150", 2, ()) == ["team50/adapter-250", "team50/adapter-350"]
    assert version_listing.names_after(index, "team99/adapter-499", 9, ["team99/adapter-599"]) == ["team99/adapter-99"]
    first_cost = steps(index, lambda: version_listing.names_after(index, "", 5, ()))
    assert steps(index, lambda: version_listing.names_after(index, "team90/", 5, ())) < 2 * first_cost
    assert version_listing.count_names(index, "team50", ["team50/adapter-50"], 9) == 5
    assert version_listing.count_names(index, "team50", (), 3) == 3
    page = version_listing.page(index, Conditions(namespace="team07"), limit=1)
    facets = version_listing.facets(index, page.rows)[page.rows[0].name, 1]
    assert (facets["base"], facets["library"]) == ([page.rows[0].base], ["peft"])


def test_the_values_of_hidden_names_are_not_among_the_facets(index: Index) -> None:
    values = version_listing.values_of_kinds(index, ("tag", "license"), frozenset(), 1000)
    assert (len(values["tag"]), {*values["license"]}) == (600, {"mit", "apache-2.0", "llama3"})
    hidden = version_listing.values_of_kinds(index, ("tag",), frozenset({"team07/adapter-7"}), 1000)["tag"]
    assert {*values["tag"]} - {*hidden} == {"subject-7"}
    assert len(version_listing.values_of_kinds(index, ("tag",), frozenset(), 5)["tag"]) == 5


@pytest.mark.parametrize(
    "text", ["", "-1", "9", "2026 ", " team/sql", "2026-01-01T00:00:00Z team/../sql", f"{'2' * 41} team/sql"]
)
def test_a_cursor_of_no_page_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not from a page of this list"):
        Position.parse(text)


def test_the_index_by_time_leads_to_a_page() -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        schema.create(connection)
        sql = (
            "EXPLAIN QUERY PLAN SELECT id FROM versions v WHERE (v.time, v.name) < (?, ?) ORDER BY time DESC, name DESC LIMIT 9"
        )
        (step,) = [row[3] for row in connection.execute(sql, ("", ""))]
    assert step == "SEARCH v USING COVERING INDEX versions_time ((time,name)<(?,?))"
