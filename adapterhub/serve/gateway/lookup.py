"""Which version a ref names now.

The registry is asked for each request, so that a moved tag counts from the next one on. A remote is asked again after some
seconds at most, and what it said last counts while it is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from adapterhub.digest import Digest
from adapterhub.ref import LATEST, Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes import configured, location
from adapterhub.remotes.location import Place
from adapterhub.remotes.protocol import Connected
from adapterhub.serve import resolving
from adapterhub.serve.names import Allowed, is_whole
from adapterhub.workspace import Workspace
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RemoteError, UsageError

T = TypeVar("T")
log = logging.getLogger("adapterhub.serve.lookup")
_LISTED = 1000  # names
_REMEMBERED = 1024  # refs that were looked up at a remote
_AT_ONCE = 4  # requests to a remote
_PATIENCE, _FIRST_PATIENCE = 1.0, 30.0  # seconds that a request waits for a remote: with an older answer, and without one


@dataclass(frozen=True, slots=True)
class Found:
    """A version that a ref named when it was looked up."""

    name: str
    digest: Digest

    @property
    def model(self) -> str:
        """As `Served.model`."""
        return f"{self.name}@{self.digest}"


class Lookup(Protocol):
    """Where refs are looked up.

    Attributes:
        is_up: Whether it answered when it was asked last.
    """

    is_up: bool

    async def check(self) -> None:
        """Ask it for nothing; AdapterhubError if it does not answer."""

    async def find(self, ref: Ref) -> Found:
        """Return the version that a ref names; NotFoundError if there is none."""

    async def listed(self, allowed: Allowed) -> list[tuple[str, Found]]:
        """The refs that may be asked for, up to a thousand names."""

    def address(self, version: Found) -> str:
        """What a version is resolved by."""

    def close(self) -> None:
        """Close what it has opened."""


class RegistryLookup:
    """See `Lookup`: the registry of a workspace, open in a thread of its own. After a failure it is opened again."""

    def __init__(self, workspace: Workspace) -> None:
        self.is_up = True
        self._workspace = workspace
        self._registry: Registry | None = None
        self._thread = ThreadPoolExecutor(1, "lookup")

    async def check(self) -> None:
        """Open the registry; AdapterhubError if it cannot be."""
        await self._call(lambda _registry: None)

    def address(self, version: Found) -> str:
        """Its name with its digest."""
        return version.model

    async def find(self, ref: Ref) -> Found:
        """Return the version; NotFoundError if there is none."""

        def work(registry: Registry) -> Found:
            if registry.ledger.current(ref.name).seq == 0:  # before it is compared with all names, for a hint to nobody
                raise NotFoundError(str(ref), "no such adapter")
            row = registry.row(ref)
            return Found(row.name, row.digest)

        return await self._call(work)

    async def listed(self, allowed: Allowed) -> list[tuple[str, Found]]:
        """Names and their tags, up to a thousand names."""

        def work(registry: Registry) -> list[tuple[str, Found]]:
            refs: list[tuple[str, Found]] = []
            names: set[str] = set()
            for row in registry.list():
                if row.name not in allowed or (row.name not in names and len(names) >= _LISTED):
                    continue
                names.add(row.name)
                found = Found(row.name, row.digest)  # a bare name means its tag `latest`, and is listed in its place
                refs += [(row.name if tag == LATEST else f"{row.name}:{tag}", found) for tag in row.tags]
            return refs

        return await self._call(work)

    def close(self) -> None:
        """Close the registry."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    async def _call(self, work: Callable[[Registry], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def _run(self, work: Callable[[Registry], T]) -> T:
        try:
            if self._registry is None:
                self._registry = Registry.open(self._workspace.folder())
        except Exception:
            self.is_up = False
            raise
        try:
            found = work(self._registry)
        except (NotFoundError, UsageError):
            self.is_up = True
            raise
        except Exception:
            self.is_up = False
            self._close()
            raise
        self.is_up = True
        return found

    def _close(self) -> None:
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.close()


@dataclass(slots=True)
class _Known:
    """What a remote said of a ref: a version, or an error, when it was asked; `asking` while it is."""

    version: Found | None = None
    error: AdapterhubError | None = None
    when: float = float("-inf")
    asking: asyncio.Task[None] | None = None


class RemoteLookup:
    """See `Lookup`: a remote, asked for each ref at most once in a while.

    Args:
        workspace: Its credentials, proxy and so on.
        url: As `remotes.configured.below` takes it.
        poll: Seconds that an answer counts, also that there is no such version.
    """

    def __init__(self, workspace: Workspace, url: str, poll: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_up = True
        self._workspace, self._url, self._poll, self._clock = workspace, url, poll, clock
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._threads = ThreadPoolExecutor(_AT_ONCE, "lookup")
        self._open: set[Connected] = set()

    async def check(self) -> None:
        """Nothing: what is asked for first tells."""

    def address(self, version: Found) -> str:
        """Its address there."""
        return configured.below(self._url, version.model)

    async def find(self, ref: Ref) -> Found:
        """Return the version that the remote named last; where it does not answer, RemoteError for a ref that it never did."""
        known = self._known.setdefault(str(ref), _Known())
        self._known.move_to_end(str(ref))
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        is_fixed = known.version is not None and is_whole(ref.digest)
        if known.asking is None and not is_fixed and self._clock() - known.when >= self._poll:
            known.asking = asyncio.create_task(self._ask(ref, known))
        if known.asking is not None:
            _, late = await asyncio.wait([known.asking], timeout=_PATIENCE if known.version else _FIRST_PATIENCE)
            if late:
                self._tell(RemoteError(self._url, "does not answer in time"))
        if known.version is not None:
            return known.version
        if known.error is not None:
            raise known.error.with_traceback(None)  # which would grow each time
        raise RemoteError(str(ref), f"{self._url} does not answer in time", "Ask again")

    async def _ask(self, ref: Ref, known: _Known) -> None:
        try:
            digest, was_asked = await asyncio.get_running_loop().run_in_executor(self._threads, self._digest, ref)
        except (NotFoundError, UsageError) as error:  # an answer
            known.version, known.error = None, error
            self._tell(None)
        except AdapterhubError as error:
            known.error = error
            self._tell(error)
        else:
            known.version, known.error = Found(ref.name, digest), None
            if was_asked:
                self._tell(None)
        finally:
            known.when, known.asking = self._clock(), None

    def _digest(self, ref: Ref) -> tuple[Digest, bool]:
        """The digest of the version, and whether the remote was asked for it."""
        opened: list[Connected] = []

        @contextmanager
        def connect(place: Place) -> Iterator[Connected]:
            with self._workspace.connect(place) as remote:
                opened.append(remote)
                self._open.add(remote)
                try:
                    yield remote
                finally:
                    self._open.discard(remote)

        place = location.parse(configured.below(self._url, str(ref)))
        resolving.check_name(ref, place, self._workspace)
        return resolving.digest_at(place, self._workspace, connect), bool(opened)

    def _tell(self, error: AdapterhubError | None) -> None:
        """Log that the remote is away, or back, once."""
        if error is not None and self.is_up:
            log.warning("%s; what is known of its tags stays", error)
        elif error is None and not self.is_up:
            log.info("%s answers again", self._url)
        self.is_up = error is None

    async def listed(self, allowed: Allowed) -> list[tuple[str, Found]]:
        """What was asked for and is there: few remotes list names."""
        found = [(ref, known.version) for ref, known in self._known.items() if known.version]
        return sorted((ref, version) for ref, version in found if version.name in allowed)[:_LISTED]

    def close(self) -> None:
        """Wait for nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for remote in [*self._open]:
            remote.stop()
