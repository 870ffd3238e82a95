"""Work that only one of several processes does: claimed in a table, with a lease, in case that process is killed."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from adapterhub_converters.errors import AdapterhubError

from .hub_database import HubDatabase

_LEASE = 60.0  # seconds until a claim ends unless renewed
_RENEWAL_INTERVAL = 15.0
_POLL = 0.5  # seconds between checks of another process's claim


class Jobs:
    """The claims of one process; all processes of a hub share the table."""

    def __init__(self, database: HubDatabase) -> None:
        self._database = database
        self._owner = secrets.token_hex(8)

    @asynccontextmanager
    async def claim(self, job: str) -> AsyncIterator[None]:
        """Wait until no other process does a job, and claim it for the block, which must check what is already done."""
        while not await asyncio.to_thread(self._claim, job):
            await asyncio.sleep(_POLL)
        renewal = asyncio.create_task(self._renew(job))
        try:
            yield
        finally:
            renewal.cancel()
            # Shielded: a canceled request must still release its claim, or others wait for the lease to end.
            await asyncio.shield(asyncio.to_thread(self._release, job))

    def _claim(self, job: str) -> bool:
        now = time.time()
        sql = (
            "INSERT INTO jobs (job, owner, until) VALUES (?, ?, ?)"
            " ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, until = excluded.until WHERE jobs.until < ?"
        )
        return bool(self._database.execute(sql, job, self._owner, now + _LEASE, now))

    async def _renew(self, job: str) -> None:
        while True:
            await asyncio.sleep(_RENEWAL_INTERVAL)
            with contextlib.suppress(AdapterhubError):  # the database may be back before the lease ends
                await asyncio.to_thread(self._extend, job)

    def _extend(self, job: str) -> None:
        sql = "UPDATE jobs SET until = ? WHERE job = ? AND owner = ?"
        self._database.execute(sql, time.time() + _LEASE, job, self._owner)

    def _release(self, job: str) -> None:
        self._database.execute("DELETE FROM jobs WHERE job = ? AND owner = ?", job, self._owner)
