# ruff: noqa: S608 - what is put into a statement here is fixed, checked by `require_allowed`, or a `?`
"""Search for adapters by words and facts, or by the bytes of a file.

The words never reach FTS5's own syntax (sqlite.org/fts5.html, "Full-text Query Syntax"): each becomes one quoted phrase whose
last token is a prefix, and all of them must match. Any text is a valid query. The newest matching version of each name is
found, ranked by bm25 over the columns of the index, where a match in the name weighs most. sqlite-utils builds that index, but
its own `search` has no weights, and importing it takes longer than a search.

Words that more than COMMON versions contain hardly distinguish them, and scoring each takes long (54 ms of bm25 for a word in
50,000 versions). For these, names and titles with the words come first, then the others, in both the latest push first; and of
what very many match, with words or without, only the latest are read and counted, so that it costs the same among any number.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field, replace

from adapterhub.digest import Digest, is_hex
from adapterhub.manifest.measurement import REPORTED
from adapterhub.sqlite_file import of_one_snapshot
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .index_database import Index
from .queries import VersionRow, rows_by_id, select, visible_condition

# name, title, tags, description, facts, card: a word in a long card is the weakest evidence.
_WEIGHTS = (8.0, 6.0, 4.0, 4.0, 3.0, 1.0)
FACETS = ("base", "method", "r", "target", "license", "task", "language", "tag", "dataset", "model_type", "format", "dtype")
"""Kinds of facets, in the order in which they are shown."""
COMMON = 1000  # versions
MAX_VALUES = 20  # most frequent values of a facet
_MAX_INDEXED = 2  # letters of the beginnings that `texts_fts` has an index of
COLUMNS = {"r", "size", "parameters"}
"""Columns whose numbers have bounds; the size is in bytes."""
_OPERATORS = {"<", "<=", ">", ">=", "="}
# Decimal and binary units: 10MB, 10M, 10MiB.
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**n for n, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**n for n, prefix in enumerate("kmgt", 1)}
_UNITS |= {prefix: 1000**n for n, prefix in enumerate("kmgt", 1)}
NEWEST = "NOT EXISTS (SELECT 1 FROM versions n WHERE n.name = v.name AND n.number > v.number)"  # of its name
IN_NAMESPACE = "v.name > ? || '/' AND v.name < ? || '0'"  # as in queries.IN_NAMESPACE
Statement = tuple[str, tuple[object, ...]]
"""A statement with its values."""
_HAS_FACET = "kind = ? AND value = ?"
_WITH_WORDS = "SELECT rowid AS id FROM texts_fts WHERE texts_fts MATCH ?"
_IDS = "hit AS MATERIALIZED (SELECT value AS id FROM json_each(?))"
_QUANTITY = safe_regex.Pattern(r"(-?[0-9]+(?:\.[0-9]*)?(?:e-?[0-9]{1,2})?)\s*([a-z]*)")


@dataclass(frozen=True, slots=True)
class Bound:
    """A comparison that a number must pass; `operator` is spelled as in SQL."""

    operator: str
    value: float


Bounds = tuple[Bound, ...]


@dataclass(frozen=True)
class Query:
    """A search; every condition must hold.

    Attributes:
        words: As typed. Without any, the newest versions come first.
        facets: Kind (one of FACETS except `r`) and value, ignoring case; a base may be named without its organization.
        tags: Tags in the registry or of the model card.
        namespace: Find adapters of this namespace only; empty for all.
        bounds: Columns of COLUMNS and the bounds of their numbers.
        metrics: Name of a metric, also of one that was reported with a push, and its bounds.
        all_versions: Return every version that matches instead of the newest of each name.
        limit: The number of versions to return.
        without: Names to leave out of the results and of all counts.
    """

    words: str = ""
    facets: tuple[tuple[str, str], ...] = ()
    tags: tuple[str, ...] = ()
    namespace: str = ""
    bounds: tuple[tuple[str, Bounds], ...] = ()
    metrics: tuple[tuple[str, Bounds], ...] = ()
    all_versions: bool = False
    limit: int = 20
    without: frozenset[str] = frozenset()


@dataclass(frozen=True)
class SearchResult:
    """The best matches, the number of all matches, and the facets of all matches: kind to value to count.

    Attributes:
        has_more: There are more matches than `total`, as counting all of them would have taken longer than finding these; the
            facets are those of the `total` newest.
    """

    rows: list[VersionRow]
    total: int
    facets: dict[str, dict[str, int]] = field(default_factory=dict)
    has_more: bool = False


@dataclass(frozen=True, slots=True)
class Holder:
    """A version and the path of one of its files; the path is empty if the digest is that of the version's manifest.

    Attributes:
        tensor: Name of the tensor in that file that has the digest; empty if the whole file has it.
    """

    row: VersionRow
    path: str
    digest: Digest
    tensor: str = ""


# ---- by words and facts


@of_one_snapshot
def search(index: Index, query: Query, *, facets: bool = False) -> SearchResult:
    """Return the versions that match, best first; with `facets`, also count the facets of the matches that were counted."""
    # Without conditions, the stored counts answer everything.
    if query == Query(limit=query.limit, without=query.without):
        return _newest(index, query, facets=facets)
    visible, words = visible_condition(index, query.without), phrases(query.words)
    if words and few_candidates(index, [(_WITH_WORDS, (words,))], visible):
        return _ranked_matches(index, query, facets=facets)
    limit = _limit(query)
    most = max(COMMON, 2 * limit) + 1
    matches = _latest_matches(index, query, words, most)
    hits = _hits_of(matches, query)
    if len(matches) >= most and len(hits) < limit:  # of few names that were pushed often
        most = 2**62
        matches = _latest_matches(index, query, words, most)
        hits = _hits_of(matches, query)
    result = SearchResult(rows_by_id(index, [hit.id for hit in hits[:limit]]), len(hits), has_more=len(matches) >= most)
    return replace(result, facets=_count(index, _IDS, (json.dumps([hit.id for hit in hits]),))) if facets else result


def _ranked_matches(index: Index, query: Query, *, facets: bool) -> SearchResult:
    """Return the versions with words that few versions have."""
    matching, values = _matching(index, query)
    best = f"WITH {matching} SELECT id, count(*) OVER () FROM hit ORDER BY score, time DESC, name, number DESC LIMIT ?"
    matches = index.select(best, *values, _limit(query))
    result = SearchResult(rows_by_id(index, [version for version, _ in matches]), matches[0][1] if matches else 0)
    return replace(result, facets=_count(index, matching, values)) if facets else result


def _limit(query: Query) -> int:
    # SQLite's integers have 64 bits.
    return max(0, min(query.limit, 2**60))


def _newest(index: Index, query: Query, *, facets: bool) -> SearchResult:
    """Return the newest version of every name, latest first; at most COMMON are counted if some names are left out."""
    condition, limit = f"{NEWEST} AND {visible_condition(index, query.without)}", _limit(query)
    sql = f"SELECT id FROM versions v WHERE {condition} ORDER BY time DESC, name LIMIT ?"
    most = max(limit, COMMON) + 1 if query.without else limit
    ids = [version for (version,) in index.select(sql, most, kinds="i")]
    rows = rows_by_id(index, ids[:limit])
    if not query.without:
        return SearchResult(rows, _names(index), _stored_facet_counts(index) if facets else {})
    counts = _count(index, _IDS, (json.dumps(ids),)) if facets else {}
    return SearchResult(rows, len(ids), counts, has_more=len(ids) >= most)


def _names(index: Index) -> int:
    """Return the number of names that have versions."""
    counts = index.select("SELECT n FROM facet_counts WHERE kind = '' AND value = ''", kinds="i")
    return counts[0][0] if counts else 0


@dataclass(frozen=True, slots=True)
class _Match:
    """A version that matches, and whether the words are in its name or title."""

    id: int
    name: str
    time: str
    is_named: bool = False


def _latest_matches(index: Index, query: Query, words: str, most: int) -> list[_Match]:
    """Return the `most` matches that were pushed last, and as many of those with the words in their name or title.

    The versions are read from the newest on until there are enough, or those that meet the rarest condition are looked up.
    """
    conditions, values = _conditions(index, query)
    candidates = few_candidates(index, _statements(query), visible_condition(index, query.without))
    source, order = "versions v", "v.id"
    with_words = "1"
    if candidates:
        source = f"({candidates[0]}) c CROSS JOIN versions v ON v.id = c.id"
        with_words = words_condition(query.words) if words else "1"
    elif words:
        source, order = "texts_fts CROSS JOIN versions v ON v.id = texts_fts.rowid", "texts_fts.rowid"
        with_words = "texts_fts MATCH ?"
    where = " AND ".join([with_words, *conditions])
    sql = f"SELECT v.id, v.name, v.time FROM {source} WHERE {where} ORDER BY {order} DESC LIMIT ?"
    before = candidates[1] if candidates else ()
    matches = index.select(sql, *before, *([words] if words else []), *values, most, kinds="iss")
    if not words:
        return [_Match(*match) for match in matches]
    named = index.select(sql, *before, f"{{name title}}: ({words})", *values, most, kinds="iss")
    named_ids = {version for version, _, _ in named}
    return [_Match(version, name, time, version in named_ids) for version, name, time in {*matches, *named}]


def _hits_of(matches: Sequence[_Match], query: Query) -> list[_Match]:
    """Return the matches in their order, the newest of each name unless all versions were asked for."""
    latest = sorted(matches, key=lambda match: -match.id)
    if not query.all_versions:
        newest_by_name = dict[str, _Match]()
        for match in latest:
            newest_by_name.setdefault(match.name, match)
        latest = [*newest_by_name.values()]
    if query.words.strip():
        return sorted(latest, key=lambda match: not match.is_named)
    by_name = sorted(latest, key=lambda match: match.name)
    return sorted(by_name, key=lambda match: match.time, reverse=True)


def few_candidates(index: Index, statements: Iterable[Statement], visible: str) -> Statement | None:
    """Return the first statement for ids of versions that has at most COMMON visible ones; None if all have more.

    Hidden names are left out first: how a page is found may not depend on them.
    """
    for sql, values in statements:
        few = f"SELECT 1 FROM ({sql}) c CROSS JOIN versions v ON v.id = c.id WHERE {visible} LIMIT {COMMON + 1}"
        ((count,),) = index.select(f"SELECT count(*) FROM ({few})", *values, kinds="i")
        if count <= COMMON:
            return sql, values
    return None


def _matching(index: Index, query: Query) -> tuple[str, list[object]]:
    """Return the tables of a statement of which `hit` has the matches of words, with scores: id, name, number, time, score."""
    conditions, values = _conditions(index, query)
    score = f"bm25(texts_fts, {', '.join(map(str, _WEIGHTS))})"
    where = " AND ".join(["texts_fts MATCH ?", *conditions])
    source = "texts_fts CROSS JOIN versions v ON v.id = texts_fts.rowid"
    sql = f"SELECT v.id, v.name, v.number, v.time, {score} AS score FROM {source} WHERE {where}"
    values = [phrases(query.words), *values]
    if query.all_versions:
        return f"hit AS MATERIALIZED ({sql})", values
    # The bare columns are those of the row with the greatest number (sqlite.org/lang_select.html, "Bare columns").
    newest = "SELECT id, name, max(number) AS number, time, score FROM every GROUP BY name"
    return f"every AS MATERIALIZED ({sql}), hit AS MATERIALIZED ({newest})", values


def phrases(words: str) -> str:
    """Quote words for FTS5: each becomes a prefix, and all of them must match."""
    # Replace NUL, which would end the statement, and halves of surrogate pairs, which cannot be encoded.
    clean = words.replace("\0", " ").encode(errors="replace").decode()
    return " ".join('"' + word.replace('"', '""') + '"*' for word in dict.fromkeys(clean.split()))


def words_condition(words: str) -> str:
    """Return the condition that a version `v`, one of few, has words, which take the place of its `?` as phrases.

    The index lists the texts with each beginning of one or two letters, so that a text is looked up there. Those with a longer
    one are merged from all the words that begin so, which is done once.
    """
    if all(len(word) <= _MAX_INDEXED for word in words.split()):
        return "EXISTS (SELECT 1 FROM texts_fts WHERE texts_fts MATCH ? AND rowid = v.id)"
    return "v.id IN (SELECT rowid FROM texts_fts WHERE texts_fts MATCH ?)"


def _statements(query: Query) -> Iterator[Statement]:
    """Yield statements for the ids of the versions that meet each condition which an index leads to, but the words."""
    for kind, value in query.facets:
        yield f"SELECT version AS id FROM facets WHERE {_HAS_FACET}", (_facet_kind(kind, value), storable(value))
    for tag in map(storable, query.tags):
        of_tag = "SELECT v.id FROM tags t JOIN versions v ON v.name = t.name AND v.number = t.number WHERE t.tag = ?"
        yield f"{of_tag} UNION SELECT version AS id FROM facets WHERE {_HAS_FACET}", (tag, "tag", tag)
    if query.namespace:
        yield f"SELECT id FROM versions v WHERE {IN_NAMESPACE}", (storable(query.namespace),) * 2
    for name, bounds in query.metrics:
        condition, limits = bounds_condition("value", bounds)
        names = storable(name), storable(f"{REPORTED}_{name}")
        yield f"SELECT DISTINCT version AS id FROM metrics WHERE name IN (?, ?) AND {condition}", (*names, *limits)


def _conditions(index: Index, query: Query) -> tuple[list[str], list[object]]:
    """Return the conditions but the words, each to be looked up for a version `v`, with their values."""
    sql: list[str] = []
    values: list[object] = []

    def add(condition: str, *parameters: object) -> None:
        sql.append(condition)
        values.extend(storable(value) if isinstance(value, str) else value for value in parameters)

    has_facet = f"EXISTS (SELECT 1 FROM facets f WHERE f.version = v.id AND {_HAS_FACET})"
    for kind, value in query.facets:
        add(has_facet, _facet_kind(kind, value), value)
    for tag in query.tags:
        tag_query = "EXISTS (SELECT 1 FROM tags t WHERE t.name = v.name AND t.number = v.number AND t.tag = ?)"
        add(f"({tag_query} OR {has_facet})", tag, "tag", tag)
    if query.namespace:
        add(IN_NAMESPACE, query.namespace, query.namespace)
    for column, bounds in query.bounds:
        condition, limits = bounds_condition(f"v.{require_allowed(column, COLUMNS)}", bounds)
        add(condition, *limits)
    if query.without:
        add(visible_condition(index, query.without))
    for name, bounds in query.metrics:
        condition, limits = bounds_condition("m.value", bounds)
        metric_query = f"SELECT 1 FROM metrics m WHERE m.version = v.id AND m.name IN (?, ?) AND {condition}"
        add(f"EXISTS ({metric_query})", name, f"{REPORTED}_{name}", *limits)
    return sql, values


def _facet_kind(kind: str, value: str) -> str:
    return "base-name" if kind == "base" and "/" not in value else kind


def storable(text: str) -> str:
    """Return text as the index has it: halves of surrogate pairs cannot be encoded."""
    return text.encode(errors="replace").decode()


def bounds_condition(column: str, bounds: Bounds) -> tuple[str, list[float]]:
    """Return the condition that a column passes all bounds, and its values."""
    tests = ["1", *(f"{column} {require_allowed(bound.operator, _OPERATORS)} ?" for bound in bounds)]
    return " AND ".join(tests), [bound.value for bound in bounds]


def require_allowed(text: str, allowed: set[str]) -> str:
    """Return a text that goes into a statement. ValueError if it is not one of `allowed`."""
    if text not in allowed:
        raise ValueError(text)
    return text


def _count(index: Index, matching: str, values: Sequence[object]) -> dict[str, dict[str, int]]:
    """Count the facets of the matches in the table `hit`, which the tables `matching` make: kind to value to their number."""
    counts = (
        f"WITH {matching} SELECT kind, value, count(*) AS n FROM hit CROSS JOIN facets ON version = id GROUP BY kind, value"
        " UNION ALL SELECT 'r', CAST(r AS TEXT), count(*) FROM hit JOIN versions USING (id) WHERE r IS NOT NULL GROUP BY r"
        " ORDER BY n DESC, value"
    )
    return _group_by_kind(index.select(counts, *values, kinds="ssi"))


def _stored_facet_counts(index: Index) -> dict[str, dict[str, int]]:
    """Return the facet counts for the newest version of every name, from the counts that are kept up to date."""
    sql = "SELECT kind, value, n FROM facet_counts WHERE n > 0 ORDER BY n DESC, value"
    return _group_by_kind(index.select(sql, kinds="ssi"))


def _group_by_kind(counts: Sequence[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    count_by_kind: dict[str, dict[str, int]] = {kind: {} for kind in FACETS}
    for kind, value, count in counts:
        if kind in count_by_kind and len(count_by_kind[kind]) < MAX_VALUES:
            count_by_kind[kind][value] = count
    return count_by_kind


# ---- by bytes


@of_one_snapshot
def holders(index: Index, digest: str) -> list[Holder]:
    """Return the versions with a file or a manifest whose digest begins with `digest`, by name, newest first."""
    end = digest + "g"  # after every digest with this prefix
    results = [Holder(row, "", row.digest) for row in select(index, "digest >= ? AND digest < ?", digest, end)]
    files = index.select("SELECT version, path, digest FROM files WHERE digest >= ? AND digest < ?", digest, end, kinds="iss")
    rows = rows_by_id(index, [version for version, _, _ in files])
    results += [Holder(row, path, file_digest) for row, (_, path, file_digest) in zip(rows, files, strict=True)]
    return sorted(results, key=lambda holder: (holder.row.name, -holder.row.number, holder.path))


def parse_digest_prefix(text: str) -> str:
    """Parse the first 6 to 64 digits of a digest, with or without `sha256:`; UsageError for anything else."""
    digits = text.strip().lower().removeprefix("sha256:")
    if not 6 <= len(digits) <= 64 or not is_hex(digits, len(digits)):
        raise UsageError(text[:80], "is not a sha256", "Write 6 to 64 hexadecimal digits")
    return f"sha256:{digits}"


# ---- parsing


def parse_bounds(text: str, location: str, *, size: bool = False) -> Bounds:
    """Parse `8`, `4..16`, `<10` or `>=0.5`. With `size`, units are allowed (`10MB`), and an exact size is refused."""
    expression = text.strip()
    low, dots, high = expression.partition("..")
    if dots and (low or high):
        pairs = [(">=", low), ("<=", high)]
        return tuple(Bound(operator, _number(end, location, size=size)) for operator, end in pairs if end)
    # Longer operators first: `<` also begins `<=`.
    operator = next((sign for sign in ("<=", ">=", "==", "<", ">", "=") if expression.startswith(sign)), "")
    if size and not operator:
        raise UsageError(
            location, f"{text[:80]!r} is an exact size", f"Write '<{text[:80]}', '>{text[:80]}' or 1MB..{text[:80]}"
        )
    return (Bound({"==": "=", "": "="}.get(operator, operator), _number(expression[len(operator) :], location, size=size)),)


def parse_metric(text: str, location: str) -> tuple[str, Bounds]:
    """Parse a comparison such as `eval_loss<0.7` into the name of a metric and its bounds."""
    expression = text.strip()
    start = min((position for sign in "<>=" if (position := expression.find(sign)) >= 0), default=0)
    if not expression[:start].strip():
        raise UsageError(location, f"{text[:80]!r} is not a comparison", "Write it like 'accuracy>0.8'")
    return expression[:start].rstrip(), parse_bounds(expression[start:], location)


def _number(text: str, location: str, *, size: bool) -> float:
    match = _QUANTITY.fullmatch(text.strip().lower())
    if not match or match[2] not in (_UNITS if size else {""}):
        raise UsageError(
            location, f"{text[:80]!r} is not a {'size' if size else 'number'}", "Write it like 10MB" if size else ""
        )
    return float(match[1]) * _UNITS[match[2]]
