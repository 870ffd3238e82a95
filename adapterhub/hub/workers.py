"""Threads that work on the registry, each with its own connection to the index; the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import field
from typing import Any, Concatenate, ParamSpec, TypeVar

from adapterhub.digest import Digest
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.registry.ledger import StartOverError
from adapterhub.registry.registry import Registry
from adapterhub.registry.rehearsal import rehearsal
from adapterhub.registry.repository_records import ParsedRepository, Repositories
from adapterhub.store.store import Entry
from adapterhub_converters.lazy_dataclass import dataclass

from . import request_context
from .hub_database import HubDatabase
from .lru_cache import LRUCache
from .storage.folder_storage import Storage

P = ParamSpec("P")
T = TypeVar("T")


_MAX_ANSWER_BYTES, _MAX_REPOSITORY_BYTES = 16 << 20, 32 << 20
_MAX_DOCUMENT_BYTES, _MAX_ROW_BYTES = 32 << 20, 16 << 20  # of manifests, likewise of commits; of rows, likewise of configs


Answers = LRUCache[tuple[bytes, str]]


def _answer_size(answer: tuple[bytes, str]) -> int:
    return len(answer[0])


def _parsed_size(parsed: ParsedRepository) -> int:
    return 1500 + 4 * parsed.size  # about what Python's objects take


@dataclass(frozen=True)
class WorkerCaches:
    """What all threads remember of the registry, in bounded memory.

    Attributes:
        manifests: Manifests of versions, by digest.
        configs: Digest of a manifest to the digest of its config.
        repositories: Documents of repositories, by digest.
        rows: The versions `latest`, by the state of a repository (`View.head`).
        commits: Commits, by the state of a repository and by revision.
        answers: Response bodies about repositories, by state and request, each with the path after which there is more; empty
            if the body has everything.
    """

    manifests: LRUCache[Manifest] = field(default_factory=lambda: LRUCache(_MAX_DOCUMENT_BYTES))
    configs: LRUCache[Digest] = field(default_factory=lambda: LRUCache(_MAX_ROW_BYTES))
    repositories: LRUCache[ParsedRepository] = field(default_factory=lambda: LRUCache(_MAX_REPOSITORY_BYTES, _parsed_size))
    rows: LRUCache[VersionRow] = field(default_factory=lambda: LRUCache(_MAX_ROW_BYTES))
    commits: LRUCache[Any] = field(default_factory=lambda: LRUCache(_MAX_DOCUMENT_BYTES))
    answers: Answers = field(default_factory=lambda: LRUCache(_MAX_ANSWER_BYTES, _answer_size))


@dataclass(frozen=True)
class Worker:
    """What one thread works with.

    Attributes:
        database: The tables of the hub.
        caches: What it shares with the other threads.
    """

    registry: Registry
    repositories: Repositories
    database: HubDatabase
    caches: WorkerCaches = field(default_factory=WorkerCaches)

    def manifest(self, row: VersionRow) -> Manifest:
        """Return the OCI manifest of a version."""
        read = self.registry.store.read_document
        return self.caches.manifests.get(row.digest, lambda: oci_manifest.parse(read(row.digest), str(row.ref)))

    def config(self, manifest: Digest) -> Digest:
        """Return the digest of a version's config, given the digest of its manifest."""
        read = self.registry.store.read_document
        return self.caches.configs.get(manifest, lambda: oci_manifest.parse(read(manifest), manifest).config.digest)

    def remembered(self, cache: LRUCache[T], key: Hashable, make: Callable[[], T]) -> T:
        """Return what is true of a state of a repository, from a cache; in a rehearsal, whose states do not stay, made anew."""
        return make() if request_context.current().is_rehearsal else cache.get(key, make)


class Workers:
    """A pool of threads with a registry each, and a second pool for bodies, whose reads and writes may take long.

    Attributes:
        caches: What the threads remember, which may be that of other workers too.
        check_record: Called before a document is written for a repository, with its bytes; RefusedError if there is no room.
        on_open: Called with each worker when its registry has been opened.
    """

    def __init__(
        self,
        storage: Storage,
        count: int = 8,
        *,
        on_move: Callable[[Entry], object] | None = None,
        caches: WorkerCaches | None = None,
    ) -> None:
        self._storage, self._on_move = storage, on_move
        self.check_record: Callable[[Worker, str, int], object] = lambda _worker, _name, _size: None
        self.on_open: Callable[[Worker], object] = lambda _worker: None
        self._local = threading.local()
        self.caches = caches or WorkerCaches()
        self._pool = ThreadPoolExecutor(count, "hub")
        # Slow disks and clients use up these threads, and leave the others to quick lookups.
        self._bodies = ThreadPoolExecutor(count, "hub-body")

    async def run(self, work: Callable[Concatenate[Worker, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` with a worker in a thread; its moves are recorded as made by the request's account.

        Raises:
            BodyError: The request has used up its time.
        """
        meter = request_context.current().work
        return await self._call(self._pool, meter.with_timer(lambda: work(self.worker(), *args, **kwargs)))

    async def rehearse(self, work: Callable[Concatenate[Worker, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work` as `run` does, with the same result and the same errors, and undo everything that it has changed."""
        request_context.current().is_rehearsal = True

        def rehearsed_work(worker: Worker) -> T:
            while True:
                try:
                    # The lock of the index first, as in every change that looks into the tables.
                    with (
                        rehearsal(worker.registry, can_start_over=True),
                        worker.repositories.rehearsal(),
                        worker.database.rehearsal(),
                    ):
                        return work(worker, *args, **kwargs)
                except StartOverError as interruption:
                    interruption.prepare()

        return await self.run(rehearsed_work)

    async def read(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `work`, which reads or writes bytes, in a thread of the second pool."""
        return await self._call(self._bodies, lambda: work(*args, **kwargs))

    async def look_up(self, work: Callable[[], T]) -> T:
        """Call `work`, which asks for a row of the hub's database, in a thread of those for lookups."""
        return await self._call(self._pool, work)

    async def _call(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        # The copied context carries `request_context` into the thread.
        return await asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, work)

    def worker(self) -> Worker:
        """Return the worker of the calling thread, with the request's account as the author of its moves."""
        # SQLite connections belong to one thread, so each thread opens its own registry.
        worker: Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            registry = self._storage.registry()
            registry.ledger.on_commit = self._on_move
            # Not `self.worker()`: a change holds the lock of the index, for which a thread that refreshes it may be waiting.
            repositories = Repositories(
                registry,
                lambda name, size: self.check_record(self._local.worker, name, size),
                parsed=self.caches.repositories.get,
            )
            worker = self._local.worker = Worker(registry, repositories, self._storage.database, self.caches)
            self.on_open(worker)
        self._storage.refresh(worker.registry)
        worker.registry.author = request_context.current().account
        return worker

    def waiting(self) -> dict[str, int]:
        """Return how much work waits for a thread of each pool."""
        return {"requests": self._pool._work_queue.qsize(), "bodies": self._bodies._work_queue.qsize()}

    def close(self) -> None:
        """Wait for running work, and close the registries."""
        self._bodies.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)
