"""What several processes keep of the upstream for each other: one download, one copy, one limit. The bucket is a folder."""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from adapterhub.hub.git_objects import GitFile
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.jobs import Jobs
from adapterhub.hub.settings import ModelUpstream
from adapterhub.hub.storage.shared_storage import open_bucket
from adapterhub.hub.upstream import fills, shared_documents, shared_files
from adapterhub.hub.upstream.cached_files import CachedFiles, key_of
from adapterhub.hub.upstream.fills import Fills
from adapterhub.hub.upstream.model_client import ModelClient
from adapterhub.hub.upstream.shared_documents import SharedDocuments
from adapterhub.hub.upstream.shared_files import SharedFiles
from adapterhub_converters.errors import AdapterhubError, IntegrityError, RemoteError
from tests.conftest import need_module
from tests.hub.upstream.faulty import NAME, PATH, Faulty, faulty_hub

DATA = random.Random(1).randbytes(2_000_000)
FILE = GitFile(PATH, "", len(DATA), "", hashlib.sha256(DATA).hexdigest())
KEY = key_of(FILE)
Open = Callable[..., SharedFiles]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens what is shared, as one more process does."""
    need_module("obstore")
    with ExitStack() as stack:

        def opened(max_bytes: int = 10**9) -> SharedFiles:
            (tmp_path / "hub").mkdir(exist_ok=True)
            database = stack.enter_context(closing(HubDatabase(tmp_path / "hub")))
            bucket = stack.enter_context(closing(open_bucket(f"file://{tmp_path}/bucket", {})))
            bucket.create_folder()
            return SharedFiles(bucket, database, max_bytes)

        yield opened


@pytest.fixture
def upstream() -> Iterator[Faulty]:
    """A hub with a file of 2 MB."""
    with faulty_hub(DATA) as hub:
        yield hub


async def ended(fill: fills.Fill) -> fills.Fill:
    """A download, once it has ended."""
    await fill.wait_beyond(fill.file.size)
    return fill


def store_file(shared: SharedFiles, folder: Path, data: bytes) -> str:
    """Keep a file of these bytes; its key."""
    path = folder / "file"
    path.write_bytes(data)
    key = f"sha256-{hashlib.sha256(data).hexdigest()}-{len(data)}"
    with path.open("rb") as file:
        assert shared.keep(key, file, len(data))
    return key


class Process:
    """The downloads of one process, into a folder of its own."""

    def __init__(self, folder: Path, url: str, shared: SharedFiles) -> None:
        self.client = ModelClient.of(ModelUpstream(url, "cache"))
        self.cached = CachedFiles(folder, 10**9)
        self.fills, self.url = Fills(self.client, self.cached, shared), f"{url}/{NAME}/resolve/main/{PATH}"

    def start(self) -> fills.Fill:
        """Start the download of the file."""
        return self.fills.start(FILE, self.url, PATH)

    def content(self) -> bytes | None:
        """The file, as it is kept in the folder."""
        if (file := self.cached.open_whole(KEY)) is None:
            return None
        with file:
            return file.read()

    def close(self) -> None:
        """End."""
        self.client.stop()
        self.fills.close()
        self.client.close()


@pytest.fixture
def processes(tmp_path: Path, upstream: Faulty, opened: Open) -> Iterator[list[Process]]:
    """Two processes of a hub."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Process(tmp_path / name, upstream.url, opened()))) for name in ("one", "other")]


def test_a_file_is_received_once_by_all_processes_while_it_arrives(
    processes: list[Process], upstream: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fills, shared_files):
        monkeypatch.setattr(module, "PIECE_SIZE", 100_000)
    monkeypatch.setattr(shared_files, "_CHECK_INTERVAL", 0.0)
    monkeypatch.setattr(fills, "_FOLLOW_SECONDS", 0.01)
    upstream.slow_after = 1_500_000

    async def run_both() -> None:
        first = processes[0].start()
        await first.wait_beyond(0)
        second = processes[1].start()
        # It begins before the file is whole anywhere: the first process shares pieces once it receives more.
        upstream.slow_after = None
        upstream.go.set()
        for fill in (await ended(first), await ended(second)):
            assert fill.error is None

    asyncio.run(run_both())
    assert [process.content() == DATA for process in processes] == [True, True]
    assert upstream.downloads == [""]
    assert [process.fills.received_bytes for process in processes] == [len(DATA), 0]


