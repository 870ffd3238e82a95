"""Finding adapters: any text is a query, the index is what a rebuild makes it, and filters mean what they say."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub.digest import sha256_file
from adapterhub.index import queries, version_search
from adapterhub.index.index_database import VERSION
from adapterhub.index.version_search import Query
from adapterhub.maintenance.fsck import fsck
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import AdapterhubError, ConflictError, NotFoundError, RefusedError, UsageError
from adapterhub_converters.formats import peft
from tests.manifest.test_card import SQL_CARD
from tests.support.adapters import write_adapter
from tests.support.aged import age

Make = Callable[..., Path]


def adapter(path: Path, seed: int, toml: str, text: str = "# A card\n", **config: object) -> Path:
    write_adapter(path, seed, **config)
    (path / "adapter.toml").write_text(toml)
    (path / "README.md").write_text(text)
    return path


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """team/sql in two versions, of which the older is tagged prod; other/poems."""
    root = tmp_path_factory.mktemp("search")
    metrics = "[training.metrics]\neval_loss = {}\n"
    sql, better, poems = root / "sql", root / "better", root / "poems"
    with Registry.init(root / "registry") as registry:
        registry.push(adapter(sql, 1, metrics.format(0.5), SQL_CARD), Ref.parse("team/sql:prod"))
        registry.push(adapter(better, 2, 'name = "Quarry"\n' + metrics.format(0.7), SQL_CARD), Ref.parse("team/sql"))
        poems_toml = 'description = "Writes sonnets, not sql."\nlicense = "Apache-2.0"\n'
        registry.push(adapter(poems, 3, poems_toml, base_model_name_or_path="big/llama-7b"), Ref.parse("other/poems"))
        yield registry


def refs_of(registry: Registry, words: str = "", **query: Any) -> list[str]:
    return [str(row.ref) for row in version_search.search(registry.index, Query(words, **query)).rows]


# ---- words


@pytest.mark.parametrize(
    ("words", "refs"),
    [
        ("sql", ["team/sql:v2", "other/poems:v1"]),  # a hit in the name is worth more than one in the description
        ("SQL ta", ["team/sql:v2"]),
        ("sonn", ["other/poems:v1"]),
        ("quarr", ["team/sql:v2"]),
        ("cafe", ["team/sql:v2"]),
        ("llama-7b", ["other/poems:v1"]),
        ("big/llama", ["other/poems:v1"]),
        ("q_proj poems", ["other/poems:v1"]),
        ("apache", ["other/poems:v1"]),
        ("text2sql de", ["team/sql:v2"]),
        ("prod", ["team/sql:v1"]),
        ('c++ "quoted"', ["team/sql:v2"]),
        ("sql nowhere", []),
        ("!!!", []),
        ("sonnets NOT sql", ["other/poems:v1"]),  # NOT is a word
    ],
)
def test_words_find_what_they_are_in(filled: Registry, words: str, refs: list[str]) -> None:
    assert refs_of(filled, words) == refs


def test_without_words_the_newest_of_each_name_is_listed(filled: Registry) -> None:
    assert sorted(refs_of(filled)) == ["other/poems:v1", "team/sql:v2"]
    assert sorted(refs_of(filled, all_versions=True)) == ["other/poems:v1", "team/sql:v1", "team/sql:v2"]
    short = version_search.search(filled.index, Query(limit=1))
    assert (len(short.rows), short.total) == (1, 2)


ODD = ['"', "'", "a AND", "NEAR(a b, 2)", "^a", "{name}: a", "name : a", "a*", "-a", "a + b", "(", "\0", "\ud800", "a" * 10_000]


@given(words=st.one_of(st.text(st.characters()), st.sampled_from(ODD), st.text("\"'*()^:{}+-AND ORT\0", max_size=30)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
def test_any_text_is_a_valid_query(filled: Registry, words: str) -> None:
    result = version_search.search(filled.index, Query(words, facets=(("target", words),), tags=(words,)), facets=True)
    assert result.total == len(result.rows)
    version_search.search(filled.index, Query(words), facets=True)


def test_very_many_words_are_a_valid_query(filled: Registry) -> None:
    assert refs_of(filled, " ".join(f"w{n}" for n in range(3000))) == []


# ---- facts


@pytest.mark.parametrize(
    ("query", "refs"),
    [
        ({"facets": [("base", "org/base")]}, ["team/sql:v2"]),
        ({"facets": [("base", "LLAMA-7B")]}, ["other/poems:v1"]),
        ({"facets": [("base", "other/unread")]}, []),  # adapter.json knows better than the card
        ({"facets": [("license", "apache-2.0")]}, ["other/poems:v1"]),
        ({"facets": [("license", "MIT")]}, ["team/sql:v2"]),
        ({"facets": [("target", "q_proj"), ("target", "v_proj"), ("language", "de")]}, ["team/sql:v2"]),
        ({"facets": [("target", "k_proj")]}, []),
        ({"facets": [("method", "dora")]}, []),
        ({"tags": ["prod"]}, ["team/sql:v1"]),
        ({"tags": ["text2sql"]}, ["team/sql:v2"]),
        ({"metrics": [("eval_loss", "<0.6")]}, ["team/sql:v1"]),
        ({"metrics": [("eval_loss", "0.6..0.8")]}, ["team/sql:v2"]),
        ({"metrics": [("accuracy", ">0")]}, []),
        ({"bounds": [("r", "2")], "words": "poems"}, ["other/poems:v1"]),
        ({"bounds": [("r", "3..")]}, []),
        ({"bounds": [("size", "<1kB")]}, []),
        ({"namespace": "other"}, ["other/poems:v1"]),
        ({"namespace": "oth"}, []),
        ({"namespace": "team", "words": "poems"}, []),
    ],
)
def test_filters(filled: Registry, query: dict[str, Any], refs: list[str]) -> None:
    for key in ("metrics", "bounds"):
        query[key] = [(name, version_search.parse_bounds(text, "", size=name == "size")) for name, text in query.get(key, ())]
    assert refs_of(filled, **query) == refs


def test_facets_count_all_that_match(filled: Registry) -> None:
    counts = version_search.search(filled.index, Query(limit=0), facets=True).facets
    assert counts["base"] == {"big/llama-7b": 1, "org/base": 1}
    assert counts["target"] == {"q_proj": 2, "v_proj": 2}
    assert counts["r"] == {"2": 2}
    assert counts["language"] == {"de": 1, "en": 1}
    assert tuple(counts) == version_search.FACETS


@pytest.mark.parametrize(
    ("text", "size", "bounds"),
    [
        ("8", False, [("=", 8.0)]),
        ("4..16", False, [(">=", 4.0), ("<=", 16.0)]),
        ("..16", False, [("<=", 16.0)]),
        ("< 0.5", False, [("<", 0.5)]),
        ("==-1e-3", False, [("=", -0.001)]),
        ("<10MB", True, [("<", 1e7)]),
        ("1 KiB..2g", True, [(">=", 1024.0), ("<=", 2e9)]),
    ],
)
def test_bounds_as_they_are_typed(text: str, size: bool, bounds: list[tuple[str, float]]) -> None:
    assert [(bound.operator, bound.value) for bound in version_search.parse_bounds(text, "", size=size)] == bounds


@pytest.mark.parametrize(
    ("text", "size"), [("", False), ("..", False), ("x", False), ("<", False), ("nan", False), ("8", True)]
)
def test_meaningless_bounds_are_refused(text: str, size: bool) -> None:
    with pytest.raises(UsageError):
        version_search.parse_bounds(text, "--rank", size=size)


@given(st.text())
def test_any_text_is_bounds_or_a_usage_error(text: str) -> None:
    for call in (version_search.parse_bounds, version_search.parse_metric):
        with contextlib.suppress(UsageError):
            call(text, "there")


# ---- bytes


def test_the_holder_of_a_file_is_found_by_its_digest(filled: Registry) -> None:
    sql = filled.root.parent / "sql"
    digest = sha256_file(sql / peft.WEIGHTS)
    assert [(str(holder.row.ref), holder.path) for holder in version_search.holders(filled.index, digest)] == [
        ("team/sql:v1", peft.WEIGHTS)
    ]
    assert version_search.holders(filled.index, digest[:20]) == version_search.holders(filled.index, digest)
    config = version_search.holders(filled.index, sha256_file(sql / peft.CONFIG))
    assert [str(holder.row.ref) for holder in config] == ["team/sql:v2", "team/sql:v1"]
    whole = version_search.holders(filled.index, oci_manifest.build(sql).digest)
    assert [(str(holder.row.ref), holder.path) for holder in whole] == [("team/sql:v1", "")]
    assert version_search.holders(filled.index, "sha256:" + "0" * 64) == []


# ---- the index


def index_rows(registry: Registry) -> dict[str, list[Any]]:
    """All that the index says, in terms that a rebuild doesn't change."""
    select = registry.index.select
    named = {version: (name, number) for version, name, number in select("SELECT id, name, number FROM versions")}
    result: dict[str, list[Any]] = {"rows": registry.list(), "names": queries.names(registry.index)}
    result["tags"] = select("SELECT * FROM tags ORDER BY name, tag")
    for table in ("facets", "metrics", "files"):
        columns = [name for _, name, *_ in select(f"PRAGMA table_info({table})") if name != "version"]
        rows = select(f"SELECT version, {', '.join(columns)} FROM {table}")
        result[table] = sorted((named[version], *columns) for version, *columns in rows)
    result["tensors"] = select("SELECT digest, key, size FROM weights JOIN tensors ON file = id ORDER BY digest, key")
    result["facet_counts"] = select("SELECT kind, lower(value), n FROM facet_counts WHERE n > 0 ORDER BY kind, lower(value)")
    result["weights"] = select("SELECT digest FROM weights ORDER BY digest")
    result["texts"] = sorted((named[version], *columns) for version, *columns in select("SELECT * FROM texts"))
    for check in ("texts_fts) VALUES ('integrity-check')", "texts_fts, rank) VALUES ('integrity-check', 1)"):
        registry.index.select(f"INSERT INTO texts_fts ({check}")
    return result


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 2), st.integers(0, 3), st.sampled_from(["", ":prod", ":blessed"])),
        st.tuples(st.just("tag"), st.integers(0, 2), st.integers(1, 3), st.sampled_from(["prod", "blessed"])),
        st.tuples(st.just("rm"), st.integers(0, 2), st.just(0), st.sampled_from(["", ":prod"])),
        st.tuples(st.just("restore"), st.integers(0, 2), st.just(0), st.just("")),
    ),
    max_size=8,
)


