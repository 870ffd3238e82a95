"""Versions in an engine: made ready once, never more than fit, never taken from a request that runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapterhub.serve.engines import COMPLETIONS, Blend, EngineAnswer, EngineDownError
from adapterhub.serve.gateway import engine_versions
from adapterhub.serve.gateway.engine_versions import EngineVersions
from adapterhub.serve.gateway.lookup import ResolvedVersion
from adapterhub.serve.gateway.openai_errors import ProblemError
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError


def nth_version(number: int) -> ResolvedVersion:
    return ResolvedVersion(f"team/a{number}", f"sha256:{number:064x}")


@dataclass
class Holder:
    """An engine that answers nothing: it remembers what it holds, and waits, or fails, where a test says so."""

    name: str = "holder"
    runtime: str = "peft"
    max_adapters: int = 100
    slots: int = 100
    paths: frozenset[str] = frozenset({COMPLETIONS})
    can_blend: bool = True
    rereads_files: bool = False
    has_priorities: bool = False
    pinned: frozenset[str] = frozenset()
    forbidden_fields: frozenset[str] = frozenset()
    context: int = 0
    precision: str = ""
    held: set[str] = field(default_factory=set)
    largest: int = 0
    down: bool = False

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def healthy(self) -> bool:
        return not self.down

    async def ensure(self, served: PreparedVersion) -> None:
        if self.down:
            raise EngineDownError("down")
        self.held.add(served.model)
        self.largest = max(self.largest, len(self.held))

    def pin(self, models: frozenset[str]) -> None:
        self.pinned = models

    async def forget(self, served: PreparedVersion) -> None:
        self.held.discard(served.model)

    async def request(self, path: str, body: Any, blend: Blend) -> EngineAnswer:
        raise NotImplementedError


class Folders:
    """Prepares versions; counts how often each was prepared."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.leased: set[str] = set()
        self.refused: set[str] = set()
        self.path = Path("/")
        self.go = threading.Event()
        self.go.set()

    def __call__(self, version: ResolvedVersion) -> PreparedVersion:
        self.go.wait(30)
        self.prepared.append(version.model)
        if version.model in self.refused:
            raise RefusedError(version.name, "vllm: silent base", code="silent-base")
        if not self.path.exists():
            self.path.touch()
        self.leased.add(version.model)
        return PreparedVersion(version.name, version.name, version.digest, "peft", self.path, 4)

    def release(self, served: PreparedVersion) -> None:
        self.leased.discard(served.model)


def in_loop(test: Callable[[EngineVersions, Holder, Folders], Coroutine[Any, Any, None]], max_adapters: int = 2) -> None:
    async def main() -> None:
        engine, folders = Holder(), Folders()
        versions = EngineVersions(engine, folders, folders.release, max_adapters)
        try:
            await asyncio.wait_for(test(versions, engine, folders), 60)
        finally:
            folders.go.set()
            await versions.close()

    asyncio.run(main())


async def use(versions: EngineVersions, *numbers: int, until: asyncio.Event | None = None) -> Blend:
    async with versions.use([(nth_version(number), 1.0) for number in numbers]) as blend:
        if until:
            await until.wait()
        return blend


def test_requests_for_one_version_share_its_preparation() -> None:
    async def test(versions: EngineVersions, _engine: Holder, folders: Folders) -> None:
        folders.go.clear()
        tasks = [asyncio.create_task(use(versions, 1)) for _ in range(20)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # a client goes, and the others wait on
        folders.go.set()
        await asyncio.wait(tasks)
        assert [blend[0][0].model for blend in [await task for task in tasks[1:]]] == [nth_version(1).model] * 19
        assert folders.prepared == [nth_version(1).model]

    in_loop(test)


def test_a_blend_of_more_versions_than_fit_is_refused_before_any_is_prepared() -> None:
    async def test(versions: EngineVersions, _engine: Holder, folders: Folders) -> None:
        with pytest.raises(ProblemError, match="A blend of 3 versions, but the engine holds 2 at most") as refused:
            await use(versions, 1, 2, 3)
        assert (refused.value.status, refused.value.param, folders.prepared) == (400, "model", [])
        await use(versions, 1, 2, 2)  # a version twice is held once

    in_loop(test)


def test_what_is_gone_from_the_cache_is_made_anew_once(tmp_path: Path) -> None:
    async def test(versions: EngineVersions, _engine: Holder, folders: Folders) -> None:
        folders.path = tmp_path / "served"
        await use(versions, 1)
        folders.path.unlink()
        await asyncio.gather(*(use(versions, 1) for _ in range(5)))
        assert folders.prepared == [nth_version(1).model] * 2

    in_loop(test)


def test_never_more_than_fit_and_the_least_recently_used_goes() -> None:
    async def test(versions: EngineVersions, engine: Holder, folders: Folders) -> None:
        for number in (1, 2, 1, 3):
            await use(versions, number)
        assert engine.held == folders.leased == {nth_version(1).model, nth_version(3).model}
        await asyncio.gather(*(use(versions, number % 7) for number in range(70)))
        assert engine.largest == 2

    in_loop(test)


def test_what_is_pinned_is_never_displaced_nor_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_versions, "IDLE", 0.0)
    monkeypatch.setattr(engine_versions, "PATIENCE", 0.01)

    async def test(versions: EngineVersions, engine: Holder, _folders: Folders) -> None:
        versions.pin(frozenset({nth_version(1).model}))
        assert engine.pinned == {nth_version(1).model}
        await asyncio.gather(*(use(versions, number % 7) for number in range(70)))
        assert nth_version(1).model in engine.held
        await versions.forget_idle()
        assert engine.held == {nth_version(1).model}
        with pytest.raises(
            ProblemError, match="A blend of 2 versions, but the engine holds 2 at most, and 1 others are pinned"
        ):
            await use(versions, 2, 3)
        await use(versions, 1, 2)
        versions.pin(frozenset())
        await use(versions, 2, 3)
        assert engine.held == {nth_version(2).model, nth_version(3).model}

    in_loop(test)


