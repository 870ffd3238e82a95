"""What all requests of a hub share."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from starlette.requests import Request

from adapterhub.digest import Digest
from adapterhub.http.boundary import is_loopback
from adapterhub.http.urls import no_proxy, origin
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.project.policy import joined
from adapterhub.registry.registry import policy_of
from adapterhub.registry.repositories import Repository
from adapterhub_converters.errors import AdapterhubError, RefusedError

from . import aliases, moving
from .access import Access
from .aliases import Alias
from .blobs import BlobResponse
from .commits import MayRead, View, frozen, is_arriving, view
from .forms import Forms
from .git import GitNames
from .jobs import Jobs
from .mirror import Mirror
from .people import accounts
from .people.accounts import READERS
from .people.id_tokens import Issuers
from .people.tokens import Identity
from .quotas import Quotas
from .releases import Releases
from .settings import HubSettings
from .storage.opening import open_storage
from .uploads import USABLE, Held, Uploads
from .webhooks import Webhooks
from .workers import Worker, Workers

_log = logging.getLogger("adapterhub.hub")
_MAINTENANCE = 600.0  # seconds between two runs
_CLOSED, _MOST = 5.0, 100  # seconds that the list of what not everybody may see is used; tokens for which it is kept


class Hub:
    """An open hub; `close` it in the end.

    Attributes:
        settings: What it was started with.
        storage: Where everything is.
        workers: Threads with registries.
        database: The tables of the hub.
        webhooks: Who is told of moves.
        access: Who may do what.
        issuers: Of ID tokens.
        sign_ins: Threads that wait for issuers, as no other request does.
        store: The blobs.
        held: Keeps what was uploaded from a gc.
        quotas: How much namespaces may hold.
        uploads: Bodies that are arriving.
        git: The names that git would give to files.
        forms: Versions in other formats.
        releases: What is given out by the policy.
        mirror: Of another hub; None without one.
        secret: Signs the places of uploads.
    """

    def __init__(self, settings: HubSettings) -> None:
        settings = replace(settings, policy=joined(settings.policy, policy_of(settings.registry)))
        self.settings = settings
        self.storage = open_storage(settings)
        self.database = self.storage.database
        self.store = self.storage.store()
        self.webhooks = Webhooks(self.database, self.store.log)
        self.workers = Workers(self.storage, moved=self.webhooks.announce)
        self.access = Access(self.database, settings.require_login)
        self.held = Held(self.store)
        self.quotas = Quotas(self.database, self.access.settled)
        self.uploads = Uploads(self.store, self.workers, limit=settings.max_file, room=self._room, ended=self.quotas.close)
        self.git = GitNames(self.store)
        self.forms = Forms(self.storage, settings.policy)
        self.releases = Releases(settings.policy, self._with_file)
        self.issuers = Issuers(settings.provider.proxy if settings.provider else no_proxy)
        self.sign_ins = Workers(self.storage, 4)
        self.secret = self._secret()
        self._closed: tuple[float, dict[str, Repository | None], dict[int, tuple[str, ...]]] = 0.0, {}, {}
        self._jobs = Jobs(self.database)
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        of = settings.mirror
        self.mirror = Mirror(of, settings, workers=self.workers, access=self.access, quotas=self.quotas) if of else None

    def _secret(self) -> bytes:
        with self.database.transaction():
            self.database.execute("INSERT INTO secrets VALUES ('uploads', ?) ON CONFLICT DO NOTHING", secrets.token_bytes(32))
        return bytes(self.database.select("SELECT value FROM secrets WHERE name = 'uploads'")[0][0])

    async def maintain(self) -> None:
        """Remove what has expired, and finish what killed processes began, every ten minutes until this is canceled."""
        while True:
            try:
                await self.workers.run(self._maintain)
                await self.finish_moves()
            except AdapterhubError as error:  # as of a full disk: later
                _log.warning("maintenance is put off: %s", error)
            await asyncio.sleep(_MAINTENANCE)

    async def finish_moves(self) -> None:
        """Take moves of repositories to their end whose processes were killed, or could not go on."""
        for old, new in await self.workers.run(moving.begun):
            try:
                async with self.moving(old, new):
                    await self.workers.run(moving.finish, old, new)
            except AdapterhubError as error:
                _log.warning("%s is still to be moved to %s: %s", old, new, error)

    def _maintain(self, worker: Worker) -> None:
        self.webhooks.catch_up(queries.names(worker.registry.index))
        self.held.turn()
        self.quotas.expire()
        self.storage.remove_stale()
        self.database.execute("DELETE FROM uploaded WHERE time < ?", time.time() - USABLE)

    def close(self) -> None:
        """Wait for what has begun and close everything."""
        if self.mirror:
            self.mirror.close()
        self.forms.close()
        self.sign_ins.close()
        self.workers.close()
        self.held.close()
        self.storage.close()

    # ---- who asks for what

    def url(self, request: Request) -> str:
        """The hub's address as the client of a request reaches it, without a slash at the end."""
        if self.settings.url:
            return self.settings.url
        scheme = (
            request.headers.get("x-forwarded-proto", request.url.scheme) if self.settings.behind_proxy else request.url.scheme
        )
        return f"{'https' if scheme == 'https' else 'http'}://{request.headers.get('host', 'localhost')}"

    def own_url(self, request: Request) -> str:
        """The hub as others know it; RefusedError where only the request says so, for that anybody may have written."""
        url = self.url(request)
        if not self.settings.url and not is_loopback(origin(url, url)[1]):
            raise RefusedError(url, "the hub does not know its own address", "Have its operator start it with its URL")
        return url

    def identify(self, request: Request) -> Identity | None:
        """Who asks; raises `BadTokenError`."""
        return self.access.identify(request.headers)

    def visible(self, worker: Worker, who: Identity | None, name: str) -> View | None:
        """A repository that exists and that `who` may see; else None."""
        may_read = partial(self.may_read, worker, who)
        return view(worker, name, may_read) or self._form(worker, name, may_read)

    def may_read(self, worker: Worker, who: Identity | None, name: str, repository: Repository | None) -> bool:
        """Whether `who` may see a repository, by its state: `Access.may_read`, and it is not still under the name it had."""
        return not is_arriving(worker, name, repository) and self.access.may_read(who, name, repository)

    def _form(self, worker: Worker, name: str, may_read: MayRead) -> View | None:
        """What a name with the ending of a form stands for, once that has been made."""
        alias = aliases.parse(name)
        if alias is None or not alias.form:
            return None
        of = view(worker, alias.source, may_read)
        digest = self.forms.find(of.newest.digest, alias.form) if of and of.newest and of.frozen == bool(alias.number) else ""
        return frozen(name, of, replace(of.newest, digest=digest, format=alias.form)) if digest and of and of.newest else None

    def hidden(self, worker: Worker, who: Identity | None) -> tuple[str, ...]:
        """The repositories that somebody may not see, as of a few seconds ago: no list, count or search has them.

        Each one that is shown is looked up all the same.
        """
        until, names, found = self._closed
        if until < time.monotonic():
            until, names, found = self._closed = time.monotonic() + _CLOSED, self._not_for_all(worker), {}
        key = who.token if who else 0
        hidden = found.get(key)
        if hidden is None:
            if len(found) >= _MOST:
                found.clear()
            hidden = found[key] = tuple(name for name, state in names.items() if not self.may_read(worker, who, name, state))
        return hidden

    def _not_for_all(self, worker: Worker) -> dict[str, Repository | None]:
        """The repositories that not everybody may see: private ones, and all in a namespace with readers of its own."""
        states = ((name, worker.repositories.get(name)) for name in worker.repositories.names())
        found: dict[str, Repository | None] = {
            name: state for name, state in states if state and (state.private or state.moved_from)
        }
        spaces = {one.name for one in accounts.namespaces(self.database) if one.readers != READERS[0]}
        if spaces:
            names = (one.name for one in queries.names(worker.registry.index))
            found = {**{name: None for name in names if name.partition("/")[0] in spaces}, **found}
        return found

    async def prepare(self, request: Request) -> None:
        """Have what a request reads, for those who may see it: what the upstream of a mirror has, and the form of a name.

        Raises:
            NotMirroredError: The upstream has it, and it is not mirrored.
            RefusedError: The form cannot be made, or those of its namespace are over its quota already.
            ThrottledError: Its address has had too many forms made without a token.
        """
        parts = request.path_params
        name = str(parts.get("name") or f"{parts.get('namespace')}/{parts.get('repo')}")
        alias = aliases.parse(name)
        if self.mirror and _reads(request):
            revision = str(parts.get("revision", ""))
            await self.mirror.look(self.identify(request), alias.name if alias else name, revision)
        if alias and alias.form and (row := await self.workers.run(self._unmade, self.identify(request), name, alias)):
            if self.identify(request) is None:
                self.access.attempt(self.access.conversions)
            async with self.turn(f"{row.digest} as {alias.form}"):
                await self.forms.make(row, alias.form)

    def _unmade(self, worker: Worker, who: Identity | None, name: str, alias: Alias) -> Row | None:
        if self.visible(worker, who, name):
            return None
        of = self.visible(worker, who, alias.source)
        if of is None or of.newest is None or of.frozen != bool(alias.number):
            return None
        if self.quotas.limits(name):
            self.quotas.check(worker, name, self.forms.held(worker.registry, name.partition("/")[0]))
        return of.newest

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """Wait until no other request of this process changes a repository."""
        lock, waiting = self._turns.get(name, (asyncio.Lock(), 0))
        self._turns[name] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._turns[name]
            if waiting > 1:
                self._turns[name] = lock, waiting - 1
            else:
                del self._turns[name]

    @asynccontextmanager
    async def moving(self, old: str, new: str) -> AsyncIterator[None]:
        """Wait until no process of the hub moves a repository from or to these names, and no request here changes it."""
        first, second = sorted((old, new))
        claimed = self._jobs.claimed(f"move {first}"), self._jobs.claimed(f"move {second}")
        async with claimed[0], claimed[1], self.turn(first), self.turn(second):
            yield

    # ---- blobs

    def blob(self, digest: Digest, size: int, headers: dict[str, str], wanted: str | None) -> BlobResponse:
        """The answer with a blob of the store, for whom may read it."""
        opened, address = partial(self.storage.opened, digest), partial(self.storage.address, digest, size)
        return BlobResponse(self.workers, opened, size, headers, wanted=wanted, address=address)

    def _room(self, name: str, upload: str, size: int, more: int, lifetime: float) -> int | None:
        return self.quotas.open(self.workers.worker(), name, upload, size, more=more, lifetime=lifetime)

    def _with_file(self, worker: Worker, who: Identity | None, digest: Digest) -> Iterator[View]:
        names = queries.names_with(worker.registry.index, digest, without=self.hidden(worker, who))
        yield from filter(None, (self.visible(worker, who, name) for name in names))

    def uploaded(self, name: str, digests: Iterable[Digest], ended: Collection[str] = ()) -> None:
        """Record that blobs were uploaded for a repository, which may use them for a day before a manifest names them.

        Args:
            name: The repository.
            digests: The blobs.
            ended: The uploads that they were made of, which are counted no more.

        Raises:
            RefusedError: Its namespace may not hold so much.
        """
        digests, now = list(digests), time.time()
        sizes = {digest: self.store.size(digest) or 0 for digest in digests}
        self.quotas.check(self.workers.worker(), name, sizes, take=True, but=ended)
        self.quotas.close(name, ended)
        # Also one that was here before, which nothing else may need.
        rows = [(name, digest, now) for digest in digests if self.store.holds(digest, sizes[digest])]
        sql = "INSERT INTO uploaded VALUES (?, ?, ?) ON CONFLICT (name, digest) DO UPDATE SET time = excluded.time"
        self.database.execute_many(sql, rows)

    def uploaded_to(self, digest: Digest) -> list[str]:
        """The repositories that a blob was uploaded for in the last day."""
        sql = "SELECT name FROM uploaded WHERE digest = ? AND time >= ?"
        return [name for (name,) in self.database.select(sql, digest, time.time() - USABLE)]

    def has_blob(self, worker: Worker, of: View | None, name: str, digest: Digest, *, uploads: bool = True) -> int | None:
        """The bytes of a blob that a repository has; None for any other blob of the store.

        `uploads`: Also of one that was uploaded for it, and that no manifest names yet: for those who may write.
        """
        # Whether the store has it is asked last: the time would tell what others have.
        sql = "SELECT 1 FROM uploaded WHERE name = ? AND digest = ? AND time >= ?"
        uploaded = uploads and self.database.select(sql, name, digest, time.time() - USABLE)
        return self.store.size(digest) if uploaded or (of and self._links(worker, of, digest)) else None

    def _links(self, worker: Worker, of: View, digest: Digest) -> bool:
        """Whether a repository has a blob: in a version as a file, as its manifest or as its config, or in another manifest."""
        if of.newest and of.frozen:
            made = worker.manifest(of.newest)
            return digest in (made.digest, made.config.digest, *(layer.digest for layer in made.layers))
        index, manifests = worker.registry.index, of.repository.manifests if of.repository else {}
        if digest in manifests or any(digest in manifest.blobs for manifest in manifests.values()):
            return True
        return queries.has_blob(index, of.name, digest) or any(
            worker.config(one) == digest for one in queries.digests(index, of.name)
        )


def _reads(request: Request) -> bool:
    """Whether a request reads a repository by its name, rather than a blob that it must have got from there before."""
    parts = request.path_params
    reading = request.method in ("GET", "HEAD") or "/paths-info/" in request.url.path
    return reading and not parts.keys() & {"digest", "oid", "session"}
