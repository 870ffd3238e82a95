"""What all server engines share: the server that they are, and adapters that are loaded by name."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from adapterhub.serve.prepared_versions import PreparedVersion

from . import EngineAnswer, EngineDownError
from .engine_client import Client, Connection
from .server_process import Process

log = logging.getLogger("adapterhub.serve.engine")
UNAVAILABLE = (502, 503)
"""The statuses of a server that is not available, or of a proxy in front of one."""


class Server:
    """The parts of an `Engine` that all servers share.

    `process` is None for the user's own server, which is neither started nor stopped here.
    """

    rereads_files = has_priorities = False
    context, precision = 0, ""

    def __init__(self, client: Client, process: Process | None = None) -> None:
        self.client, self.process = client, process

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The logarithms of the probabilities of its base for a fixed prompt; empty if they are not known."""
        return {}

    async def start(self) -> None:
        """Start it."""
        if self.process is not None:
            await self.process.start()

    async def join(self) -> None:
        """Use the process that another process of this gateway has started, and watches."""
        self.process = None
        await self.start()

    async def close(self) -> None:
        """Stop it, unless it is the user's own, or another process's."""
        if self.process is not None:
            await self.process.close()
        await self.client.close()

    async def healthy(self) -> bool:
        """Return whether it answers."""
        return (self.process is None or self.process.up) and await self.client.answers("/health")

    def check(self) -> None:
        """Raise EngineDownError while it is being restarted."""
        if self.process is not None:
            self.process.check()

    async def forget(self, served: PreparedVersion) -> None:
        """Do nothing, for servers that forget by themselves, or never."""

    def pin(self, models: frozenset[str]) -> None:
        """Do nothing: servers have no such request."""


class LoadingServer(Server, ABC):
    """A server that loads adapters by name while it runs, and forgets all of them when it is restarted."""

    def __init__(self, client: Client, process: Process | None = None) -> None:
        super().__init__(client, process)
        self._loaded: set[str] = set()
        self._load_steps: Counter[str] = Counter()  # begun and ended loads, by name
        # One for each name, so that a slow load holds up no other version.
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        if process is not None:
            process.before_start = self._loaded.clear

    @abstractmethod
    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter under a name; RefusedError if the server cannot."""

    async def ensure(self, served: PreparedVersion) -> None:
        """Load the version, unless the server has it."""
        self.check()
        await self._ensure_loaded(served.model, served.path)

    async def _ensure_loaded(self, name: str, folder: Path) -> None:
        if name in self._loaded:
            return
        async with self._lock_of(name):
            if name not in self._loaded:
                self._load_steps[name] += 1
                await self.load(name, folder)
                self._load_steps[name] += 1
                self._loaded.add(name)

    def _lock_of(self, name: str) -> asyncio.Lock:
        """Return the lock for loading and unloading a name."""
        return self._loading.setdefault(name, asyncio.Lock())

    async def request_loaded(self, send: Callable[[], Awaitable[EngineAnswer]], name: str, folder: Path) -> EngineAnswer:
        """Send a request for a loaded adapter; if the server has forgotten it since, load it and ask once more."""
        steps = self._load_steps[name]
        answer = await send()
        if answer.status not in (400, 404) or not steps:
            return answer
        is_listed = any(model["id"] == name for model in await models_of(self.client))
        # Another request may have noticed first: then its load has begun or ended since this one was asked.
        if is_listed and name in self._loaded and steps == self._load_steps[name]:
            return answer
        await answer.close()
        if not is_listed:
            log.warning("the engine has forgotten %s; loading it again", name)
            self._loaded.discard(name)
        await self._ensure_loaded(name, folder)
        return await send()


def check_available(status: int, what: str) -> None:
    """Raise EngineDownError for the status of a server that is not available, or of a proxy in front of it."""
    if status in UNAVAILABLE:
        raise EngineDownError(f"{what} was answered with {status}")


async def models_of(client: Client | Connection) -> list[dict[str, Any]]:
    """Return the models that a server lists: its base, and adapters of it; an empty list if it answers otherwise."""
    status, document = await client.call("GET", "/v1/models")
    models = document.get("data") if status == 200 and isinstance(document, dict) else None
    return [model for model in models if isinstance(model, dict) and "id" in model] if isinstance(models, list) else []
