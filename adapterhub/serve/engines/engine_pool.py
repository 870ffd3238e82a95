"""Several servers of one kind and one base behind a gateway, as one engine.

A version stays with the engines that have it, until the least busy of them has `SPREAD` requests more than an idler one, which
then gets it too. A request goes to another engine only as long as nothing of an answer has arrived, and only if the first one
cannot be reached, breaks off, or is not available (502, 503): what an engine refuses, the others would refuse as well.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import AdapterhubError, RefusedError, UsageError

from . import Blend, Engine, EngineAnswer, EngineDownError, EngineTimeoutError, MissingVersionError
from .attached_base import are_alike
from .engine_client import BrokenConnectionError
from .pooled_engine import EngineAddress, PooledEngine, check_distinct
from .server_engine import UNAVAILABLE

log = logging.getLogger("adapterhub.serve.engine")
SPREAD = 4
"""Requests, for a weight of 1, by which the engines that have a version must be busier than another one before that gets it."""
_MAX_BREAKS = 2  # connections that one request may break, because it may be what ends the engines
_MAX_NAMES, _OTHER_ENGINES = 1000, "other"  # engines that are counted by name while the gateway runs


class EnginePool:
    """The `Engine` over several servers.

    Args:
        open_engine: Opens the engine at an address, without starting it.
        fixed: The engines of the command line.
        listed: Those of the route file, which may change.

    Attributes:
        requests: The number of requests that each engine was asked, by its name.
        right_probabilities: Those of the base in another process of this gateway, which all engines must have; else empty.
    """

    def __init__(
        self,
        open_engine: Callable[[EngineAddress], Engine],
        fixed: Sequence[EngineAddress],
        listed: Sequence[EngineAddress] = (),
    ) -> None:
        self._open, self._fixed = open_engine, tuple(fixed)
        addresses = [*fixed, *listed]
        check_distinct(addresses)
        self._members = [self._open_member(address) for address in addresses]
        self._watches: dict[PooledEngine, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.requests: Counter[str] = Counter()
        self.right_probabilities: Mapping[str, float] = {}
        # They are of one kind, so the first one speaks for all.
        first = self._members[0].engine
        self.name, self.runtime, self.paths, self.can_blend = first.name, first.runtime, first.paths, first.can_blend
        self.max_adapters, self.slots = first.max_adapters, first.slots
        self.rereads_files, self.forbidden_fields = first.rereads_files, first.forbidden_fields
        self.has_priorities, self.context, self.precision = first.has_priorities, 0, first.precision

    # ---- the engines

    async def start(self) -> None:
        """Compare all engines with the base; raise the error of the first one if none is right."""
        are_right = await asyncio.gather(*(member.start() for member in self._members))
        # One after the other, so that the first one decides which weights are right.
        for member in (member for member, is_right in zip(self._members, are_right, strict=True) if is_right):
            await member.join()
            await member.look()
        contexts = [member.engine.context for member in self._members if member.has_started]
        if not contexts:
            raise self._members[0].error or EngineDownError("no engine answers for now")
        self.context = min(contexts)
        for member in self._members:
            if member not in self._watches:  # added by a reload while the others started
                self._watch(member)

    async def close(self) -> None:
        """Close the connections to all engines."""
        for watch in self._watches.values():
            watch.cancel()
        if self._watches:
            await asyncio.wait(self._watches.values())
        await asyncio.gather(*self._closing, *(member.close() for member in self._members))

    async def healthy(self) -> bool:
        """Return whether at least one engine answers; the first answer decides, so that a hanging engine delays nobody."""
        pending = {member.current_look() for member in self._members if member.has_started}
        while pending:
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if any(not look.cancelled() and look.result() for look in finished):  # codespell:ignore
                return True
        return False

    @property
    def members(self) -> Sequence[PooledEngine]:
        """The engines, without those that were removed."""
        return tuple(self._members)

    def states(self) -> list[dict[str, object]]:
        """Return the name of each engine, whether it is in use, and the number of its running requests."""
        return [{"name": member.address.name, "up": member.is_up, "running": member.running} for member in self._members]

    def change(self, listed: Sequence[EngineAddress]) -> None:
        """Use these engines of the route file from now on: removed ones end their requests, added ones are compared first."""
        new_addresses = {address.identity: address for address in (*self._fixed, *listed)}
        try:
            check_distinct((*self._fixed, *listed))
            if not new_addresses:
                raise UsageError("engines", "all engines were removed", "Name at least one")
        except UsageError as error:
            log.error("the engines stay as they were: %s", error)
            return
        for member in self.members:
            if (address := new_addresses.pop(member.address.identity, None)) is not None:
                member.address = address
            else:
                self._remove(member)
        for address in new_addresses.values():
            self._add(address)

    def _add(self, address: EngineAddress) -> None:
        """Add an engine, which is used as soon as it has been compared."""
        try:
            member = self._open_member(address)
        except AdapterhubError as error:
            log.error("the engine %s is left out: %s", address.name, error)
            return
        log.info("the engine %s was added", address.name)
        self._members.append(member)
        self._watch(member)

    def _open_member(self, address: EngineAddress) -> PooledEngine:
        return PooledEngine(address, self._open, self._check_weights)

    def _check_weights(self, member: PooledEngine) -> None:
        """Raise RefusedError if an engine has other weights than one that was in use before."""
        reference = self._reference()
        name, probabilities = (reference.address.name, reference.probabilities) if reference else ("that was first", {})
        probabilities = self.right_probabilities or probabilities
        if member.probabilities and probabilities and not are_alike(member.probabilities, probabilities):
            problem = f"answers with other weights than the engine {name}"
            raise RefusedError(member.address.url, problem, "Start it with the same base", code="engine-base")

    def _reference(self) -> PooledEngine | None:
        """Return the engine that others are compared with; None before the first one."""
        return next((member for member in self._members if member.has_started and member.probabilities), None)

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The probabilities that engines are compared by; empty if they are not known."""
        reference = self._reference()
        return self.right_probabilities or (reference.probabilities if reference else {})

    def shuffle(self) -> None:
        """Put the engines into another order, so that several processes do not all ask the same one first."""
        random.shuffle(self._members)

    def _watch(self, member: PooledEngine) -> None:
        self._watches[member] = asyncio.create_task(member.watch())

    def _remove(self, member: PooledEngine) -> None:
        """Give an engine no more requests, and close its connections after the last one."""
        log.info("the engine %s was removed; requests that it still answers: %d", member.address.name, member.running)
        member.is_leaving = True
        self._members.remove(member)
        if watch := self._watches.pop(member, None):
            watch.cancel()
        self._close_if_done(member)

    def _close_if_done(self, member: PooledEngine) -> None:
        """Close an engine that was removed and answers no request any more."""
        if member.is_leaving and not member.running:
            task = asyncio.create_task(member.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # ---- versions

    async def ensure(self, served: PreparedVersion) -> None:
        """Make sure that at least one engine in use knows a version; another one gets it when a request goes there."""
        if any(member.is_up and member.holds([served.model]) for member in self._members):
            return
        problem = EngineDownError("no engine answers for now")
        for member in self._in_turn([served.model]):
            member.running += 1  # if it is removed meanwhile, its connections are closed afterwards
            try:
                await member.ensure(served)
                return
            except EngineDownError as error:
                member.fail(str(error))
                problem = error
            finally:
                self._release(member)
        raise problem

    async def forget(self, served: PreparedVersion) -> None:
        """Let all engines forget a version."""
        for member in self.members:
            if member.holds([served.model]):
                member.versions.discard(served.model)
                with suppress(EngineDownError):
                    await member.engine.forget(served)

    def pin(self, models: frozenset[str]) -> None:
        """Tell all engines which versions to prefer."""
        for member in self._members:
            member.engine.pin(models)

    # ---- requests

    def _in_turn(self, models: Sequence[str]) -> Iterator[PooledEngine]:
        """Yield each engine, the best one at that moment first, and those out of use after all others."""
        candidates = [member for member in self._members if member.has_started]
        while candidates := [member for member in candidates if not member.is_leaving]:
            member = choose([member for member in candidates if member.is_up] or candidates, models)
            candidates.remove(member)
            yield member

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send a request to an engine, and to another one if that does not answer."""
        problem: EngineDownError | MissingVersionError = EngineDownError("no engine answers for now")
        unavailable: EngineAnswer | None = None
        breaks = 0
        for member in self._in_turn([served.model for served, _ in blend]):
            if unavailable is not None:
                if not member.is_up:
                    break
                await unavailable.close()
                unavailable = None
            try:
                answer = await self._request(member, path, body, blend)
            except (EngineDownError, MissingVersionError) as error:
                problem = error
                breaks += isinstance(error, BrokenConnectionError)
                # Another one would take as long as one that is only slow.
                if isinstance(error, EngineTimeoutError) or breaks == _MAX_BREAKS:
                    raise
            else:
                if answer.status not in UNAVAILABLE:
                    return answer
                unavailable = answer
        if unavailable is not None:
            return unavailable
        raise problem

    async def _request(self, member: PooledEngine, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send a request to one engine; return the answer once its first piece has arrived."""
        name = member.address.name
        self.requests[name if name in self.requests or len(self.requests) < _MAX_NAMES else _OTHER_ENGINES] += 1
        member.running += 1
        answer: EngineAnswer | None = None

        async def close() -> None:
            nonlocal answer
            if answer is not None:
                ending, answer = answer, None
                self._release(member)
                await ending.close()

        try:
            for served, _ in blend:
                await member.ensure(served)
            answer = await member.engine.request(path, body, blend)
            first = await anext(answer.body, b"")
        except BaseException as error:
            if answer is None:
                self._release(member)
            await close()
            _blame(member, error)
            raise
        member.succeed()
        return replace(answer, body=_pieces(member, first, answer.body), close=close, engine=name)

    def _release(self, member: PooledEngine) -> None:
        """Count a request that has ended."""
        member.running -= 1
        self._close_if_done(member)


def choose(candidates: Sequence[PooledEngine], models: Sequence[str]) -> PooledEngine:
    """Return the least busy engine that has all of these versions, or the least busy of all if those are busier by `SPREAD`."""
    idlest = min(candidates, key=_busyness)
    holders = [member for member in candidates if member.holds(models)]
    holder = min(holders, key=_busyness, default=idlest)
    return holder if holder.load - idlest.load < SPREAD else idlest


def _busyness(member: PooledEngine) -> tuple[float, float]:
    """Return what orders engines: their load, and if that is the same, the number of versions they have."""
    return member.load, len(member.versions) / member.address.weight


def _blame(member: PooledEngine, error: BaseException) -> None:
    """Take an engine out of use for an error that says that it is down, and not only slow."""
    if isinstance(error, EngineDownError) and not isinstance(error, EngineTimeoutError):
        member.fail(str(error))


async def _pieces(member: PooledEngine, first: bytes, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the pieces of an answer; an engine that breaks one off is taken out of use."""
    yield first
    try:
        async for piece in body:
            yield piece
    except EngineDownError as error:
        _blame(member, error)
        raise
