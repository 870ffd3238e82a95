"""The lookup of the version that a ref names now.

The registry is asked for each request, so that a moved tag counts from the next request on. A remote is asked again after
`poll` seconds, and its last answer is used while it does not respond.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import field
from typing import Protocol, TypeVar

from adapterhub.digest import Digest
from adapterhub.http.http_errors import DeniedError
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import LATEST, Ref
from adapterhub.registry import withdrawals
from adapterhub.registry.registry import Registry
from adapterhub.remotes import named_remotes, remote_address
from adapterhub.remotes.address_schemes import is_layout
from adapterhub.remotes.protocol import OpenRemote
from adapterhub.remotes.remote_address import RemoteAddress
from adapterhub.serve import resolving
from adapterhub.serve.model_names import AllowedNames
from adapterhub.store.ref_log import RefLog
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, RemoteError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

T = TypeVar("T")
log = logging.getLogger("adapterhub.serve.lookup")
_MAX_LISTED = 1000  # names
_MAX_CACHED = 1024  # refs that were looked up at a remote
_AT_ONCE = 4  # requests to a remote
_MAX_IDLE = 64  # names whose connections to a remote are kept open between two requests
# Seconds that a request waits for a remote: with an older answer to fall back on, and without one.
_PATIENCE, _FIRST_PATIENCE = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class ResolvedVersion:
    """A version that a ref named when it was looked up.

    Attributes:
        deprecated: Why it is deprecated in the registry; None if it is not, or was looked up at a remote.
    """

    name: str
    digest: Digest
    deprecated: str | None = field(default=None, compare=False)

    @property
    def model(self) -> str:
        """The name of exactly this version, like `PreparedVersion.model`."""
        return f"{self.name}@{self.digest}"


class Lookup(Protocol):
    """A place where refs are looked up.

    Attributes:
        is_up: Whether it answered the last time it was asked.
    """

    is_up: bool

    async def check(self) -> None:
        """Check that it can be reached; AdapterhubError if it cannot."""

    async def can_find(self) -> bool:
        """Return whether names can be looked up now, if only from earlier answers; asks again if not."""

    async def find(self, ref: Ref) -> ResolvedVersion:
        """Return the version that a ref names; NotFoundError if there is none."""

    async def list_refs(self, allowed: AllowedNames) -> list[tuple[str, ResolvedVersion]]:
        """Return the refs that may be asked for, of at most a thousand names."""

    def address(self, version: ResolvedVersion) -> str:
        """Return the address or ref from which a version is resolved."""

    def close(self) -> None:
        """Close what it has opened."""


def _is_withdrawn(error: Exception) -> bool:
    """Return whether an error says that a version was withdrawn, which is an answer and no failure to answer."""
    return isinstance(error, RefusedError) and error.code == withdrawals.CODE


@dataclass(frozen=True, slots=True)
class _LoggedVersion:
    """A version as it was looked up while the log of its name ended at `seq`."""

    version: ResolvedVersion
    log: RefLog
    seq: int


class RegistryLookup:
    """A `Lookup` in the registry of a workspace, opened in its own thread, and again after a failure.

    Attributes:
        was_open: Whether the registry has been open since the start.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.is_up, self.was_open = True, False
        self._workspace = workspace
        self._registry: Registry | None = None
        # One thread, which owns the connection to the registry's database.
        self._thread = ThreadPoolExecutor(1, "lookup")
        self._recent: OrderedDict[Ref, _LoggedVersion] = OrderedDict()

    async def check(self) -> None:
        """Open the registry; AdapterhubError if it cannot be opened."""
        await self.run(lambda _registry: None)

    async def can_find(self) -> bool:
        """Return whether the registry is open, and its folder still there."""
        try:
            await self.check()
            # An open database does not notice that its disk is gone.
            return self._workspace.opener is not None or await asyncio.to_thread(self._workspace.folder().is_dir)
        except AdapterhubError:
            return False

    def address(self, version: ResolvedVersion) -> str:
        """Return the name of the version with its digest."""
        return version.model

    async def find(self, ref: Ref) -> ResolvedVersion:
        """Return the version that a ref names; NotFoundError if there is none."""

        def work(registry: Registry) -> _LoggedVersion:
            # Without this, `row` would compare a misspelled name with all others for a hint that the client must not see.
            if (seq := registry.ledger.current(ref.name).seq) == 0:
                raise NotFoundError(str(ref), "no such adapter")
            local_version = registry.resolve(ref)
            version = ResolvedVersion(local_version.name, local_version.digest, local_version.deprecated)
            return _LoggedVersion(version, registry.store.log, seq)

        recent = self._recent.get(ref)
        # Whatever changes a name adds an entry to its log; one system call here, and no turn of the registry's thread. The log
        # of a hub on several machines must be asked for.
        if self._workspace.opener or recent is None or not recent.log.ends_at(ref.name, recent.seq):
            recent = self._recent[ref] = await self.run(work)
            if len(self._recent) > _MAX_CACHED:
                self._recent.popitem(last=False)
        return recent.version

    async def list_refs(self, allowed: AllowedNames) -> list[tuple[str, ResolvedVersion]]:
        """Return the tags of at most a thousand names."""

        def work(registry: Registry) -> list[tuple[str, ResolvedVersion]]:
            refs: list[tuple[str, ResolvedVersion]] = []
            names: set[str] = set()
            for row in registry.list():
                if row.name not in allowed or (row.name not in names and len(names) >= _MAX_LISTED):
                    continue
                names.add(row.name)
                # A bare name means its tag `latest`, and is listed instead of that tag.
                version = ResolvedVersion(row.name, row.digest)
                refs += [(row.name if tag == LATEST else f"{row.name}:{tag}", version) for tag in row.tags]
            return refs

        try:
            return await self.run(work)
        except NotFoundError:
            # A gateway that began without a registry serves the base alone until there is one.
            if self.was_open:
                raise
            return []

    def close(self) -> None:
        """Close the registry."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    async def run(self, work: Callable[[Registry], T]) -> T:
        """Run a function with the open registry, in the registry's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def _run(self, work: Callable[[Registry], T]) -> T:
        """Open the registry if necessary and call a function with it, keeping track of whether it answers."""
        try:
            if self._registry is None:
                self._registry = self._workspace.open_registry()
                self.was_open = True
            else:
                self._registry.refresh()
        except Exception:
            self.is_up = False
            raise
        try:
            result = work(self._registry)
        except (NotFoundError, UsageError):
            self.is_up = True
            raise
        except Exception as error:
            if _is_withdrawn(error):  # an answer like those above
                self.is_up = True
                raise
            self.is_up = False
            # After an unexpected failure the connection may be unusable, so it is opened again the next time.
            self._close()
            raise
        self.is_up = True
        return result

    def _close(self) -> None:
        """Close the registry, if it is open."""
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.close()