@given(moves=MOVES)
@settings(max_examples=25)
def test_the_index_that_was_kept_is_the_one_that_is_rebuilt(moves: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("moves")
    folders = [adapter(root / str(n), n, f"[training.metrics]\nloss = {n}\n", SQL_CARD) for n in range(4)]
    with Registry.init(root / "registry") as registry:
        for op, name, number, tag in moves:
            ref = f"team/n{name}"
            try:
                if op == "push":
                    registry.push(folders[number], Ref.parse(ref + tag))
                elif op == "restore":
                    registry.restore(ref)
                elif op == "tag":
                    registry.tag(Ref.parse(f"{ref}:v{number}"), tag)
                else:
                    registry.rm(Ref.parse(ref + tag))
            except (NotFoundError, ConflictError, RefusedError):
                pass
        index_before = index_rows(registry)
        registry.rebuild_index()
        assert index_rows(registry) == index_before
        assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


@pytest.mark.parametrize("version", range(1, VERSION))
def test_an_older_database_is_rebuilt_on_the_way(make: Make, tmp_path: Path, version: int) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(make(), Ref.parse("team/sql:prod"))
        before = index_rows(registry)
    age(tmp_path / "registry" / "registry.db", version)
    with sqlite3.connect(tmp_path / "registry" / "registry.db", isolation_level=None) as db:
        db.execute("INSERT INTO names VALUES ('team/stale', 1, '', 1, 0)")
    db.close()
    with Registry.open(tmp_path / "registry") as registry:
        assert index_rows(registry) == before
        names = [name for (name,) in registry.index.select("SELECT name FROM _sqlite_migrations ORDER BY id")]
        assert len(names) == len(set(names)) == VERSION == registry.index.version


# ---- cards


def test_a_newer_catalog_is_not_touched(filled: Registry, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "r") as registry:
        registry.index.select(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(AdapterhubError, match="Upgrade adapterhub"):
        Registry.open(tmp_path / "r")


# ---- words that very many have


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """Twelve versions of six names that all have `lora`; more than eight have what is common here."""
    monkeypatch.setattr(version_search, "COMMON", 8)
    with Registry.init(tmp_path / "registry") as registry:
        for n in range(12):
            title = "# About lora\n" if n in (0, 1, 7) else "# A card\n\nlora\n"
            registry.push(adapter(tmp_path / str(n), n, f'description = "rare{n} lora"\n', title), Ref.parse(f"team/n{n % 6}"))
        yield registry


def test_of_common_words_titles_come_first_and_then_the_latest(crowded: Registry) -> None:
    """v2 of n0 has another title than v1, and v2 is what there is of n0."""
    assert refs_of(crowded, "lora", limit=4) == ["team/n1:v2", "team/n5:v2", "team/n4:v2", "team/n3:v2"]
    assert refs_of(crowded, "lora", limit=4, all_versions=True) == ["team/n1:v2", "team/n1:v1", "team/n0:v1", "team/n5:v2"]
    result = version_search.search(crowded.index, Query("lora", limit=4))
    assert (result.total, result.has_more) == (6, True)
    counted = version_search.search(crowded.index, Query("lora", limit=4), facets=True)
    assert (counted.total, counted.has_more, counted.facets["r"]) == (6, True, {"2": 6})


def test_nothing_is_left_out_where_more_was_asked_for(crowded: Registry) -> None:
    for limit in (7, 20):
        result = version_search.search(crowded.index, Query("lora", limit=limit))
        assert (len(result.rows), result.total, result.has_more) == (6, 6, False)
    assert refs_of(crowded, "lora rare3") == ["team/n3:v1"]
    assert refs_of(crowded, "lora", bounds=(("r", version_search.parse_bounds("3", "")),)) == []


def test_the_counts_of_everything_are_those_of_a_query_that_all_match(crowded: Registry) -> None:
    crowded.rm(Ref.parse("team/n5"))
    everything_there = version_search.search(crowded.index, Query(), facets=True)
    counted = version_search.search(crowded.index, Query("lora"), facets=True)
    assert (everything_there.total, everything_there.facets) == (counted.total, counted.facets)
    assert {str(row.ref) for row in everything_there.rows} == {str(row.ref) for row in counted.rows}


@pytest.mark.parametrize("words", ["", "sql", "card"])
def test_names_that_are_left_out_are_in_no_count_either(filled: Registry, tmp_path: Path, words: str) -> None:
    poems_toml = 'description = "Writes sonnets, not sql."\nlicense = "Apache-2.0"\n'
    with Registry.init(tmp_path / "registry") as alone:
        poems_folder = adapter(tmp_path / "poems", 3, poems_toml, base_model_name_or_path="big/llama-7b")
        alone.push(poems_folder, Ref.parse("other/poems"))
        expected = version_search.search(alone.index, Query(words), facets=True)
    result = version_search.search(filled.index, Query(words, without=frozenset({"team/sql"})), facets=True)
    assert [row.name for row in result.rows] == [row.name for row in expected.rows]
    assert (result.total, result.facets) == (expected.total, expected.facets)


def test_of_common_words_too_names_are_left_out(crowded: Registry) -> None:
    all_names = [row.name for row in version_search.search(crowded.index, Query("lora", limit=3), facets=True).rows]
    result = version_search.search(crowded.index, Query("lora", limit=2, without=frozenset(all_names[:1])), facets=True)
    assert [row.name for row in result.rows] == all_names[1:3]


def test_without_words_no_more_than_the_common_number_is_counted_where_names_are_left_out(
    crowded: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many names are hidden is no part of what an answer costs."""
    query = Query(limit=2, without=frozenset({"team/n0"}))
    result = version_search.search(crowded.index, query, facets=True)
    assert (len(result.rows), result.total, result.has_more) == (2, 5, False)
    assert result.facets["method"] == {"lora": 5}
    monkeypatch.setattr(version_search, "COMMON", 3)
    result = version_search.search(crowded.index, query)
    assert (len(result.rows), result.total, result.has_more) == (2, 4, True)
