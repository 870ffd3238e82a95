"""Work that one of several processes does once: claimed in a table, and again by another one if the first was killed."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from adapterhub_converters.errors import AdapterhubError

from .database import HubDatabase

_LEASE = 60.0  # seconds until a claim that is not renewed ends
_RENEWED = 15.0
_POLL = 0.5  # seconds between two looks at the claim of another process


class Jobs:
    """The claims of a process; all processes of a hub share the table."""

    def __init__(self, database: HubDatabase) -> None:
        self._database = database
        self._owner = secrets.token_hex(8)

    @asynccontextmanager
    async def claimed(self, job: str) -> AsyncIterator[None]:
        """Wait until no other process does a job, and keep it for this one. What another has done meanwhile is done."""
        while not await asyncio.to_thread(self._claim, job):
            await asyncio.sleep(_POLL)
        renewing = asyncio.create_task(self._renew(job))
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.shield(asyncio.to_thread(self._release, job))

    def _claim(self, job: str) -> bool:
        now = time.time()
        sql = (
            "INSERT INTO jobs VALUES (?, ?, ?) ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, until = excluded.until"
            " WHERE jobs.until < ?"
        )
        return bool(self._database.execute(sql, job, self._owner, now + _LEASE, now))

    async def _renew(self, job: str) -> None:
        while True:
            await asyncio.sleep(_RENEWED)
            with contextlib.suppress(AdapterhubError):  # the database is away: perhaps not for longer than the lease
                await asyncio.to_thread(self._extend, job)

    def _extend(self, job: str) -> None:
        sql = "UPDATE jobs SET until = ? WHERE job = ? AND owner = ?"
        self._database.execute(sql, time.time() + _LEASE, job, self._owner)

    def _release(self, job: str) -> None:
        self._database.execute("DELETE FROM jobs WHERE job = ? AND owner = ?", job, self._owner)