@dataclass(slots=True)
class _CachedAnswer:
    """A remote's last answer about a ref, a version or an error, with its time; `pending` while it is being asked."""

    version: ResolvedVersion | None = None
    error: AdapterhubError | None = None
    answered_at: float = float("-inf")
    pending: asyncio.Task[None] | None = None


class RemoteLookup:
    """A `Lookup` at a remote, which is asked for each ref at most once in a while.

    Args:
        workspace: The workspace with its credentials, proxy and so on.
        url: The URL, as `remotes.named_remotes.address_below` takes it.
        poll: Seconds that an answer is used, including that there is no such version.
    """

    def __init__(self, workspace: Workspace, url: str, poll: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_up = True
        self._workspace, self._url, self._poll, self._clock = workspace, url, poll, clock
        self._answers: OrderedDict[str, _CachedAnswer] = OrderedDict()
        self._threads = ThreadPoolExecutor(_AT_ONCE, "lookup")
        self._open: set[OpenRemote] = set()
        self._idle: OrderedDict[str, OpenRemote] = OrderedDict()
        self._lock = threading.Lock()  # of `_idle`

    async def check(self) -> None:
        """Raise RefusedError where nothing may be fetched; whether the remote answers is shown by the first lookup."""
        if not self._url.startswith("hf:"):
            return
        try:
            self._workspace.hub()
        except RemoteError as error:
            raise RefusedError(error.where, error.what, error.hint, code=error.code) from error

    async def can_find(self) -> bool:
        """Return whether the remote answers, or has told a version that is used meanwhile."""
        if not self.is_up and not any(cached.version for cached in self._answers.values()):
            with suppress(AdapterhubError):
                await self.find(Ref.parse(next(reversed(self._answers))))
            return self.is_up
        return True

    def address(self, version: ResolvedVersion) -> str:
        """Return the address of the version at the remote."""
        return named_remotes.address_below(self._url, version.model)

    async def find(self, ref: Ref) -> ResolvedVersion:
        """Return the version that the remote named last; RemoteError if it does not answer and never did for this ref."""
        cached = self._answers.setdefault(str(ref), _CachedAnswer())
        self._answers.move_to_end(str(ref))
        # Bounded, because clients choose the names.
        if len(self._answers) > _MAX_CACHED:
            self._answers.popitem(last=False)
        if cached.pending is None and self._clock() - cached.answered_at >= self._poll:
            cached.pending = asyncio.create_task(self._ask(ref, cached))
        # A slow remote must not hold up requests that have an older answer; the lookup itself goes on.
        if cached.pending is not None:
            _, late = await asyncio.wait([cached.pending], timeout=_PATIENCE if cached.version else _FIRST_PATIENCE)
            if late:
                self._record_state(RemoteError(self._url, "does not answer in time"))
        if cached.version is not None:
            return cached.version
        if cached.error is not None:
            raise cached.error.with_traceback(None)  # whose traceback would grow each time
        raise RemoteError(str(ref), f"{self._url} does not answer in time", "Ask again")

    async def _ask(self, ref: Ref, cached: _CachedAnswer) -> None:
        """Ask the remote for a ref, and record its answer."""
        try:
            digest = await asyncio.get_running_loop().run_in_executor(self._threads, self._digest, ref)
        # Answers, unlike other errors; a registry answers 401 or 403 for a name that it lacks, too.
        except (NotFoundError, UsageError, DeniedError) as error:
            refuses_login = isinstance(error, DeniedError) and error.refuses_login
            cached.version, cached.error = None, error
            self._record_state(error if refuses_login else None)
        except AdapterhubError as error:
            cached.error = error
            if _is_withdrawn(error):
                cached.version = None
            elif cached.version is None and (known_digest := await asyncio.to_thread(self._confirmed_digest, ref)):
                cached.version = ResolvedVersion(ref.name, known_digest)
            self._record_state(None if _is_withdrawn(error) else error)
        else:
            cached.version, cached.error = ResolvedVersion(ref.name, digest), None
            self._record_state(None)
        finally:
            cached.answered_at, cached.pending = self._clock(), None

    def _digest(self, ref: Ref) -> Digest:
        """Ask the remote for the digest of a version."""
        place = self._place(ref)
        # Needed for image layouts only, where a digest would be found under any name.
        resolving.check_name(ref, place, self._workspace)
        return resolving.digest_at(place, self._workspace, self._connect)

    @contextmanager
    def _connect(self, place: RemoteAddress) -> Iterator[OpenRemote]:
        """Open a remote, or the one whose connections the last lookup of this name has left open."""
        with self._lock:
            remote = self._idle.pop(place.repository, None)
        if remote is None:
            remote = self._workspace.connect(place)
        self._open.add(remote)
        try:
            yield remote
        except BaseException:
            remote.close()  # so that names that do not exist leave none, and a new login is read
            raise
        finally:
            self._open.discard(remote)
        self._keep(place, remote)

    def _keep(self, place: RemoteAddress, remote: OpenRemote) -> None:
        """Keep a remote open for the next lookup of its name, as far as there is room; the file of an image layout is not."""
        surplus: OpenRemote | None = remote
        if not is_layout(place.repository):
            with self._lock:
                surplus = self._idle.pop(place.repository, None)
                self._idle[place.repository] = remote
                if len(self._idle) > _MAX_IDLE:
                    surplus = self._idle.popitem(last=False)[1]
        if surplus is not None:
            surplus.close()

    def _confirmed_digest(self, ref: Ref) -> Digest | None:
        """Return the digest in a ref if the remote has confirmed it before, possibly to another gateway."""
        return resolving.confirmed_digest(self._place(ref), self._workspace)

    def _place(self, ref: Ref) -> RemoteAddress:
        """Return the address of a ref at the remote."""
        return remote_address.parse(named_remotes.address_below(self._url, str(ref)))

    def _record_state(self, error: AdapterhubError | None) -> None:
        """Record whether the remote answers, logging only changes."""
        if isinstance(error, DeniedError) and self.is_up:
            log.error("%s: the login of this gateway is refused, so that nothing is looked up there", error)
        elif error is not None and self.is_up:
            log.warning("%s; its last known tags are used", error)
        elif error is None and not self.is_up:
            log.info("%s answers again", self._url)
        self.is_up = error is None

    async def list_refs(self, allowed: AllowedNames) -> list[tuple[str, ResolvedVersion]]:
        """Return the refs that were looked up and exist, because few remotes can list names."""
        answers = [(ref, cached.version) for ref, cached in self._answers.items() if cached.version]
        return sorted((ref, version) for ref, version in answers if version.name in allowed)[:_MAX_LISTED]

    def close(self) -> None:
        """Stop without waiting for lookups in progress."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for remote in [*self._open]:
            remote.stop()
        with self._lock:
            for remote in self._idle.values():
                remote.close()
            self._idle.clear()
