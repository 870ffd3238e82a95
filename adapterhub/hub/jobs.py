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
RENEWAL_INTERVAL = 15.0
"""Seconds after which a claim is renewed."""
_POLL = 0.5  # seconds between checks of another process's claim


class Jobs:
    """The claims of one process; all processes of a hub share the table.

    Attributes:
        identity: Identifies this process among them.
    """

    def __init__(self, database: HubDatabase) -> None:
        self._database = database
        self.identity = secrets.token_hex(8)

    @asynccontextmanager
    async def claim(self, job: str) -> AsyncIterator[None]:
        """Wait until no other process does a job, and claim it for the block, which must check what is already done."""
        while not await asyncio.to_thread(self.try_claim, job):
            await asyncio.sleep(_POLL)
        renewal = asyncio.create_task(self._renew(job))
        try:
            yield
        finally:
            renewal.cancel()
            # Shielded: a canceled request must still release its claim, or others wait for the lease to end.
            await asyncio.shield(asyncio.to_thread(self.release, job))

    def try_claim(self, job: str, seconds: float = _LEASE) -> bool:
        """Claim a job for a minute, or for so many seconds, if no other claim of it lasts; return whether it is claimed."""
        now = time.time()
        sql = (
            "INSERT INTO jobs (job, owner, until) VALUES (?, ?, ?)"
            " ON CONFLICT (job) DO UPDATE SET owner = excluded.owner, until = excluded.until WHERE jobs.until < ?"
        )
        return bool(self._database.execute(sql, job, self.identity, now + seconds, now))

    async def _renew(self, job: str) -> None:
        while True:
            await asyncio.sleep(RENEWAL_INTERVAL)
            with contextlib.suppress(AdapterhubError):  # the database may be back before the lease ends
                await asyncio.to_thread(self.extend, job)

    def owner(self, job: str) -> str:
        """Return the identity of the process that does a job; empty if none does."""
        rows = self._database.select("SELECT owner FROM jobs WHERE job = ? AND until >= ?", job, time.time())
        return rows[0][0] if rows else ""

    def extend(self, job: str) -> None:
        """Extend a claim of this process to a minute from now."""
        sql = "UPDATE jobs SET until = ? WHERE job = ? AND owner = ?"
        self._database.execute(sql, time.time() + _LEASE, job, self.identity)

    def release(self, job: str) -> None:
        """End a claim of this process."""
        self._database.execute("DELETE FROM jobs WHERE job = ? AND owner = ?", job, self.identity)
