"""Threads that work on the registry, each with its own connection to the index; the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from adapterhub.digest import Digest
from adapterhub.index.queries import Name, Row
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.registry.registry import Registry
from adapterhub.registry.repositories import Repositories
from adapterhub.store.store import Entry

from . import asking
from .database import HubDatabase
from .remembered import Remembered
from .storage.folder import Storage

P = ParamSpec("P")
T = TypeVar("T")


_ANSWERS = 16 << 20  # bytes of answers that are held in memory
_MANIFESTS, _CONFIGS = 2_000, 100_000  # that are held in memory: documents of some 20 kB, and digests of configs
MOST_FILES = 200
"""Files of a version or a commit that is held in memory: one of 10,000 takes 5 MB, and a tenant may have thousands."""


Answers = Remembered[tuple[bytes, str]]


def _size(answer: tuple[bytes, str]) -> int:
    return len(answer[0])


@dataclass(frozen=True)
class Worker:
    """What one thread works with; the manifests that were read are shared by all.

    Attributes:
        configs: The digest of a manifest to that of its config.
        database: The tables of the hub.
        views: What `commits.view` knows of repositories: name to the state of its log, and to the view.
        answers: Bodies of answers about repositories, each under a state (`View.head`) and what was asked, with the path
            after which there is more; empty for all.
    """

    registry: Registry
    repositories: Repositories
    manifests: dict[Digest, Manifest]
    configs: dict[Digest, Digest]
    database: HubDatabase
    views: dict[str, tuple[Name, Any]] = field(default_factory=dict)
    answers: Answers = field(default_factory=lambda: Remembered(_ANSWERS, _size))

    def manifest(self, row: Row) -> Manifest:
        """The OCI manifest of a version."""
        found = self.manifests.get(row.digest)
        if found is None:
            found = oci_manifest.parse(self.registry.store.read_document(row.digest), str(row.ref))
            if len(self.manifests) >= _MANIFESTS:
                self.manifests.clear()
            if len(found.layers) <= MOST_FILES:
                self.manifests[row.digest] = found
        return found

    def config(self, manifest: Digest) -> Digest:
        """The digest of the config of a version, by that of its manifest."""
        found = self.configs.get(manifest)
        if found is None:
            found = oci_manifest.parse(self.registry.store.read_document(manifest), manifest).config.digest
            if len(self.configs) >= _CONFIGS:
                self.configs.clear()
            self.configs[manifest] = found
        return found


class Workers:
    """A pool of threads with a registry each, and one for bodies, whose reads and writes may take long.

    `moved` is called with each entry of a log that they write.
    """

    def __init__(self, storage: Storage, count: int = 8, *, moved: Callable[[Entry], object] | None = None) -> None:
        self._storage, self._moved = storage, moved
        self._local = threading.local()
        self._manifests: dict[Digest, Manifest] = {}
        self._configs: dict[Digest, Digest] = {}
        self._answers: Answers = Remembered(_ANSWERS, _size)
        self._pool = ThreadPoolExecutor(count, "hub")
        self._bodies = ThreadPoolExecutor(count, "hub-body")

    async def run(self, work: Callable[Concatenate[Worker, P], T], /, *args: P.args, **more: P.kwargs) -> T:
        """Call `work` with a registry in a thread; what it moves is moved by the account that asks."""
        return await self._call(self._pool, lambda: work(self.worker(), *args, **more))

    async def read(self, work: Callable[P, T], /, *args: P.args, **more: P.kwargs) -> T:
        """Call `work`, which reads or writes bytes, in a thread."""
        return await self._call(self._bodies, lambda: work(*args, **more))

    async def _call(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, work)

    def worker(self) -> Worker:
        """What the thread that calls this works with; it moves as the account that asks."""
        worker: Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            registry = self._storage.registry()
            registry.ledger.moved = self._moved
            worker = self._local.worker = Worker(
                registry, Repositories(registry), self._manifests, self._configs, self._storage.database, answers=self._answers
            )
        self._storage.refresh(worker.registry)
        worker.registry.author = asking.now().account
        return worker

    def close(self) -> None:
        """Wait for the work that has begun, and close the registries."""
        self._bodies.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)
