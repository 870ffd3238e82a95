"""Locks on changes of repositories: among the requests of this process, and among all processes of a hub."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .jobs import Jobs


class ChangeLocks:
    """The locks on the repositories of a hub, and on other names that only one request may work on."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def change(self, name: str) -> AsyncIterator[None]:
        """Wait until no other request of this process changes a repository, and hold it for the block."""
        # Locks are counted and dropped with their last waiter: names come from clients, and would pile up.
        lock, waiting = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._locks[name]
            if waiting > 1:
                self._locks[name] = lock, waiting - 1
            else:
                del self._locks[name]

    @asynccontextmanager
    async def commit_turn(self, name: str) -> AsyncIterator[None]:
        """Wait until no commit to a repository that has already lost to another process is tried again, and hold the turn."""
        async with self._jobs.claim(f"commit {name}"):
            yield

    @asynccontextmanager
    async def move(self, old: str, new: str) -> AsyncIterator[None]:
        """Wait until no process of the hub renames a repository from or to these names, and no request here changes either."""
        # Always lock in the same order: two opposite renames would wait for each other forever.
        first, second = sorted((old, new))
        claims = self._jobs.claim(f"move {first}"), self._jobs.claim(f"move {second}")
        async with claims[0], claims[1], self.change(first), self.change(second):
            yield
