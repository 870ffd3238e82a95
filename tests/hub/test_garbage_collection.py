"""A hub collects its garbage now and then, in a process of its own, which packs what is over a day old."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.cli.commands.hub.serving import _collection
from adapterhub.hub import garbage_collection
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.jobs import Jobs
from adapterhub.hub.settings import GarbageCollection, HubSettings
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.hub.conftest import serving


def collection(period: float, *words: str) -> GarbageCollection:
    return GarbageCollection(period, (sys.executable, *words), dict(os.environ))


def run_for_a_while(settings: GarbageCollection, folder: Path, *jobs: Jobs, until: Callable[[], bool]) -> None:
    async def run() -> None:
        tasks = [asyncio.create_task(garbage_collection.collect_now_and_then(settings, job, folder)) for job in jobs]
        while not until():
            await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_hub_packs_versions_of_over_a_day_and_collects_garbage(
    tmp_path: Path, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub"
    with Registry.init(root) as registry:
        monkeypatch.setattr("adapterhub.registry.moves.now", lambda: "2026-01-01T00:00:00Z")
        for seed, name in enumerate(("old", "new")):
            folder = adapter(seed)
            (folder / "README.md").write_text(f"{seed}: a text that can be packed.\n" * 1000)
            registry.push(folder, Ref(f"team/{name}"))
            monkeypatch.undo()
        orphan, _ = registry.store.put_bytes(b"of no version")
        os.utime(registry.store.blob_path(orphan), (time.time() - 90_000,) * 2)
    (root / "adapterhub.toml").write_text("pack = true\n")
    settings = HubSettings(registry=root)
    with serving(root, collection=_collection(settings, 3600)) as hub:
        deadline = time.monotonic() + 60
        while not list(registry.store.packs.files()) and time.monotonic() < deadline:
            time.sleep(0.05)
        with hub.registry() as registry:
            assert len(list(registry.store.packs.files())) == 1
            assert not registry.store.has_plain(orphan)


def test_one_process_of_a_hub_collects_once_in_a_period_at_low_priority(tmp_path: Path) -> None:
    program = "import os; open('runs', 'a').write(f'{os.nice(0)}\\n')"
    if hasattr(os, "setpriority"):  # which its parent sets once it runs
        program = f"import time, os\nwhile os.nice(0) < {garbage_collection._NICENESS}: time.sleep(0.01)\n" + program
    with closing(HubDatabase(tmp_path)) as database:
        jobs = [Jobs(database) for _ in range(3)]
        runs = tmp_path / "runs"
        run_for_a_while(collection(3600, "-c", program), tmp_path, *jobs, until=runs.exists)
        # Not again within the period, also not after the hub was started again.
        started = time.monotonic()
        run_for_a_while(collection(3600, "-c", program), tmp_path, *jobs, until=lambda: time.monotonic() - started > 1)
        assert len(runs.read_text().splitlines()) == 1


def test_a_period_later_it_is_run_again_whatever_became_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "adapterhub.hub")
    program = "import sys; open('runs', 'a').write('x'); print('a\\x1b[31m line', file=sys.stderr); sys.exit(4)"
    runs = tmp_path / "runs"
    with closing(HubDatabase(tmp_path)) as database:
        has_run_again = lambda: runs.exists() and len(runs.read_text()) > 1  # noqa: E731
        run_for_a_while(collection(0.05, "-c", program), tmp_path, Jobs(database), until=has_run_again)
        missing = replace(collection(0.05), command=(str(tmp_path / "no-such-program"),))
        run_for_a_while(missing, tmp_path, Jobs(database), until=lambda: "no garbage is collected" in caplog.text)
    assert "a garbage collection ended with 4: a" in caplog.text
    assert "\x1b" not in caplog.text


def test_a_collection_ends_with_its_hub(tmp_path: Path) -> None:
    program = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    file = tmp_path / "pid"
    with closing(HubDatabase(tmp_path)) as database:
        running = collection(3600, "-c", program)
        run_for_a_while(running, tmp_path, Jobs(database), until=lambda: file.exists() and bool(file.read_text()))
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
