"""Sessions of uploads when several requests come for one, and what is kept of those that nobody uses."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from adapterhub.hub.accounts import accounts
from adapterhub.hub.hub import Hub
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.uploads import LEASE_SECONDS, USABLE_SECONDS, BusyError, UploadLeases
from adapterhub.maintenance.gc import gc
from adapterhub_converters.errors import NotFoundError, RefusedError


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Hub]:
    """An open hub, without a server."""
    with closing(Hub(HubSettings(registry=tmp_path / "hub"))) as hub:
        yield hub


async def body(data: bytes, wait: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    yield data[:1]
    if wait:
        await wait.wait()
    yield data[1:]


def test_a_session_takes_one_request_at_a_time(opened: Hub) -> None:
    async def run() -> None:
        uploads, rest_may_come = opened.uploads, asyncio.Event()
        upload = await uploads.begin("team/sql")
        first = asyncio.ensure_future(uploads.append(upload, body(b"abc", rest_may_come)))
        await asyncio.sleep(0)
        for operation in (
            uploads.append(upload, body(b"x")),
            uploads.finish(upload, "sha256:" + "0" * 64),
            uploads.cancel(upload),
        ):
            with pytest.raises(BusyError):
                await operation
        rest_may_come.set()
        await first
        assert await uploads.finish(upload, "sha256:" + hashlib.sha256(b"abc").hexdigest())

    asyncio.run(run())


def test_a_session_that_was_ended_takes_nothing_more(opened: Hub) -> None:
    async def run() -> None:
        uploads = opened.uploads
        for end in (uploads.cancel, lambda upload: uploads.finish(upload, "sha256:" + hashlib.sha256(b"").hexdigest())):
            upload = await uploads.begin("team/sql")
            await end(upload)
            for operation in (
                uploads.append(upload, body(b"x")),
                uploads.finish(upload, "sha256:" + "0" * 64),
                uploads.cancel(upload),
            ):
                with pytest.raises(NotFoundError):
                    await operation

    asyncio.run(run())


def test_a_file_that_is_sent_twice_at_a_time_counts_twice(opened: Hub) -> None:
    accounts.set_namespace(opened.database, accounts.Namespace("team", max_bytes=2000))
    digest = "sha256:" + hashlib.sha256(bytes(800)).hexdigest()

    async def run() -> None:
        events = [asyncio.Event(), asyncio.Event()]
        first, second = (
            asyncio.ensure_future(opened.uploads.receive("team/sql", body(bytes(800), event), digest, 800)) for event in events
        )
        while opened.uploads.count < 2:
            await asyncio.sleep(0.01)
        other_upload = await opened.uploads.begin("team/other")
        with pytest.raises(RefusedError, match="1,600 of them in uploads that are open"):
            await opened.uploads.append(other_upload, body(bytes(600)), 600)
        second.cancel()
        with suppress(asyncio.CancelledError):  # codespell:ignore
            await second
        with pytest.raises(RefusedError, match="800 of them in uploads that are open"):
            await opened.uploads.append(other_upload, body(bytes(1300)), 1300)
        events[0].set()
        await first

    asyncio.run(run())


def uploaded(hub: Hub, data: bytes) -> str:
    """The digest of a file that was uploaded for team/sql."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    asyncio.run(hub.uploads.receive("team/sql", body(data), digest))
    hub.uploaded.record("team/sql", [digest])
    return digest


def test_an_upload_that_nobody_uses_is_held_for_its_time_and_no_longer(opened: Hub) -> None:
    now = 0.0
    opened.upload_leases.close()
    opened.upload_leases = UploadLeases(opened.store, clock=lambda: now)

    def collected() -> None:
        opened.upload_leases.rotate()
        with opened.storage.registry() as registry:
            gc(registry, grace=0)

    first = uploaded(opened, b"first")
    now = LEASE_SECONDS - 1
    last = uploaded(opened, b"last, of the first lease")
    for moment in (LEASE_SECONDS, 2 * LEASE_SECONDS - 1):
        now = moment
        collected()
        assert [opened.store.has_blob(digest, size) for digest, size in ((first, 5), (last, 24))] == [True, True]
    again = uploaded(opened, b"first")  # it was here: held anew
    assert again == first
    now = 2 * LEASE_SECONDS
    collected()
    assert opened.store.size(last) is None
    assert opened.store.size(first)
    now = 4 * LEASE_SECONDS
    for _ in range(2):
        collected()
        now += LEASE_SECONDS
    assert opened.store.size(first) is None


def test_what_a_killed_process_left_is_removed_while_a_hub_runs(opened: Hub) -> None:
    root = opened.store.root
    old, new = (root / "tmp" / f"{name}.upload" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    opened._maintain(opened.workers.worker())
    assert [path for path in (old, new) if path.exists()] == [new]
    assert len(list((root / "leases").iterdir())) == 1  # the hub's own


def test_an_upload_can_be_used_for_a_day_and_is_held_for_longer(opened: Hub) -> None:
    digest = uploaded(opened, b"a file")
    worker = opened.workers.worker()
    assert opened.blob_size(worker, None, "team/sql", digest) == 6
    opened.database.execute("UPDATE uploaded SET time = time - ?", USABLE_SECONDS)
    assert opened.blob_size(worker, None, "team/sql", digest) is None
    assert opened.uploaded.repositories(digest) == []
    assert LEASE_SECONDS > USABLE_SECONDS
    opened._maintain(worker)  # it counts until a gc has removed it
    assert opened.database.select("SELECT digest FROM uploaded") == [(digest,)]
    opened.store.blob_path(digest).unlink()
    opened._maintain(worker)
    assert opened.database.select("SELECT digest FROM uploaded") == []
