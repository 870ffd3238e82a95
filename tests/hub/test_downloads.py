"""Downloads are counted by version, day and protocol: what a client fetches, not what it looks at or has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from adapterhub.hub import downloads
from adapterhub.hub.downloads import Downloads
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from tests.conftest import Run
from tests.hub.conftest import Running
from tests.hub.web.conftest import hide

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
API = "/api/adapterhub/v1/names/team/sql/downloads"


@pytest.fixture(autouse=True)
def _nothing_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_TTL", 0.0)


@pytest.fixture
def team(hub: Running, adapter: Callable[..., Path]) -> Running:
    """A hub with two versions of an adapter."""
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        registry.push(adapter(2), Ref("team/sql"))
    return hub


def ask(hub: Running, path: str, method: str = "GET", **headers: str) -> Any:
    answer = requests.request(method, hub.url + path, headers=headers, timeout=20)
    answer.raise_for_status()
    return answer


def counts(hub: Running) -> list[tuple[int, str, int]]:
    return [(count["number"], count["protocol"], count["count"]) for count in ask(hub, API).json()["counts"]]


def test_a_download_of_the_weights_counts_for_its_version(team: Running) -> None:
    for path in (f"v1/{WEIGHTS}", f"main/{WEIGHTS}", f"main/{WEIGHTS}", f"main/{CONFIG}"):
        ask(team, f"/team/sql/resolve/{path}")
    ask(team, f"/team/sql/resolve/main/{WEIGHTS}", "HEAD")
    ask(team, f"/team/sql/resolve/main/{WEIGHTS}", Range="bytes=8-20")
    assert counts(team) == [(2, "hf", 2), (1, "hf", 1)]
    ask(team, f"/team/sql/resolve/main/{WEIGHTS}", Range="bytes=0-")
    ask(team, "/v2/team/sql/manifests/v1")
    ask(team, "/v2/team/sql/manifests/v1", "HEAD")
    assert counts(team) == [(2, "hf", 3), (1, "hf", 1), (1, "oci", 1)]
    document = ask(team, API).json()
    assert document["recent"] == 5
    assert document["counts"][0]["day"] == time.strftime("%Y-%m-%d", time.gmtime())


def test_the_api_of_the_hugging_face_hub_and_the_pages_have_the_sum(team: Running, hf: Any) -> None:
    assert hf.model_info("team/sql").downloads == 0
    ask(team, f"/team/sql/resolve/v1/{WEIGHTS}")
    ask(team, API)
    assert hf.model_info("team/sql").downloads == 1
    assert [model.downloads for model in hf.list_models(author="team")] == [1]
    assert "Downloads in 30 days" in ask(team, "/team/sql").text
    assert '<td class="num">1</td>' in ask(team, "/team/sql/versions").text


def test_a_client_of_lfs_and_our_own_command_line_count(team: Running, run: Run, tmp_path: Path) -> None:
    address = f"hub+{team.url}/team/sql@v1"
    run("pull", address, "-o", tmp_path / "pulled")
    assert sum(count for _, _, count in counts(team)) == 1
    with team.registry() as registry:
        raw = registry.store.read_document(registry.row(Ref("team/sql", number=2)).digest)
    layers = oci_manifest.parse(raw, "team/sql").layers
    weights = next(layer for layer in layers if layer.path == WEIGHTS)
    batch_request: dict[str, Any] = {
        "operation": "download",
        "objects": [{"oid": weights.digest.removeprefix("sha256:"), "size": weights.size}],
    }
    batch = requests.post(f"{team.url}/team/sql.git/info/lfs/objects/batch", json=batch_request, timeout=20).json()
    requests.get(batch["objects"][0]["actions"]["download"]["href"], timeout=20).raise_for_status()
    assert (2, "hf", 1) in counts(team)


def test_counts_follow_a_name_and_are_seen_by_its_readers_alone(team: Running, hf: Any) -> None:
    ask(team, f"/team/sql/resolve/v1/{WEIGHTS}")
    ask(team, API)
    hf.move_repo("team/sql", "team/new")
    assert ask(team, API.replace("sql", "new")).json()["recent"] == 1
    hide(team, "team/new")
    assert requests.get(team.url + API.replace("sql", "new"), timeout=20).status_code == 404


@pytest.fixture
def database(tmp_path: Path) -> Iterator[HubDatabase]:
    with closing(HubDatabase(tmp_path)) as tables:
        yield tables


def test_old_days_count_for_the_version_and_no_longer_as_recent(database: HubDatabase) -> None:
    sql = "INSERT INTO downloads (name, number, day, protocol, count) VALUES ('team/sql', 1, ?, 'hf', 2)"
    database.execute(sql, "2020-01-01")
    database.execute(sql, time.strftime("%Y-%m-%d", time.gmtime()))
    assert downloads.Downloads(database).recent(["team/sql", "team/none"]) == {"team/sql": 2, "team/none": 0}
    assert downloads.downloads_by_version(database, "team/sql") == {1: 4}


def test_of_years_before_the_last_the_sum_is_kept(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each version, day and protocol stayed for ever."""
    monkeypatch.setattr("adapterhub.hub.downloads.time.time", lambda: 1_800_000_000.0)  # 2027-01-15; 400 days before is in 2025
    with closing(HubDatabase(hub.folder)) as database:
        counted = Downloads(database)
        days = [f"{year}-{month:02}-09" for year in (2023, 2024, 2025, 2026) for month in range(1, 13)]
        rows = [("team/sql", number, day, protocol, 3) for number in (1, 2) for day in days for protocol in ("hf", "oci")]
        database.execute_many(downloads._ADD, rows)
        before = downloads.downloads_by_version(database, "team/sql")
        for _ in range(2):
            counted.compact()
        assert downloads.downloads_by_version(database, "team/sql") == before
        counts = downloads.download_counts(database, "team/sql", 1000)
        assert [(row.number, row.day, row.count) for row in counts[-8:]] == [
            (number, day, 36) for day in ("2024-01-01", "2023-01-01") for number in (2, 1) for _ in range(2)
        ]
        assert len(counts) == 8 + 2 * 2 * 24
