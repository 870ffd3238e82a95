"""The garbage collection of a running hub: a command of its own, now and then, at low priority.

It packs too where the registry asks for it. A process of its own takes no time from requests, and loses nothing when it is
killed. All processes of a hub share the table of jobs, so that one of them starts it, once in each period.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path

from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError

from .jobs import Jobs
from .settings import GarbageCollection

_log = logging.getLogger("adapterhub.hub")
_JOB = "gc"
_LOOK_SECONDS = 60.0  # between two looks at the table
_NICENESS = 10
_MAX_LOGGED = 500  # characters of its output


async def collect_now_and_then(collection: GarbageCollection, jobs: Jobs, folder: Path) -> None:
    """Run the command of a collection in `folder` once in each period, until canceled."""
    while True:
        with suppress(AdapterhubError):  # the database may be back later
            if await asyncio.to_thread(jobs.try_claim, _JOB, collection.every):
                await _run(collection, folder)
        await asyncio.sleep(min(_LOOK_SECONDS, collection.every))


async def _run(collection: GarbageCollection, folder: Path) -> None:
    """Run the command at low priority, and log what it prints."""
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(
            *collection.command, cwd=folder, env=collection.environ, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
        )
    except OSError as error:
        _log.warning("no garbage is collected: %s", error)
        return
    if hasattr(os, "setpriority"):
        with suppress(OSError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:  # codespell:ignore
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        raise
    text = printable(" ".join((errors if process.returncode else output).decode(errors="replace").split()))[:_MAX_LOGGED]
    if process.returncode:
        _log.warning("a garbage collection ended with %d: %s", process.returncode, text)
    else:
        _log.info("garbage collection: %s", text)
