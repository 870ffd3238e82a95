"""Search, the bases and their adapters, and the events of a namespace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import ClassVar

from adapterhub.hub import stars
from adapterhub.hub.administration import profiles
from adapterhub.hub.administration.profiles import Profile
from adapterhub.hub.hidden_names import HiddenSet
from adapterhub.hub.model_bases import WholeModel
from adapterhub.hub.popularity import DOWNLOADS, LIKES
from adapterhub.hub.ranked_listing import ranked_page
from adapterhub.hub.workers import Worker
from adapterhub.index import index_file, queries, version_listing, version_search
from adapterhub.index.queries import VersionRow
from adapterhub.index.version_listing import Conditions, Position
from adapterhub.index.version_search import Query, SearchResult
from adapterhub.manifest import release_statement
from adapterhub.store.store import Entry
from adapterhub_converters.errors import NotFoundError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.runtime_rules import APPLIED, RUNTIMES

from .site import Page, PageRequest, with_query

_PER_PAGE = 20
_MAX_PAGES = 50
_FACETS = {"base": "Base", "r": "Rank", "method": "Method", "license": "License", "format": "Format", "task": "Task"}
_MAX_VALUES = 8  # values shown per facet
_MAX_JUDGED = 100  # matches whose verdicts for a runtime are computed


@dataclass(frozen=True)
class Choice:
    """A value of a facet: how many matches have it, whether it is chosen, and the address after a click."""

    value: str
    count: int
    chosen: bool
    url: str


@dataclass(frozen=True)
class SearchPage(Page):
    """The matches of a query, best first.

    Attributes:
        fields: The query's parameters that are set, as entered.
        rows: The matches on this page.
        total: The number of all matches; None if not all were examined.
        facets: Title to choices.
        previous: The address of the page before; empty on the first, and in an order that is read by cursors.
        following: The address of the next page.
        downloads: Those of the last days, by name.
        stars: Stars by name.
        orders: What the matches can be sorted by, and the address of each.
        runtimes: Runtimes that verdicts can be filtered by.
        has_more: Whether there are more matches than `total`, which the facets, then without their counts, are of.
        deprecated: Name and number of deprecated versions, to the reason.
        wrong: The fault in the query; empty if it is valid.
    """

    fields: Mapping[str, str]
    rows: Sequence[VersionRow]
    total: int | None
    has_more: bool
    facets: Mapping[str, Sequence[Choice]]
    previous: str
    following: str
    downloads: Mapping[str, int] = field(default_factory=dict)
    stars: Mapping[str, int] = field(default_factory=dict)
    runtimes: Sequence[str] = tuple(RUNTIMES)
    deprecated: Mapping[tuple[str, int], str] = field(default_factory=dict)
    wrong: str = ""
    template: ClassVar[str] = "search.html"

    @property
    def orders(self) -> Sequence[Choice]:
        """The orders in words, each with its address."""
        chosen = self.fields.get("sort", "")
        others = {key: value for key, value in self.fields.items() if key != "sort"}
        # Without words, the newest come first anyway.
        orders = SORTS if "q" in self.fields else {key: words for key, words in SORTS.items() if key}
        chosen = chosen if chosen in orders else _NEWEST
        return [Choice(words, 0, key == chosen, with_query("/", **others, sort=key)) for key, words in orders.items()]


_NEWEST = "newest"
SORTS: Mapping[str, str] = {"": "Best match", _NEWEST: "Newest", DOWNLOADS: "Most pulled", "stars": "Stars"}
"""What search results are sorted by."""
_FIELDS = ("q", *_FACETS, "rank", "size", "metric", "runtime", "sort")


def search_page(page_request: PageRequest, worker: Worker) -> SearchPage:
    """GET /: search with facets; without a query, the newest versions."""
    fields = {key: value for key in _FIELDS if (value := page_request.query(key).strip())}
    try:
        if (order := fields.get("sort", "")) not in SORTS:
            raise UsageError("sort", f"{order[:80]!r} is not one of {', '.join(filter(None, SORTS))}")
        hidden = page_request.hub.hidden(worker, page_request.who)
        query = _query(fields, _PER_PAGE, hidden.names)
        find = _sorted_rows if order else _best_rows
        rows, previous, following = find(page_request, worker, fields, query)
    except UsageError as error:
        return SearchPage(fields, (), 0, False, {}, "", "", wrong=str(error))
    counts, runtime = _facet_counts(page_request, worker, query, hidden), fields.get("runtime", "")
    names = [row.name for row in rows]
    return SearchPage(
        fields,
        rows,
        None if runtime else counts.total,
        counts.has_more,
        _choices(fields, counts.facets),
        previous,
        following,
        downloads=page_request.hub.downloads.recent(names),
        stars=stars.counts(worker.database, names),
        deprecated=worker.registry.deprecations(names),
    )


_Rows = tuple[Sequence[VersionRow], str, str]  # of a page, and the addresses of the one before and of the next one


def _best_rows(page_request: PageRequest, worker: Worker, fields: Mapping[str, str], query: Query) -> _Rows:
    """Return a page of the best matches, by its number."""
    number = min(_MAX_PAGES, max(1, int(page_request.query("page")))) if page_request.query("page").isdecimal() else 1
    start, runtime = (number - 1) * _PER_PAGE, fields.get("runtime", "")
    query = replace(query, limit=_MAX_JUDGED if runtime else start + _PER_PAGE + 1)
    rows = _readable(page_request, worker, version_search.search(worker.registry.index, query).rows, runtime)
    previous = with_query("/", **fields, page=number - 1 if number > 2 else "") if number > 1 else ""
    has_more = len(rows) > start + _PER_PAGE and number < _MAX_PAGES
    return rows[start : start + _PER_PAGE], previous, with_query("/", **fields, page=number + 1) if has_more else ""


def _sorted_rows(page_request: PageRequest, worker: Worker, fields: Mapping[str, str], query: Query) -> _Rows:
    """Return the matches after a cursor, in an order that an index or a ranking has; a page costs the same wherever it is."""
    index, hub, cursor = worker.registry.index, page_request.hub, page_request.query("cursor")
    facets = tuple((("base-name" if kind == "base" and "/" not in value else kind,), value) for kind, value in query.facets)
    wanted = Conditions(query.words, facets, bounds=query.bounds, metrics=query.metrics, without=query.without)
    after = Position.parse(cursor) if cursor else None
    if fields["sort"] == _NEWEST:
        page = version_listing.page(index, wanted, after=after, limit=_PER_PAGE)
    else:
        ranking = hub.rankings.get(DOWNLOADS if fields["sort"] == DOWNLOADS else LIKES)
        page = ranked_page(index, ranking, wanted, after=after, limit=_PER_PAGE)
    following = with_query("/", **fields, cursor=str(page.end)) if page.end else ""
    return _readable(page_request, worker, page.rows, fields.get("runtime", "")), "", following


def _readable(page_request: PageRequest, worker: Worker, rows: Sequence[VersionRow], runtime: str) -> list[VersionRow]:
    """Return the versions that the client may read, and that a runtime applies as they were trained, if one is given."""
    readable = [row for row in rows if page_request.may_read(worker, row.name)]
    return [row for row in readable if _is_applied(page_request, worker, row, runtime)] if runtime else readable


def _query(fields: Mapping[str, str], limit: int, hidden: frozenset[str]) -> Query:
    """Return the query of a form. UsageError for an invalid number or comparison."""
    bounds = []
    for name, column in (("r", "r"), ("rank", "r"), ("size", "size")):
        if name in fields:
            bounds.append((column, version_search.parse_bounds(fields[name], name, size=column == "size")))
    runtime = fields.get("runtime", "")
    if runtime and runtime not in RUNTIMES:
        raise UsageError(runtime[:80], "unknown runtime")
    return Query(
        fields.get("q", ""),
        facets=tuple((kind, fields[kind]) for kind in _FACETS if kind in fields and kind != "r"),
        bounds=tuple(bounds),
        metrics=(version_search.parse_metric(fields["metric"], "metric"),) if "metric" in fields else (),
        limit=limit,
        without=hidden,
    )


def _facet_counts(page_request: PageRequest, worker: Worker, query: Query, hidden: HiddenSet) -> SearchResult:
    """Return the counts of a query, cached until something is pushed, because they take longer than its first matches."""
    index = worker.registry.index
    key = index_file.state(index), replace(query, limit=1, without=frozenset()), hidden.serial
    counted = replace(query, limit=1, without=hidden.names)
    return page_request.site.counts.get(key, lambda: version_search.search(index, counted, facets=True))


def _is_applied(page_request: PageRequest, worker: Worker, row: VersionRow, runtime: str) -> bool:
    read = page_request.site.facts_of(worker, row)
    return runtime in read.verdicts and read.verdicts[runtime].verdict == APPLIED


def _choices(fields: Mapping[str, str], facets: Mapping[str, Mapping[str, int]]) -> dict[str, list[Choice]]:
    choices_by_title = {}
    for kind, title in _FACETS.items():
        values = list(facets.get(kind, {}).items())[:_MAX_VALUES]
        chosen = fields.get(kind, "")
        if chosen and chosen.lower() not in (value.lower() for value, _ in values):
            values.insert(0, (chosen, 0))
        other_fields = {key: value for key, value in fields.items() if key != kind}
        choices = [
            Choice(
                value,
                count,
                is_chosen,
                with_query("/", **other_fields) if is_chosen else with_query("/", **other_fields, **{kind: value}),
            )
            for value, count in values
            if (is_chosen := value.lower() == chosen.lower()) or count
        ]
        if len(choices) > 1 or chosen:
            choices_by_title[title] = choices
    return choices_by_title


# ---- bases


@dataclass(frozen=True)
class BasesPage(Page):
    """The bases of the adapters here, with the number of adapters, and the whole models here, uploaded or kept."""

    bases: Mapping[str, int]
    models: Sequence[WholeModel]
    template: ClassVar[str] = "bases.html"


@dataclass(frozen=True)
class BasePage(Page):
    """A base and the newest version of each adapter for it, each below its parent."""

    name: str
    rows: Sequence[tuple[VersionRow, int]]
    total: int
    has_more: bool
    ranks: Mapping[str, int]
    methods: Mapping[str, int]
    targets: Mapping[str, int]
    template: ClassVar[str] = "base.html"


_MAX_ADAPTERS = 200


def bases_page(page_request: PageRequest, worker: Worker) -> Page:
    """GET /-/bases and /-/bases?name=…: a query, because names of bases may have any characters."""
    name, hub = page_request.query("name").strip(), page_request.hub
    if not name:
        return BasesPage(
            _facet_counts(page_request, worker, Query(), hub.hidden(worker, page_request.who)).facets.get("base", {}),
            [model for model in hub.model_bases.uploaded_models(worker) if page_request.may_read(worker, model.name)]
            + [
                model
                for model in hub.model_bases.kept_models()
                if hub.upstream and hub.upstream.may_show(worker, page_request.who, model.name)
            ],
        )
    hidden = hub.hidden(worker, page_request.who)
    query = Query(facets=(("base", name),), limit=_MAX_ADAPTERS, without=hidden.names)
    rows = [row for row in version_search.search(worker.registry.index, query).rows if page_request.may_read(worker, row.name)]
    if not rows:
        raise NotFoundError(name[:200], "no adapter here is for this base")
    counts = _facet_counts(page_request, worker, query, hidden)
    kinds = (counts.facets[kind] for kind in ("r", "method", "target"))
    return BasePage(rows[0].base or name, _tree(rows), counts.total, counts.has_more, *kinds)


def _tree(rows: Sequence[VersionRow]) -> list[tuple[VersionRow, int]]:
    """Return rows with their depth: each once, below its first parent among the rows."""
    by_name = {row.name: row for row in rows}
    children: dict[str, list[VersionRow]] = {}
    for row in rows:
        names = [parent.partition(":")[0].partition("@")[0] for parent in row.parents]
        parent_name = next((name for name in names if name in by_name and name != row.name), "")
        children.setdefault(parent_name, []).append(row)
    placed: list[tuple[VersionRow, int]] = []
    placed_names: set[str] = set()
    waiting = [(row, 0) for row in reversed(children.get("", []))]
    while waiting:
        row, depth = waiting.pop()
        if row.name not in placed_names:
            placed_names.add(row.name)
            placed.append((row, depth))
            waiting += [(child, min(depth + 1, 6)) for child in reversed(children.get(row.name, []))]
    return placed + [(row, 0) for row in rows if row.name not in placed_names]  # adapters whose parents form a cycle


# ---- namespaces


@dataclass(frozen=True)
class Event:
    """An entry of a log in words: the action, its version or tags, its author and message."""

    name: str
    time: str
    what: str
    number: int
    tags: Sequence[str]
    author: str
    message: str


_ORDERS: Mapping[str, str] = {"changed": "Last changed", "name": "Name", "size": "Size", "downloads": "Downloads"}


@dataclass(frozen=True)
class NamespacePage(Page):
    """The adapters of a namespace, sorted by one of `orders`, and their events.

    Attributes:
        profile: What the account of that name says of itself.
        downloads: Those of the last days, by name.
        is_cut: Whether there are more: the rows are those that were changed last.
    """

    name: str
    profile: Profile
    rows: Sequence[VersionRow]
    events: Sequence[Event]
    downloads: Mapping[str, int]
    order: str
    is_cut: bool
    orders: Mapping[str, str] = field(default_factory=lambda: _ORDERS)
    template: ClassVar[str] = "namespace.html"


_MAX_NAMES, _MAX_LOGS, _MAX_ENTRIES, _MAX_EVENTS = 200, 40, 8, 40
_WORDS = {
    "push": "pushed", "tag": "tagged", "untag": "removed the tag", "delete": "removed", "restore": "restored",
    "protect": "protected", "unprotect": "unprotected", "deprecate": "deprecated", "undeprecate": "no longer deprecated",
    "evaluate": "evaluated", "approve": "approved", "rollback": "rolled back", "withdraw": "withdrawn",
    "unwithdraw": "no longer withdrawn", "rollout": "rolling out",
}  # fmt: skip


def namespace_page(page_request: PageRequest, worker: Worker) -> NamespacePage:
    """GET /{namespace}."""
    name = page_request.part("namespace")
    newest = queries.newest(
        worker.registry.index, name, _MAX_NAMES, without=page_request.hub.hidden_names(worker, page_request.who)
    )
    visible_rows = [row for row in newest if page_request.may_read(worker, row.name)]
    if not visible_rows:
        raise NotFoundError(name[:200], "nothing was pushed to this namespace, or it is private")
    events = log_events(worker, [row.name for row in visible_rows[:_MAX_LOGS]])
    downloads = page_request.hub.downloads.recent([row.name for row in visible_rows])
    order = page_request.query("sort") or "changed"
    if order not in _ORDERS:
        raise UsageError("sort", f"{order[:80]!r} is not one of {', '.join(_ORDERS)}")
    keys: Mapping[str, Callable[[VersionRow], object]] = {
        "name": lambda row: row.name,
        "size": lambda row: -(row.size or 0),
        "downloads": lambda row: -downloads[row.name],
    }
    # They come as they were changed, which also decides between equal ones.
    rows = sorted(visible_rows, key=keys[order]) if order in keys else visible_rows  # type: ignore[arg-type]
    profile = profiles.find_profile(worker.database, name)
    return NamespacePage(name, profile, rows, events, downloads, order, len(newest) == _MAX_NAMES)


def log_events(worker: Worker, names: Sequence[str], *, per_name: int = _MAX_ENTRIES, limit: int = _MAX_EVENTS) -> list[Event]:
    """Return the last entries of the logs of some names, newest first."""
    entries = []
    for name in names:
        last = worker.registry.ledger.current(name).seq
        for seq in range(max(1, last - per_name + 1), last + 1):
            if entry := worker.registry.store.log.entry(name, seq):
                entries.append(entry[0])
    entries.sort(key=lambda entry: (entry.time, entry.seq), reverse=True)
    return [_event(entry) for entry in entries if entry.op in _WORDS][:limit]


def _event(entry: Entry) -> Event:
    message = release_statement.log_summary(entry.op, entry.message)
    tags = [tag for tag in entry.tags if entry.op != "push" or tag != "latest"]
    return Event(entry.name, entry.time, _WORDS[entry.op], entry.number, tags, entry.author, message)
