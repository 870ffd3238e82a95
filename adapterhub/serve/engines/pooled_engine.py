"""One of several engines behind a gateway: where it is, whether it answers, and how much it has to do.

An engine is in use once it has been compared with the base. It is out of use after a connection failure, or two looks at which
it did not answer `/health`, and is looked at again after a pause that grows with each failure until it has answered a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import urlsplit

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import Engine, EngineDownError, EngineTimeoutError
from .server_engine import Server

log = logging.getLogger("adapterhub.serve.engine")
# Seconds between two looks at an engine in use: less than a client keeps an idle connection, so that none is compared again.
_LOOK_SECONDS = 1.5
_MAX_MISSES = 2  # looks without an answer, because a busy engine may miss one
_PAUSES = (0.5, 1, 2, 5, 10, 30)  # seconds before a look at an engine out of use, longer after each failure


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine is.

    Attributes:
        url: The URL of its server.
        name: Its name in logs, metrics and `/ready`.
        weight: Its share of the requests, compared with the others.
        key_variable: The environment variable that has its key; empty for the variable of all engines.
    """

    url: str
    name: str
    weight: float = 1.0
    key_variable: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What tells it from the others; another weight makes no other engine."""
        return self.url, self.name, self.key_variable


def address_of(url: str, name: str = "", weight: float = 1.0, key_variable: str = "") -> EngineAddress:
    """Return the address of an engine, which is named for its host and port unless it has a name."""
    host = urlsplit(url).netloc.rpartition("@")[2]
    return EngineAddress(url.rstrip("/"), name or printable(host or url), weight, key_variable)


def check_distinct(addresses: Iterable[EngineAddress], place: str = "") -> None:
    """Raise UsageError, with the place if there is one, for a server or a name that occurs twice."""
    texts: set[str] = set()
    for address in addresses:
        for text in (address.url, address.name):
            if text in texts:
                problem, hint = "is given more than once", "Name each engine once"
                raise UsageError(f"{place}: {text}" if place else text, problem, hint, code="engine-twice")
        texts |= {address.url, address.name}


class PooledEngine:
    """An engine of a pool.

    Args:
        open_engine: Opens the engine at the address, without starting it.
        check: Compares the engine, which has started, with the others of the pool; raises RefusedError.

    Attributes:
        has_started: Whether it has been compared with the base, and is right.
        is_up: Whether it is in use.
        is_leaving: Whether it gets no new request.
        running: The number of requests that it is answering, and of versions that it loads before a request is sent.
        versions: The names of the versions that it was given.
        error: Why it could not be started; None if it could.
    """

    def __init__(
        self,
        address: EngineAddress,
        open_engine: Callable[[EngineAddress], Engine],
        check: Callable[[PooledEngine], None],
    ) -> None:
        self.address, self.engine = address, open_engine(address)
        self._open, self._check = open_engine, check
        self.has_started = self.is_up = self.is_leaving = False
        self.running = 0
        self.versions: set[str] = set()
        self.error: AdapterhubError | EngineDownError | None = None
        self._failures, self._retry_at, self._problem = 0, 0.0, ""
        self._misses = 0
        self._look: asyncio.Task[bool] | None = None

    @property
    def load(self) -> float:
        """The running requests, compared with its weight."""
        return self.running / self.address.weight

    def holds(self, models: Iterable[str]) -> bool:
        """Return whether it was given all of these versions."""
        return self.versions.issuperset(models)

    async def ensure(self, served: PreparedVersion) -> None:
        """Make sure that it knows a version; one that does not load it in time has not been asked anything yet."""
        try:
            await self.engine.ensure(served)
        except EngineTimeoutError as error:
            raise EngineDownError(str(error), error.seconds) from error
        self.versions.add(served.model)

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The logarithms of the probabilities of its base for a fixed prompt; empty if they are not known."""
        return self.engine.probabilities if isinstance(self.engine, Server) else {}

    async def start(self) -> bool:
        """Compare it with the base; return whether it answers and is right."""
        try:
            await self.engine.start()
        except (AdapterhubError, EngineDownError) as error:
            await self._refuse(error)
            return False
        return True

    async def join(self) -> None:
        """Compare it, once it has started, with the others."""
        try:
            self._check(self)
        except RefusedError as error:
            await self._refuse(error)
        else:
            self.has_started, self.error = True, None

    async def _refuse(self, error: AdapterhubError | EngineDownError) -> None:
        """Leave it out, and forget the server that it was compared with, which may be another one the next time."""
        self.error = error
        self.fail(str(error))
        await self.engine.close()
        self.engine = self._open(self.address)

    async def close(self) -> None:
        """Close its connections."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait([self._look])
        await self.engine.close()

    def current_look(self) -> asyncio.Task[bool]:
        """Return the look that is going on, or begin one; it goes on when nobody waits for it, and keeps its connection."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self.look())
        return self._look

    async def look(self) -> bool:
        """Return whether it answers now; start it before the first look, and use it again once its pause is over."""
        if not self.has_started and await self.start():
            await self.join()
        if not self.has_started:
            return False
        is_healthy = await self.engine.healthy()
        self._misses = 0 if is_healthy else self._misses + 1
        if self._misses >= _MAX_MISSES:
            self.fail("it does not answer /health")
        elif is_healthy and not self.is_up and time.monotonic() >= self._retry_at:
            self.is_up, self._problem = True, ""
            log.info("the engine %s is in use", self.address.name, extra={"fields": {"engine": self.address.name}})
        return is_healthy

    def fail(self, problem: str) -> None:
        """Take it out of use."""
        now = time.monotonic()
        if self.is_up or now >= self._retry_at:  # many requests may fail with one failure of the engine
            self._retry_at = now + _PAUSES[min(self._failures, len(_PAUSES) - 1)]
            self._failures += 1
        if self.is_up or (not self.has_started and problem != self._problem):
            fields = {"engine": self.address.name, "problem": problem}
            log.warning("the engine %s is left out: %s", self.address.name, problem, extra={"fields": fields})
        self.is_up, self._problem = False, problem

    def succeed(self) -> None:
        """Forget earlier failures, because it has answered a request."""
        self._failures = 0

    async def watch(self) -> None:
        """Look at it again and again."""
        while True:
            pause = _LOOK_SECONDS if self.is_up else self._retry_at - time.monotonic()
            await asyncio.sleep(max(pause, _PAUSES[0]))
            try:
                await asyncio.shield(self.current_look())
            except Exception:
                log.exception("the engine %s cannot be looked at; it will be tried again", self.address.name)
