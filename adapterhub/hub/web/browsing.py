"""Search, the bases and their adapters, and what happened in a namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from adapterhub.hub.workers import Worker
from adapterhub.index import index_file, queries, search
from adapterhub.index.queries import Row
from adapterhub.index.search import Found, Query
from adapterhub.manifest import measurement
from adapterhub.store.store import Entry
from adapterhub_converters.errors import NotFoundError, UsageError
from adapterhub_converters.runtimes import APPLIED, RUNTIMES

from . import facts
from .site import Asked, Page, with_query

_PER_PAGE = 20
_PAGES = 50
_FACETS = {"base": "Base", "r": "Rank", "method": "Method", "license": "License", "format": "Format", "task": "Task"}
_VALUES = 8  # of a facet that are shown
_JUDGED = 100  # matches whose verdicts are looked at


@dataclass(frozen=True)
class Choice:
    """A value of a facet: how many matches have it, whether it is chosen, and where a click leads."""

    value: str
    count: int
    chosen: bool
    url: str


@dataclass(frozen=True)
class SearchPage(Page):
    """The matches of a query, best first.

    Attributes:
        fields: Parameters of the query that are set, as they were given.
        rows: One page of them.
        total: The number of all matches; None if not all were looked at.
        facets: Title to choices.
        runtimes: Names that verdicts can be asked for.
        deprecated: Names and numbers with the reason.
        wrong: What is wrong with the query.
    """

    fields: Mapping[str, str]
    rows: Sequence[Row]
    total: int | None
    facets: Mapping[str, Sequence[Choice]]
    previous: str
    following: str
    runtimes: Sequence[str] = tuple(RUNTIMES)
    deprecated: Mapping[tuple[str, int], str] = field(default_factory=dict)
    wrong: str = ""
    template: ClassVar[str] = "search.html"


_FIELDS = ("q", *_FACETS, "rank", "size", "metric", "runtime")


def search_page(asked: Asked, worker: Worker) -> SearchPage:
    """GET /: search with facets; without a query, the newest versions."""
    fields = {key: value for key in _FIELDS if (value := asked.query(key).strip())}
    number = min(_PAGES, max(1, int(asked.query("page")))) if asked.query("page").isdecimal() else 1
    start = (number - 1) * _PER_PAGE
    try:
        query = _query(fields, start + _PER_PAGE + 1, asked.hub.hidden(worker, asked.who))
    except UsageError as error:
        return SearchPage(fields, (), 0, {}, "", "", wrong=str(error))
    runtime = fields.get("runtime", "")
    rows = [row for row in search.search(worker.registry.index, query).rows if asked.may_read(worker, row.name)]
    counted = _counted(asked, worker, query)
    total: int | None = counted.total
    if runtime:
        rows, total = [row for row in rows if _applies(asked, worker, row, runtime)], None
    more = len(rows) > start + _PER_PAGE and number < _PAGES
    return SearchPage(
        fields,
        rows[start : start + _PER_PAGE],
        total,
        _choices(fields, counted.facets),
        with_query("/", **fields, page=number - 1 if number > 2 else "") if number > 1 else "",
        with_query("/", **fields, page=number + 1) if more else "",
        deprecated=worker.registry.deprecations(),
    )


def _query(fields: Mapping[str, str], limit: int, hidden: tuple[str, ...]) -> Query:
    """The query of a form; UsageError for a number or a comparison that is none."""
    bounds = []
    for name, column in (("r", "r"), ("rank", "r"), ("size", "size")):
        if name in fields:
            bounds.append((column, search.parse_bounds(fields[name], name, size=column == "size")))
    runtime = fields.get("runtime", "")
    if runtime and runtime not in RUNTIMES:
        raise UsageError(runtime[:80], "unknown runtime")
    return Query(
        fields.get("q", ""),
        facets=tuple((kind, fields[kind]) for kind in _FACETS if kind in fields and kind != "r"),
        bounds=tuple(bounds),
        metrics=(search.parse_metric(fields["metric"], "metric"),) if "metric" in fields else (),
        limit=_JUDGED if runtime else limit,
        without=hidden,
    )


def _counted(asked: Asked, worker: Worker, query: Query) -> Found:
    """The counts of a query, which take longer than its first matches, and are the same until something is pushed."""
    index = worker.registry.index
    query = replace(query, limit=1)
    return asked.site.counts.get((index_file.state(index), query), lambda: search.search(index, query, facets=True))


def _applies(asked: Asked, worker: Worker, row: Row, runtime: str) -> bool:
    read = asked.site.facts.get(row.digest, lambda: facts.read(worker, row))
    return runtime in read.verdicts and read.verdicts[runtime].verdict == APPLIED


def _choices(fields: Mapping[str, str], facets: Mapping[str, Mapping[str, int]]) -> dict[str, list[Choice]]:
    found = {}
    for kind, title in _FACETS.items():
        values = list(facets.get(kind, {}).items())[:_VALUES]
        chosen = fields.get(kind, "")
        if chosen and chosen.lower() not in (value.lower() for value, _ in values):
            values.insert(0, (chosen, 0))
        rest = {key: value for key, value in fields.items() if key != kind}
        choices = [
            Choice(value, count, on, with_query("/", **rest) if on else with_query("/", **rest, **{kind: value}))
            for value, count in values
            if (on := value.lower() == chosen.lower()) or count
        ]
        if len(choices) > 1 or chosen:
            found[title] = choices
    return found


# ---- bases


@dataclass(frozen=True)
class BasesPage(Page):
    """The bases that adapters here are for, with their number."""

    bases: Mapping[str, int]
    template: ClassVar[str] = "bases.html"


@dataclass(frozen=True)
class BasePage(Page):
    """A base and the newest version of each adapter for it, those with a parent below their parents."""

    name: str
    rows: Sequence[tuple[Row, int]]
    total: int
    ranks: Mapping[str, int]
    methods: Mapping[str, int]
    targets: Mapping[str, int]
    template: ClassVar[str] = "base.html"


_MOST_ADAPTERS = 200


def bases_page(asked: Asked, worker: Worker) -> Page:
    """GET /-/bases and /-/bases?name=…: names of bases may have any characters."""
    name = asked.query("name").strip()
    if not name:
        return BasesPage(_counted(asked, worker, Query(without=asked.hub.hidden(worker, asked.who))).facets.get("base", {}))
    query = Query(facets=(("base", name),), limit=_MOST_ADAPTERS, without=asked.hub.hidden(worker, asked.who))
    rows = [row for row in search.search(worker.registry.index, query).rows if asked.may_read(worker, row.name)]
    if not rows:
        raise NotFoundError(name[:200], "no adapter here is for this base")
    counted = _counted(asked, worker, query)
    kinds = (counted.facets[kind] for kind in ("r", "method", "target"))
    return BasePage(rows[0].base or name, _tree(rows), counted.total, *kinds)


def _tree(rows: Sequence[Row]) -> list[tuple[Row, int]]:
    """Rows with their depth: below the first parent that is among them, each once."""
    by_name = {row.name: row for row in rows}
    children: dict[str, list[Row]] = {}
    for row in rows:
        names = [parent.partition(":")[0].partition("@")[0] for parent in row.parents]
        above = next((name for name in names if name in by_name and name != row.name), "")
        children.setdefault(above, []).append(row)
    placed: list[tuple[Row, int]] = []
    seen: set[str] = set()
    waiting = [(row, 0) for row in reversed(children.get("", []))]
    while waiting:
        row, depth = waiting.pop()
        if row.name not in seen:
            seen.add(row.name)
            placed.append((row, depth))
            waiting += [(child, min(depth + 1, 6)) for child in reversed(children.get(row.name, []))]
    return placed + [(row, 0) for row in rows if row.name not in seen]  # circles


# ---- namespaces


@dataclass(frozen=True)
class Event:
    """An entry of a log, in words: what was done, to which version or tags, by whom and why."""

    name: str
    time: str
    what: str
    number: int
    tags: Sequence[str]
    author: str
    message: str


@dataclass(frozen=True)
class NamespacePage(Page):
    """The adapters of a namespace, the last changed first, and what happened to them."""

    name: str
    rows: Sequence[Row]
    events: Sequence[Event]
    template: ClassVar[str] = "namespace.html"


_MOST_NAMES, _MOST_LOGS, _MOST_ENTRIES, _MOST_EVENTS = 200, 40, 8, 40
_WORDS = {
    "push": "pushed", "tag": "tagged", "untag": "removed the tag", "delete": "removed", "restore": "restored",
    "protect": "protected", "unprotect": "unprotected", "deprecate": "deprecated", "undeprecate": "no longer deprecated",
    "evaluate": "evaluated",
}  # fmt: skip


def namespace_page(asked: Asked, worker: Worker) -> NamespacePage:
    """GET /{namespace}."""
    name = asked.part("namespace")
    newest = queries.newest(worker.registry.index, name, _MOST_NAMES, without=asked.hub.hidden(worker, asked.who))
    every = [row for row in newest if asked.may_read(worker, row.name)]
    if not every:
        raise NotFoundError(name[:200], "nothing was pushed to this namespace, or it is private")
    return NamespacePage(name, every, events(worker, [row.name for row in every[:_MOST_LOGS]]))


def events(worker: Worker, names: Sequence[str], *, each: int = _MOST_ENTRIES, most: int = _MOST_EVENTS) -> list[Event]:
    """The last entries of logs, the latest first."""
    found = []
    for name in names:
        last = worker.registry.ledger.current(name).seq
        for seq in range(max(1, last - each + 1), last + 1):
            if entry := worker.registry.store.log.entry(name, seq):
                found.append(entry[0])
    found.sort(key=lambda entry: (entry.time, entry.seq), reverse=True)
    return [_event(entry) for entry in found if entry.op in _WORDS][:most]


def _event(entry: Entry) -> Event:
    message = measurement.line(entry.message) if entry.op == "evaluate" else entry.message
    tags = [tag for tag in entry.tags if entry.op != "push" or tag != "latest"]
    return Event(entry.name, entry.time, _WORDS[entry.op], entry.number, tags, entry.author, message)
