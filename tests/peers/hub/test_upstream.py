"""The models of the upstream at a hub of several processes: kept in its bucket, for all of them."""

from __future__ import annotations

import random
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.settings import ModelUpstream
from adapterhub.hub.upstream import fills, models, shared_files
from tests.hub.conftest import Running, client, serving
from tests.hub.sending import Answer, Sending
from tests.hub.upstream.conftest import anonymous
from tests.hub.upstream.faulty import NAME, PATH, Faulty, faulty_hub
from tests.support.object_stores import Server

pytestmark = pytest.mark.peer
DATA = random.Random(1).randbytes(2_000_000)
FILE = f"/{NAME}/resolve/main/{PATH}"


@pytest.fixture
def upstream() -> Iterator[Faulty]:
    """A hub with a file of 2 MB."""
    with faulty_hub(DATA) as hub:
        yield hub


@pytest.fixture
def hubs(tmp_path: Path, places: dict[str, Any], upstream: Faulty) -> Iterator[list[Running]]:
    """Two processes of a hub, with folders of their own."""
    settings = {**places, "upstream": ModelUpstream(upstream.url, "cache", age=0.0)}
    with serving(tmp_path / "one", **settings) as first, serving(tmp_path / "other", **settings) as second:
        yield [first, second]


def get(hub: Running, **headers: str) -> Answer:
    return anonymous(hub).ask("GET", FILE, **headers)


def metrics(hub: Running) -> dict[str, float]:
    """The metrics of the upstream, by name and labels."""
    text = Sending(hub.url, hub.token).ask("GET", "/metrics").data.decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("hub_upstream_")]
    return {name: float(number) for name, number in lines}


def test_another_process_has_what_one_has_fetched_also_without_the_upstream(
    hubs: list[Running], upstream: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_SMALL", 1000)
    assert get(hubs[0]).data == DATA
    upstream.refuses = 503
    answer = get(hubs[1])
    assert answer.status == 302  # to the bucket: the bytes do not pass through the hub
    with urllib.request.urlopen(answer.headers["location"]) as stored:
        assert stored.read() == DATA
    assert upstream.downloads == [""]
    first_metrics, second_metrics = metrics(hubs[0]), metrics(hubs[1])
    assert (
        first_metrics['hub_upstream_reads_total{source="fetched"}']
        == second_metrics['hub_upstream_reads_total{source="bucket"}']
        == 1
    )
    assert (first_metrics["hub_upstream_received_bytes_total"], second_metrics["hub_upstream_received_bytes_total"]) == (
        len(DATA),
        0,
    )
    assert first_metrics["hub_upstream_kept_bytes"] == second_metrics["hub_upstream_kept_bytes"] > len(DATA)


def test_huggingface_hub_gets_the_model_from_either_process(tmp_path: Path, hubs: list[Running], upstream: Faulty) -> None:
    upstream.other_files["config.json"] = b'{"model_type": "tiny"}'
    for number, hub in enumerate(hubs):
        folder = Path(client(hub, tmp_path).snapshot_download(NAME, cache_dir=tmp_path / f"cache-{number}"))
        assert (folder / PATH).read_bytes() == DATA
        assert (folder / "config.json").read_bytes() == b'{"model_type": "tiny"}'
        upstream.refuses = 503
    assert len(upstream.downloads) == 2


def test_all_readers_of_all_processes_have_one_download(
    hubs: list[Running], upstream: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_SMALL", 1000)
    monkeypatch.setattr(models, "_PATIENCE", 0.05)
    monkeypatch.setattr(shared_files, "_CHECK_INTERVAL", 0.0)
    for module in (fills, shared_files):
        monkeypatch.setattr(module, "PIECE_SIZE", 100_000)
    upstream.slow_after = 1_000_000
    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(get, hubs[number % 2]) for number in range(8)]
        part = pool.submit(get, hubs[1], range="bytes=100-199")
        upstream.go.set()
        assert part.result().data == DATA[100:200] or part.result().status == 302
        for reader in readers:
            answer = reader.result()
            assert answer.data == DATA or answer.status == 302
    assert upstream.downloads == [""]


def test_files_of_the_upstream_stay_out_of_a_gc_and_within_their_limit(
    tmp_path: Path, places: dict[str, Any], moto: Server, upstream: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_files, "_SPARED_SECONDS", 0.0)
    settings = {**places, "upstream": ModelUpstream(upstream.url, "cache", age=0.0, max_bytes=3_000_000)}
    with serving(tmp_path / "one", **settings) as first, serving(tmp_path / "other", **settings) as second:
        assert get(first).data == DATA
        upstream.listed = DATA[::-1]
        assert get(second).data == DATA[::-1]
        kept_bytes = metrics(first)["hub_upstream_kept_bytes"]
        assert len(DATA) < kept_bytes < 3_000_000
        assert get(first).data == DATA[::-1]
    assert upstream.downloads == ["", ""]
