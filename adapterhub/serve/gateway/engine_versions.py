"""The versions that the engine holds: loaded once, used by any number of requests, forgotten when others need the room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import field
from functools import partial

from adapterhub.serve.engines import Blend, Engine, EngineDownError
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .lookup import ResolvedVersion
from .openai_errors import BUSY, ProblemError
from .spans import span

log = logging.getLogger("adapterhub.serve.versions")
PATIENCE = 2.0
"""Seconds that a version waits for room before no new request may use the version that it will replace."""
IDLE = 3600.0
"""Seconds after which the engine forgets an unused version."""
_MAX_WAIT = 120.0  # seconds of waiting for room
_REFUSAL_SECONDS = 60.0  # seconds that a refusal is remembered
_MAX_REFUSALS = 1000
_MAX_PREPARING = 2  # versions prepared at once, each of which may convert a whole adapter


@dataclass(slots=True)
class _EngineVersion:
    """A version in the engine, or on its way there.

    Attributes:
        ready: Ends when requests may use the version.
        served: The prepared version that the engine was given.
        users: The number of requests that use it.
        leaving: Whether new requests must no longer use it.
        used_at: When the last request ended.
    """

    resolved: ResolvedVersion
    ready: asyncio.Task[PreparedVersion] = field(init=False)
    served: PreparedVersion | None = None
    users: int = 0
    leaving: bool = False
    used_at: float = field(default_factory=time.monotonic)


class EngineVersions:
    """The versions that the engine holds, least recently used first.

    Args:
        prepare: Prepares the folder of a version and takes a lease on it; runs in a thread.
        release: Ends the lease on a version that the engine no longer reads; runs in a thread.
        max_adapters: The largest number of versions at once.

    Attributes:
        make_way: Called when a request waits for room, so that what is less urgent ends.
        pinned: Versions, by `ResolvedVersion.model`, that are not forgotten to make room; fewer than `max_adapters`.
    """

    def __init__(
        self,
        engine: Engine,
        prepare: Callable[[ResolvedVersion], PreparedVersion],
        release: Callable[[PreparedVersion], object],
        max_adapters: int,
    ) -> None:
        self._engine, self._prepare, self._release, self.max_adapters = engine, prepare, release, max_adapters
        self.pinned: frozenset[str] = frozenset()
        self.make_way: Callable[[], object] = lambda: None
        self._versions: OrderedDict[str, _EngineVersion] = OrderedDict()
        self._refusals: OrderedDict[str, tuple[float, AdapterhubError]] = OrderedDict()
        self._queue = asyncio.Lock()  # first come, first served
        self._released = asyncio.Event()
        self._preparing = asyncio.Semaphore(_MAX_PREPARING)

    def pin(self, models: frozenset[str]) -> None:
        """Pin these versions, and no others from now on."""
        if models != self.pinned:
            self.pinned = models
            self._engine.pin(models)

    @asynccontextmanager
    async def use(self, parts: Sequence[tuple[ResolvedVersion, float]]) -> AsyncIterator[Blend]:
        """Keep all versions of a blend in the engine until the context ends.

        Raises:
            RefusedError: The engine cannot apply one of them as it was trained.
            EngineDownError: The engine does not answer for now.
            ProblemError: Too many other versions are in use.
        """
        distinct = {resolved.model: resolved for resolved, _ in parts}
        pinned_by_others = len(self.pinned - distinct.keys())
        if len(distinct) + pinned_by_others > self.max_adapters:
            beside = f", and {pinned_by_others} others are pinned" if pinned_by_others else ""
            message = f"A blend of {len(distinct)} versions, but the engine holds {self.max_adapters} at most{beside}"
            raise ProblemError(400, message, param="model")
        with span("queue"):
            versions = await self._admit(distinct)
        try:
            with span("load"):
                served = {model: await self._ensure_served(version) for model, version in versions.items()}
            yield tuple((served[resolved.model], weight) for resolved, weight in parts)
        finally:
            for version in versions.values():
                version.users -= 1
                version.used_at = time.monotonic()
            self._released.set()

    async def _ensure_served(self, version: _EngineVersion) -> PreparedVersion:
        """Return the prepared version once the engine has it, preparing it again if its folder is gone."""
        served = await asyncio.shield(version.ready)
        if not served.path.exists():  # the cache was emptied, but the engine may read the files again
            if version.ready.done():
                self._start_loading(version)
            served = await asyncio.shield(version.ready)
        await self._engine.ensure(served)  # checked each time, because the engine may have been restarted
        return served

    async def _admit(self, distinct: Mapping[str, ResolvedVersion]) -> Mapping[str, _EngineVersion]:
        """Return the versions, each with one more user: all or none of them, so that no two requests wait for each other."""
        resident = self._take_resident(distinct)
        if len(resident) < len(distinct):
            for model in distinct:
                self._check_refused(model)
            try:
                # One request at a time makes room, so that none takes what another has freed.
                async with asyncio.timeout(_MAX_WAIT), self._queue:
                    return await self._with_room(distinct)
            except TimeoutError as error:
                message = f"The engine holds {self.max_adapters} versions, and all of them are in use"
                raise ProblemError(429, message, code=BUSY, seconds=5) from error
        for version in resident.values():
            version.users += 1
        return resident

    def _take_resident(self, distinct: Iterable[str]) -> dict[str, _EngineVersion]:
        """Return the versions that are in the engine and stay, marking them as just used."""
        resident = {
            model: self._versions[model] for model in distinct if model in self._versions and not self._versions[model].leaving
        }
        for model in resident:
            self._versions.move_to_end(model)
        return resident

    async def _with_room(self, distinct: Mapping[str, ResolvedVersion]) -> Mapping[str, _EngineVersion]:
        """Return the versions, each with one more user, after making room for the missing ones."""
        admitted = {model: self._versions[model] for model in distinct if model in self._versions}
        # Counted as users before waiting, so that the room is not made by forgetting these.
        for version in admitted.values():
            version.users += 1
            version.leaving = False
            if _has_failed(version.ready):
                self._start_loading(version)
        try:
            await self._make_room(len(distinct) - len(admitted))
        except BaseException:
            for version in admitted.values():
                version.users -= 1
            raise
        for model, resolved in distinct.items():
            if model not in admitted:
                admitted[model] = self._add(resolved)
                admitted[model].users += 1
        return admitted

    def _add(self, resolved: ResolvedVersion) -> _EngineVersion:
        """Add a version, and start loading it."""
        version = self._versions[resolved.model] = _EngineVersion(resolved)
        self._start_loading(version)
        return version

    def _start_loading(self, version: _EngineVersion) -> None:
        """Start to prepare a version and load it into the engine."""
        version.ready = asyncio.create_task(self._load(version.resolved))
        version.ready.add_done_callback(partial(self._record_outcome, version))

    def _record_outcome(self, version: _EngineVersion, task: asyncio.Task[PreparedVersion]) -> None:
        """Record the prepared version, or why it failed; a version that was loaded before a failure leaves once it is idle."""
        if task.cancelled():  # codespell:ignore
            return
        error, model = task.exception(), version.resolved.model
        if error is None:
            version.served = task.result()
        # A newer attempt may have replaced this one; only its outcome counts.
        if error is None or task is not version.ready:
            return
        version.leaving = True
        if version.served is None and self._versions.get(model) is version:
            del self._versions[model]
        self._released.set()
        if isinstance(error, RefusedError | IntegrityError):
            self._refusals[model] = time.monotonic() + _REFUSAL_SECONDS, error
            while len(self._refusals) > _MAX_REFUSALS:
                self._refusals.popitem(last=False)

    async def _load(self, resolved: ResolvedVersion) -> PreparedVersion:
        """Prepare a version, and give it to the engine."""
        started = time.monotonic()
        async with self._preparing:
            served = await asyncio.to_thread(self._prepare, resolved)
        await self._engine.ensure(served)
        took = round((time.monotonic() - started) * 1000)
        fields = {"version": resolved.model, "rank": served.rank, "ms": took, "notes": list(served.notes)}
        log.info("%s is ready after %d ms", resolved.model, took, extra={"fields": fields})
        return served

    def has_room_for(self, resolved: ResolvedVersion) -> bool:
        """Return whether a version is in the engine, or can be loaded without displacing another."""
        resident = self._versions.get(resolved.model)
        if resident is not None:
            return not resident.leaving
        return len(self._versions) < self.max_adapters and not self._queue.locked()

    async def _make_room(self, count: int) -> None:
        """Forget versions until `count` more fit; the least recently used one goes once its requests have ended."""
        started = time.monotonic()
        if len(self._versions) + count > self.max_adapters:
            self.make_way()
        while len(self._versions) + count > self.max_adapters:
            loose = {model: version for model, version in self._versions.items() if model not in self.pinned}
            idle = [model for model, version in loose.items() if not version.users and version.ready.done()]
            if idle:
                await self._forget(idle[0])
                continue
            if loose and time.monotonic() - started > PATIENCE:
                next(iter(loose.values())).leaving = True
            self._released.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._released.wait(), PATIENCE)

    async def _forget(self, model: str) -> None:
        """Remove a version from the engine, and release its folder unless the engine may read it again."""
        version = self._versions.pop(model)
        served = version.served if _has_failed(version.ready) else version.ready.result()
        if served is None:  # the outcome of `ready` is not recorded yet
            return
        with suppress(EngineDownError):  # a restarted engine has no versions
            await self._engine.forget(served)
        # An engine that may read the folder again needs it until the gateway ends.
        if not self._engine.rereads_files:
            await asyncio.to_thread(self._release, served)
        log.info("%s left the engine", model, extra={"fields": {"version": model}})

    def _check_refused(self, model: str) -> None:
        """Raise the remembered error for a version that was refused recently."""
        until, error = self._refusals.get(model, (0.0, None))
        if error is not None and until > time.monotonic():
            raise error

    async def prefetch(self, resolved: ResolvedVersion) -> None:
        """Load a version that will be asked for soon, unless that would displace one in use; log a failure."""
        is_full = len(self._versions) >= self.max_adapters and all(version.users for version in self._versions.values())
        if resolved.model in self._versions or self._queue.locked() or is_full:
            return
        try:
            async with self.use([(resolved, 1.0)]):
                pass
        except (AdapterhubError, EngineDownError, ProblemError) as error:
            log.warning("%s cannot be made ready: %s", resolved.model, error)

    def check_again(self) -> None:
        """Prepare all versions again before their next requests, because the rules may have changed; running requests go on."""
        self._refusals.clear()
        for version in self._versions.values():
            self._start_loading(version)

    async def forget_idle(self) -> None:
        """Forget versions that were not used in a while; skip this while a request waits for room."""
        if self._queue.locked():
            return
        async with self._queue:
            before = time.monotonic() - IDLE
            for model, version in [*self._versions.items()]:
                if model not in self.pinned and not version.users and version.used_at < before and version.ready.done():
                    await self._forget(model)

    async def close(self) -> None:
        """Cancel the versions that are being loaded."""
        tasks = [version.ready for version in self._versions.values() if not version.ready.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _has_failed(task: asyncio.Task[PreparedVersion]) -> bool:
    """Return whether a task was canceled or raised."""
    return task.done() and (task.cancelled() or task.exception() is not None)  # codespell:ignore
