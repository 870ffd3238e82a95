"""Lists by downloads and stars: each name once, in the order of the counts, and no hidden name in a cursor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import popularity, ranked_listing, stars
from adapterhub.hub.accounts import accounts
from adapterhub.hub.hf import likes
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.popularity import Ranking, Rankings
from adapterhub.index import index_database, schema
from adapterhub.index.index_database import Index
from adapterhub.index.version_listing import Conditions, Position
from adapterhub.ref import Ref
from adapterhub_converters.errors import RefusedError, UsageError
from tests.hub.conftest import Running, client
from tests.hub.web.conftest import Visitor, database, hide, person, push, visitor
from tests.support.hub_tenants import Tenant
from tests.support.many_names import add_names

__all__ = ["database", "push", "visitor"]


@pytest.fixture(scope="module")
def index() -> Iterator[Index]:
    connection = index_database.connect_memory()
    schema.create(connection)
    add_names(connection, 100)
    with closing(Index(Path("memory"), connection)) as index:
        yield index


def listed(
    index: Index, ranking: Ranking, conditions: Conditions, limit: int, *, ascending: bool
) -> tuple[list[str], list[str]]:
    """The names of all pages, and those of the cursors."""
    names, cursors, after = list[str](), list[str](), None
    while True:
        page = ranked_listing.ranked_page(index, ranking, conditions, after=after, limit=limit, ascending=ascending)
        assert len(page.rows) <= limit
        names += [row.name for row in page.rows]
        if page.end is None:
            return names, cursors
        after = Position.parse(str(page.end))
        cursors.append(after.name)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize(("limit", "scanned"), [(7, 500), (10, 500), (7, 4), (1000, 500)])
def test_pages_are_the_parts_of_one_ranking(
    index: Index, monkeypatch: pytest.MonkeyPatch, limit: int, scanned: int, ascending: bool
) -> None:
    monkeypatch.setattr(ranked_listing, "_SCANNED", scanned)
    rows = index.connection.execute("SELECT time, name FROM versions ORDER BY time DESC, name DESC").fetchall()
    everybody = [name for _, name in rows]
    counts = {name: 1 + number % 3 for number, name in enumerate(everybody[::5])}
    ranking = Ranking(tuple(sorted((count, name) for name, count in [*counts.items(), ("gone/name", 9)])))
    order = {name: place for place, name in enumerate(everybody)}
    expected = sorted(counts, key=lambda name: (counts[name], name), reverse=True)
    expected += sorted(set(everybody) - set(counts), key=lambda name: order[name])
    hidden = frozenset(everybody[:50])
    for conditions in (Conditions(), Conditions(without=hidden), Conditions(among=tuple(everybody[10:60]))):
        names, cursors = listed(index, ranking, conditions, limit, ascending=ascending)
        expected_names = [
            name
            for name in expected
            if name not in conditions.without and (conditions.among is None or name in conditions.among)
        ]
        assert names == (expected_names[::-1] if ascending else expected_names)
        assert not {*cursors} & {*conditions.without}


@pytest.mark.parametrize("cursor", ["#", "#x team/sql", "#-1 team/sql", "#1 team", "#" + "9" * 30 + " team/sql", "#² team/sql"])
def test_hostile_cursors_are_refused(index: Index, cursor: str) -> None:
    with pytest.raises(UsageError, match="cursor"):
        ranked_listing.ranked_page(index, Ranking(), Conditions(), after=Position.parse(cursor), limit=1)


def test_a_star_is_given_once_and_bounded(database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stars, "MAX_STARS", 2)
    accounts.add(database, "ada")
    for name in ("team/a", "team/a", "team/b"):
        stars.give(database, name, "ada")
    assert stars.counts(database, ["team/a", "team/b", "team/c"]) == {"team/a": 1, "team/b": 1}
    with pytest.raises(RefusedError, match="has given 2 stars"):
        stars.give(database, "team/c", "ada")
    assert Rankings(database).get(popularity.LIKES).places == ((1, "team/a"), (1, "team/b"))
    stars.rename(database, "team/a", "team/b")
    accounts.remove(database, "ada")
    assert stars.counts(database, ["team/b"]) == {}


@pytest.fixture
def team(hub: Running, adapter: Callable[..., Path]) -> Running:
    """A hub with three adapters, of which the first one has the newest version, and a private one."""
    with hub.registry() as registry:
        for seed, name in enumerate(("one", "two", "three", "one")):
            registry.push(adapter(seed), Ref(f"team/{name}"))
        registry.push(adapter(9), Ref("secret/plans"))
    hide(hub, "secret/plans")
    return hub


def test_huggingface_hub_sorts_and_gives_stars(team: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(popularity, "_TTL", 0.0)
    monkeypatch.setattr(popularity, "_PAUSE", 0)
    api, ada = client(team, tmp_path), Tenant(team, "ada")
    api.token = ada.token
    for name in ("team/two", "team/three"):
        ada.post(f"/api/models/{name}/like").raise_for_status()
    Tenant(team, "bob").post("/api/models/team/three/like").raise_for_status()
    assert ada.post("/api/models/secret/plans/like").status_code == 404
    assert ada.post("/api/models/team/two/like", headers={"authorization": ""}).status_code == 401

    def sorted_by(order: str) -> list[str]:
        return [model.id.partition("/")[2] for model in api.list_models(sort=order)]

    assert [model.likes for model in api.list_models(sort="likes")] == [2, 1, 0]
    assert sorted_by("likes") == ["three", "two", "one"]
    api.hf_hub_download("team/two", "adapter_model.safetensors", cache_dir=tmp_path)
    team_database = HubDatabase(team.folder)
    with closing(team_database):
        team_database.execute("INSERT INTO downloads VALUES ('team/one', 1, '9999-01-01', 'hf', 5)")
    assert sorted_by("downloads")[0] == "one"
    assert {*sorted_by("created_at")} == {*sorted_by("last_modified")} == {"one", "two", "three"}
    created = [model.created_at for model in api.list_models(sort="created_at", expand=["createdAt"])]
    assert created == sorted(created, reverse=True)
    liked = api.list_liked_repos("ada")
    assert (liked.total, liked.models) == (2, ["team/three", "team/two"])
    with closing(HubDatabase(team.folder)) as opened:
        opened.execute("UPDATE accounts SET full_name = 'Ada Lovelace' WHERE name = 'ada'")
    for name in ("team/three", "team/three.v1"):
        likers = [(user.username, user.fullname) for user in api.list_repo_likers(name)]
        assert likers == [("ada", "Ada Lovelace"), ("bob", "bob")]
    hide(team, "team/two")
    assert api.list_liked_repos("ada", token=Tenant(team, "eve").token).models == ["team/three"]
    api.unlike("team/three", token=ada.token)
    assert api.model_info("team/three").likes == 1


def test_people_give_stars_on_the_page(visitor: Visitor, database: HubDatabase, push: Callable[..., str]) -> None:
    push("team/sql")
    ada = person(visitor, database, "ada")
    url, csrf = "/-/adapters/team/sql/star", ada.csrf("/team/sql")
    assert "Give it yours" not in visitor.get("/team/sql").text
    assert ada.post(url, {"csrf": "x"}).status == 403
    for fields, count, words in (
        ({}, 1, "Take yours away"),
        ({}, 1, "Take yours away"),
        ({"away": "true"}, 0, "Give it yours"),
    ):
        assert ada.post(url, {"csrf": csrf, **fields}).headers["location"] == "/team/sql"
        assert stars.counts(database, ["team/sql"]).get("team/sql", 0) == count
        assert words in ada.get("/team/sql").text


def test_every_order_of_the_document_is_answered(team: Running) -> None:
    from adapterhub.hub.hf.model_filters import ORDERS

    ada = Tenant(team, "ada")

    def names(query: str) -> Any:
        answer = ada.get(f"/api/models?{query}")
        return [model["id"] for model in answer.json()]

    for order in ORDERS:
        assert names(f"sort={order}&direction=1") == names(f"sort={order}&direction=-1")[::-1]
        first = ada.get(f"/api/models?sort={order}&limit=1")
        assert "secret" not in first.headers["link"]
    assert ada.get("/api/models?sort=trendingScore").status_code == 400


def test_the_pages_of_the_stars_of_an_account_tell_no_hidden_name(team: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ada, eve = Tenant(team, "ada"), Tenant(team, "eve")
    for name in ("team/one", "team/three", "team/two"):
        ada.post(f"/api/models/{name}/like").raise_for_status()
    hide(team, "team/three")
    for page, pages in ((1, [["team/one"], ["team/two"]]), (2, [["team/one", "team/two"]])):
        monkeypatch.setattr(likes, "_PAGE", page)
        assert list(pages_of_stars(eve)) == pages


def pages_of_stars(tenant: Tenant) -> Iterator[list[str]]:
    """The names on each page of the stars of ada; no address of a page has a hidden one."""
    url = "/api/users/ada/likes"
    while url:
        answer = tenant.get(url)
        yield [entry["repo"]["name"] for entry in answer.json()]
        url = answer.links.get("next", {}).get("url", "").removeprefix(tenant.hub.url)
        assert "three" not in url