def test_a_process_that_waits_has_the_pieces_before_the_file_is_whole(
    processes: list[Process], upstream: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(HubDatabase(tmp_path / "hub"))
    for module in (fills, shared_files):
        monkeypatch.setattr(module, "PIECE_SIZE", 100_000)
    monkeypatch.setattr(shared_files, "_CHECK_INTERVAL", 0.0)
    monkeypatch.setattr(fills, "_FOLLOW_SECONDS", 0.01)
    upstream.slow_after = 0

    async def run_both() -> None:
        first = processes[0].start()
        while not jobs.owner(f"upstream {KEY}"):
            await asyncio.sleep(0.01)
        second = processes[1].start()
        while not jobs.owner(f"upstream-wanted {KEY}"):
            await asyncio.sleep(0.01)
        upstream.slow_after = 1_500_000
        upstream.go.set()
        upstream.go.clear()
        await second.wait_beyond(1_000_000)
        assert not first.is_whole
        upstream.slow_after = None
        upstream.go.set()
        assert [(await ended(fill)).error for fill in (first, second)] == [None, None]

    asyncio.run(run_both())
    assert processes[1].content() == DATA
    assert processes[1].fills.received_bytes == 0


def test_what_one_process_has_received_another_has_without_the_upstream(processes: list[Process], upstream: Faulty) -> None:
    async def receive(process: Process) -> AdapterhubError | None:
        return (await ended(process.start())).error

    assert asyncio.run(receive(processes[0])) is None
    upstream.refuses = 500
    assert asyncio.run(receive(processes[1])) is None
    assert processes[1].content() == DATA


def test_a_process_takes_over_from_one_that_has_given_up(processes: list[Process], upstream: Faulty) -> None:
    async def run_both() -> list[AdapterhubError | None]:
        upstream.sent = DATA[:-1] + b"?"
        failed = await ended(processes[0].start())
        upstream.sent = None
        return [failed.error, (await ended(processes[1].start())).error]

    failed, error = asyncio.run(run_both())
    assert isinstance(failed, IntegrityError)
    assert (error, processes[0].content(), processes[1].content()) == (None, None, DATA)


def test_pieces_are_gone_once_the_file_is_whole(
    processes: list[Process], upstream: Faulty, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_files, "PIECE_SIZE", 100_000)
    opened().read_piece(KEY, 0)  # another process waits for it

    async def receive() -> None:
        assert (await ended(processes[0].start())).error is None

    asyncio.run(receive())
    files = {path.relative_to(tmp_path / "bucket").as_posix() for path in (tmp_path / "bucket").rglob("*") if path.is_file()}
    assert files == {f"upstream/files/{KEY}"}


def test_what_was_used_least_recently_makes_room_unless_it_was_used_just_now(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = opened(max_bytes=2500)
    first, second = (store_file(shared, tmp_path, bytes([number]) * 1000) for number in (1, 2))
    path = tmp_path / "file"
    path.write_bytes(b"3" * 1000)
    with path.open("rb") as file:
        assert not shared.keep("sha256-3", file, 1000)  # both may be on their way to a client
        monkeypatch.setattr(shared_files, "_SPARED_SECONDS", 0.0)
        monkeypatch.setattr(shared_files, "_USE_INTERVAL", 0.0)
        time.sleep(0.01)
        assert shared.size(first) == 1000  # a use
        assert opened(max_bytes=2500).keep("sha256-3", file, 1000)
    assert [shared.size(key) for key in (first, second, "sha256-3")] == [1000, None, 1000]
    assert not (tmp_path / "bucket/upstream/files" / second).exists()
    assert shared.total() == 2000


def test_a_file_that_the_bucket_has_lost_is_forgotten(tmp_path: Path, opened: Open) -> None:
    shared = opened()
    key = store_file(shared, tmp_path, b"x" * 10)
    (tmp_path / "bucket/upstream/files" / key).unlink()
    with pytest.raises(RemoteError, match="it was removed to make room"):
        shared.open(key)
    assert shared.size(key) is None


def test_documents_are_those_of_all_processes(tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    first_documents, second_documents = (SharedDocuments(tmp_path / name, 10**6, opened()) for name in ("one", "other"))
    first_documents.write_document("revision", b"first")
    document, written_at = second_documents.read_document("revision") or (b"", 0.0)
    assert (document, abs(time.time() - written_at) < 60) == (b"first", True)
    second_documents.write_document("revision", b"second")
    assert (first_documents.read_document("revision") or (b"",))[0] == b"second"
    second_documents.write_document("revision", b"third")
    assert (first_documents.read_document("revision") or (b"",))[0] == b"second"  # it has looked a moment ago
    monkeypatch.setattr(shared_documents, "_CHECK_SECONDS", 0.0)
    assert (first_documents.read_document("revision") or (b"",))[0] == b"third"
    assert first_documents.read_document("nothing") is None


def test_every_process_lists_the_models_that_any_has_asked_for(tmp_path: Path, opened: Open) -> None:
    first_documents, second_documents = (SharedDocuments(tmp_path / name, 10**6, opened()) for name in ("one", "other"))
    for revision in ("main", "refs/pr/1"):
        first_documents.write_document(f"revision org/x y@{revision}", b"{}")
    first_documents.write_document(f"revision {'x' * 600}@main", b"{}")  # too long for a key
    first_documents.write_document("model org/x@1", b"{}")
    assert sorted(second_documents.revisions(10)) == [("org/x y", "main"), ("org/x y", "refs/pr/1")]
    assert len(second_documents.revisions(1)) == 1
