"""Versions that the engine holds: made ready once, used by any number of requests, forgotten when others need the room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from adapterhub.serve.engines import Blend, Engine, EngineDownError
from adapterhub.serve.served import Served
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError

from .answers import BUSY, ProblemError
from .lookup import Found

log = logging.getLogger("adapterhub.serve.versions")
PATIENCE = 2.0
"""Seconds that a version waits for room before no further request may use the one that it will replace."""
IDLE = 3600.0
"""Seconds after which the engine forgets a version that nobody asks for."""
_LONGEST = 120.0  # seconds of waiting for room
_REFUSED = 60.0  # seconds that a refusal is remembered
_MOST_REFUSED = 1000
_PREPARING = 2  # versions at once


@dataclass(slots=True)
class _Version:
    """A version in the engine, or on its way there.

    Attributes:
        ready: Ends when it may be asked for.
        served: What the engine was told of.
        users: Requests.
        leaving: No further request may use it.
        used: When the last request ended.
    """

    found: Found
    ready: asyncio.Task[Served] = field(init=False)
    served: Served | None = None
    users: int = 0
    leaving: bool = False
    used: float = field(default_factory=time.monotonic)


class Versions:
    """The versions that the engine holds, least recently used first.

    Args:
        prepare: Makes the folder of a version and takes a lease on it; runs in a thread.
        release: Ends the lease on a version of which the engine reads nothing more; runs in a thread.
        most: Versions at once.
    """

    def __init__(
        self, engine: Engine, prepare: Callable[[Found], Served], release: Callable[[Served], object], most: int
    ) -> None:
        self._engine, self._prepare, self._release, self.most = engine, prepare, release, most
        self._held: OrderedDict[str, _Version] = OrderedDict()
        self._refused: OrderedDict[str, tuple[float, AdapterhubError]] = OrderedDict()
        self._queue = asyncio.Lock()  # first come, first served
        self._released = asyncio.Event()
        self._preparing = asyncio.Semaphore(_PREPARING)

    @asynccontextmanager
    async def used(self, parts: Sequence[tuple[Found, float]]) -> AsyncIterator[Blend]:
        """Have the engine know all versions of a blend until the context ends.

        Raises:
            RefusedError: The engine cannot apply one of them as it was trained.
            EngineDownError: The engine does not answer for now.
            ProblemError: Too many other versions are in use.
        """
        distinct = {found.model: found for found, _ in parts}
        if len(distinct) > self.most:
            raise ProblemError(
                400, f"A blend of {len(distinct)} versions, but the engine holds {self.most} at most", param="model"
            )
        versions = await self._admitted(distinct)
        try:
            served = {model: await self._known(version) for model, version in versions.items()}
            yield tuple((served[found.model], weight) for found, weight in parts)
        finally:
            for version in versions.values():
                version.users -= 1
                version.used = time.monotonic()
            self._released.set()

    async def _known(self, version: _Version) -> Served:
        served = await asyncio.shield(version.ready)
        if not served.path.exists():  # the cache was emptied, and the engine may read the files again
            if version.ready.done():
                self._get_ready(version)
            served = await asyncio.shield(version.ready)
        await self._engine.ensure(served)  # again: it may have been started anew
        return served

    async def _admitted(self, distinct: Mapping[str, Found]) -> Mapping[str, _Version]:
        """The versions, each with one more user: all of them or none, so that no two requests wait for each other."""
        there = self._resident(distinct)
        if len(there) < len(distinct):
            for model in distinct:
                self._check_refused(model)
            try:
                async with asyncio.timeout(_LONGEST), self._queue:
                    return await self._with_room(distinct)
            except TimeoutError as error:
                what = f"The engine holds {self.most} versions, and all of them are in use"
                raise ProblemError(429, what, code=BUSY, seconds=5) from error
        for version in there.values():
            version.users += 1
        return there

    def _resident(self, distinct: Iterable[str]) -> dict[str, _Version]:
        there = {model: self._held[model] for model in distinct if model in self._held and not self._held[model].leaving}
        for model in there:
            self._held.move_to_end(model)
        return there

    async def _with_room(self, distinct: Mapping[str, Found]) -> Mapping[str, _Version]:
        there = {model: self._held[model] for model in distinct if model in self._held}
        for version in there.values():
            version.users += 1
            version.leaving = False
            if _has_failed(version.ready):
                self._get_ready(version)
        try:
            await self._make_room(len(distinct) - len(there))
        except BaseException:
            for version in there.values():
                version.users -= 1
            raise
        for model, found in distinct.items():
            if model not in there:
                there[model] = self._begin(found)
                there[model].users += 1
        return there

    def _begin(self, found: Found) -> _Version:
        version = self._held[found.model] = _Version(found)
        self._get_ready(version)
        return version

    def _get_ready(self, version: _Version) -> None:
        version.ready = asyncio.create_task(self._ready(version.found))
        version.ready.add_done_callback(partial(self._done, version))

    def _done(self, version: _Version, task: asyncio.Task[Served]) -> None:
        """Note what the engine was told of, or why it was not; a version that it has from before leaves it when it is idle."""
        if task.cancelled():  # codespell:ignore
            return
        error, model = task.exception(), version.found.model
        if error is None:
            version.served = task.result()
        if error is None or task is not version.ready:
            return
        version.leaving = True
        if version.served is None and self._held.get(model) is version:
            del self._held[model]
        self._released.set()
        if isinstance(error, RefusedError | IntegrityError):
            self._refused[model] = time.monotonic() + _REFUSED, error
            while len(self._refused) > _MOST_REFUSED:
                self._refused.popitem(last=False)

    async def _ready(self, found: Found) -> Served:
        began = time.monotonic()
        async with self._preparing:
            served = await asyncio.to_thread(self._prepare, found)
        await self._engine.ensure(served)
        took = round((time.monotonic() - began) * 1000)
        fields = {"version": found.model, "rank": served.rank, "ms": took, "notes": list(served.notes)}
        log.info("%s is ready after %d ms", found.model, took, extra={"fields": fields})
        return served

    async def _make_room(self, count: int) -> None:
        """Forget versions until so many more have room; the least recently used goes once its requests have ended."""
        began = time.monotonic()
        while len(self._held) + count > self.most:
            idle = [model for model, version in self._held.items() if not version.users and version.ready.done()]
            if idle:
                await self._forget(idle[0])
                continue
            if time.monotonic() - began > PATIENCE:
                next(iter(self._held.values())).leaving = True
            self._released.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), PATIENCE)

    async def _forget(self, model: str) -> None:
        version = self._held.pop(model)
        served = version.served if _has_failed(version.ready) else version.ready.result()
        if served is None:  # the end of `ready` is not noticed yet
            return
        with suppress(EngineDownError):  # then it knows none
            await self._engine.forget(served)
        if not self._engine.keeps:
            await asyncio.to_thread(self._release, served)
        log.info("%s left the engine", model, extra={"fields": {"version": model}})

    def _check_refused(self, model: str) -> None:
        until, error = self._refused.get(model, (0.0, None))
        if error is not None and until > time.monotonic():
            raise error

    async def prefetch(self, found: Found) -> None:
        """Make a version ready that will be asked for soon, where it takes the place of none that is in use; log a failure."""
        full = len(self._held) >= self.most and all(version.users for version in self._held.values())
        if found.model in self._held or self._queue.locked() or full:
            return
        try:
            async with self.used([(found, 1.0)]):
                pass
        except (AdapterhubError, EngineDownError, ProblemError) as error:
            log.warning("%s cannot be made ready: %s", found.model, error)

    def check_again(self) -> None:
        """Prepare all versions anew before their next requests, since other rules hold; requests that run go on."""
        self._refused.clear()
        for version in self._held.values():
            self._get_ready(version)

    async def forget_idle(self) -> None:
        """Forget versions that nobody has asked for in a while; later, where a request waits for room just now."""
        if self._queue.locked():
            return
        async with self._queue:
            before = time.monotonic() - IDLE
            for model, version in [*self._held.items()]:
                if not version.users and version.used < before and version.ready.done():
                    await self._forget(model)

    async def close(self) -> None:
        """Give up what is being made ready."""
        tasks = [version.ready for version in self._held.values() if not version.ready.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _has_failed(task: asyncio.Task[Served]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)  # codespell:ignore