def test_what_a_request_uses_stays() -> None:
    async def test(versions: EngineVersions, engine: Holder, _folders: Folders) -> None:
        ends = asyncio.Event()
        await use(versions, 1)
        long = asyncio.create_task(use(versions, 1, until=ends))
        for number in (2, 3, 4, 5):
            await use(versions, number)
            assert nth_version(1).model in engine.held
        ends.set()
        await long

    in_loop(test)


def test_a_version_without_room_waits_and_no_stream_of_others_starves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_versions, "PATIENCE", 0.05)

    async def test(versions: EngineVersions, engine: Holder, _folders: Folders) -> None:
        stop = asyncio.Event()

        async def stream() -> None:  # version 1 is in use at every moment
            while not stop.is_set():
                async with versions.use([(nth_version(1), 1.0)]):
                    overlapping_use = asyncio.create_task(use(versions, 1))
                    await asyncio.sleep(0.01)
                await overlapping_use

        running = [asyncio.create_task(stream()) for _ in range(3)]
        await asyncio.sleep(0.02)
        await use(versions, 2)
        assert nth_version(2).model in engine.held
        stop.set()
        await asyncio.wait(running)

    in_loop(test, max_adapters=1)


def test_what_nobody_asks_for_is_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(versions: EngineVersions, engine: Holder, folders: Folders) -> None:
        ends = asyncio.Event()
        long = asyncio.create_task(use(versions, 1, until=ends))
        await use(versions, 2)
        while engine.held != {nth_version(1).model, nth_version(2).model}:
            await asyncio.sleep(0.01)
        await versions.forget_idle()
        assert len(engine.held) == 2
        monkeypatch.setattr(engine_versions, "IDLE", 0.0)
        await versions.forget_idle()
        assert engine.held == folders.leased == {nth_version(1).model}
        await use(versions, 2)
        engine.rereads_files = True
        await versions.forget_idle()
        assert (engine.held, folders.leased) == (
            {nth_version(1).model},
            {nth_version(1).model, nth_version(2).model},
        )
        ends.set()
        await long

    in_loop(test)


def test_blends_that_overlap_do_not_wait_for_each_other() -> None:
    async def test(versions: EngineVersions, engine: Holder, _folders: Folders) -> None:
        pairs = [(1, 2), (2, 3), (3, 1), (2, 1), (3, 2), (1, 3)] * 5
        blends = await asyncio.gather(*(use(versions, *pair) for pair in pairs))
        assert [tuple(int(served.name[-1]) for served, _ in blend) for blend in blends] == pairs
        assert engine.largest == 2
        with pytest.raises(ProblemError, match="holds 2"):
            await use(versions, 1, 2, 3)

    in_loop(test)


def test_a_refusal_is_remembered_and_takes_no_room() -> None:
    async def test(versions: EngineVersions, engine: Holder, folders: Folders) -> None:
        folders.refused = {nth_version(9).model}
        for _ in range(5):
            with pytest.raises(RefusedError, match="silent base"):
                await use(versions, 9)
        assert folders.prepared == [nth_version(9).model]
        await use(versions, 1, 2)
        assert engine.held == {nth_version(1).model, nth_version(2).model}

    in_loop(test)


def test_an_engine_that_was_down_is_asked_again() -> None:
    async def test(versions: EngineVersions, engine: Holder, _folders: Folders) -> None:
        engine.down = True
        with pytest.raises(EngineDownError):
            await use(versions, 1)
        engine.down = False
        await use(versions, 1)
        engine.held.clear()  # it was started anew, and knows nothing
        await use(versions, 1)
        assert engine.held == {nth_version(1).model}

    in_loop(test)


def test_a_prefetch_takes_no_room_from_requests() -> None:
    async def test(versions: EngineVersions, engine: Holder, _folders: Folders) -> None:
        ends = asyncio.Event()
        long = [asyncio.create_task(use(versions, number, until=ends)) for number in (1, 2)]
        while engine.held != {nth_version(1).model, nth_version(2).model}:
            await asyncio.sleep(0.01)
        await versions.prefetch(nth_version(3))
        assert nth_version(3).model not in engine.held
        ends.set()
        await asyncio.wait(long)
        await versions.prefetch(nth_version(3))
        assert nth_version(3).model in engine.held

    in_loop(test)


def test_a_refused_version_makes_room_for_others() -> None:
    async def test(versions: EngineVersions, engine: Holder, folders: Folders) -> None:
        folders.refused = {nth_version(number).model for number in range(5, 10)}
        results = await asyncio.gather(*(use(versions, number) for number in range(10)), return_exceptions=True)
        assert [type(result) for result in results] == [tuple] * 5 + [RefusedError] * 5
        assert engine.largest <= 2

    in_loop(test)
