"""Work that one of several processes does: over hub.db, and in `tests/peers` over PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.converted_versions import ConvertedVersions
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.jobs import Jobs
from tests.hub.conftest import Running, serving
from tests.hub.sending import Sending


@pytest.fixture
def database(tmp_path: Path) -> Iterator[HubDatabase]:
    """An empty database."""
    with closing(HubDatabase(tmp_path)) as opened:
        yield opened


def test_a_job_is_done_by_one_process_after_the_other(database: HubDatabase) -> None:
    log: list[str] = []

    async def work(jobs: Jobs, name: str) -> None:
        async with jobs.claim("convert"):
            log.append(f"{name} begins")
            await asyncio.sleep(0)
            log.append(f"{name} ends")

    async def run_both() -> None:
        await asyncio.gather(work(Jobs(database), "one"), work(Jobs(database), "other"))

    asyncio.run(run_both())
    assert log in [[f"{name} {verb}" for name in names for verb in ("begins", "ends")] for names in _ORDERS]
    assert database.select("SELECT * FROM jobs") == []


_ORDERS = (("one", "other"), ("other", "one"))


def test_the_job_of_a_process_that_was_killed_is_done_by_another_once_its_lease_is_over(database: HubDatabase) -> None:
    killed, jobs = Jobs(database), Jobs(database)
    assert killed.try_claim("convert")
    assert not jobs.try_claim("convert")
    killed.extend("convert")
    database.execute("UPDATE jobs SET until = ?", time.time() - 1)
    assert jobs.try_claim("convert")
    killed.extend("convert")
    killed.release("convert")
    assert not killed.try_claim("convert")


def check_made_once(hubs: Sequence[Running], adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that of two processes which are asked for one form at once, one makes it, and both have it."""
    callers: list[ConvertedVersions] = []
    makers: list[ConvertedVersions] = []
    all_asked, converted, make = threading.Event(), ConvertedVersions._convert, ConvertedVersions.make

    async def asking(self: ConvertedVersions, *words: Any) -> None:
        callers.append(self)
        if len(callers) == len(hubs):
            all_asked.set()
        await make(self, *words)

    def converting(self: ConvertedVersions, *words: Any) -> Any:
        makers.append(self)
        assert all_asked.wait(60)
        return converted(self, *words)

    monkeypatch.setattr(ConvertedVersions, "make", asking)
    monkeypatch.setattr(ConvertedVersions, "_convert", converting)
    assert Sending(hubs[0].url, hubs[0].token).push("team/sql", adapter).status == 200
    path = "/v2/team/sql.mlx/manifests/latest"
    with ThreadPoolExecutor(len(hubs)) as pool:
        answers = [*pool.map(lambda hub: Sending(hub.url, hubs[0].token).ask("GET", path), hubs)]
    assert {(answer.status, answer.data) for answer in answers} == {(200, answers[0].data)}
    assert len(makers) == 1


def test_two_processes_over_one_folder_make_a_form_once(
    tmp_path: Path, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path / "hub") as server, serving(tmp_path / "hub") as other_server:
        check_made_once([server, other_server], adapter(1), monkeypatch)
