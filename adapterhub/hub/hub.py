"""The state that all requests of a hub share."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from starlette.requests import Request

from adapterhub.digest import Digest
from adapterhub.http.boundary import is_loopback
from adapterhub.http.urls import no_proxy, origin
from adapterhub.index import queries, repository_rows, version_listing
from adapterhub.index.queries import VersionRow
from adapterhub.manifest.card import Card
from adapterhub.project.policy import join
from adapterhub.registry.registry import policy_of
from adapterhub.registry.repository_documents import Repository
from adapterhub_converters.errors import AdapterhubError, RefusedError

from . import aliases, garbage_collection, gates, proposals, publishing, renames, request_context
from .access_control import Access
from .accounts import access_tokens, sessions
from .accounts.access_tokens import Identity
from .accounts.id_tokens import Issuers
from .administration.storage_usage import Sums
from .aliases import Alias
from .blob_response import BlobResponse
from .change_locks import ChangeLocks
from .commits import MayRead, View, find_view, frozen_view, source_name
from .converted_versions import ConvertedVersions
from .downloads import Downloads
from .git_objects import GitObjectIds
from .hidden_names import HiddenNames, HiddenSet
from .hub_database import hub_secret
from .jobs import Jobs
from .lru_cache import LRUCache
from .mirror import Mirror
from .model_bases import ModelBases
from .policy_gate import PolicyGate
from .popularity import Rankings
from .quotas import Quotas
from .read_log import ReadLog
from .replication import Replicator
from .settings import HubSettings, ModelUpstream
from .staged_files import StagedFiles
from .storage.folder_store import FileState, collecting_new_blobs
from .storage.from_settings import open_storage
from .uploaded_blobs import UploadedBlobs
from .uploads import UploadLeases, Uploads
from .upstream.models import UpstreamModels
from .upstream.shared_files import SharedFiles
from .webhooks import Webhooks
from .workers import Worker, Workers

_log = logging.getLogger("adapterhub.hub")
_MAINTENANCE_INTERVAL = 600.0  # seconds between two runs
_MAX_LOOKS = 1000  # blobs in a run of which the store is asked whether they are still there
_MAX_CARD_BYTES = 16 << 20  # bytes of cards kept in memory


class Hub:
    """An open hub; `close` it when done.

    Attributes:
        settings: The settings it was started with.
        storage: Where its registry, blobs and tables live.
        workers: Threads that each have an open registry.
        database: The tables of the hub.
        webhooks: Receivers that are notified of moves.
        access: Who may do what.
        downloads: How often versions were downloaded.
        rankings: Names by their downloads and stars.
        read_log: Who read what.
        issuers: Keys of the issuers of ID tokens.
        sign_ins: Threads that wait for issuers, so that no other request has to.
        store: The blobs.
        upload_leases: Keeps uploaded blobs from a gc.
        quotas: How much namespaces may hold.
        uploaded: Blobs that no manifest names yet.
        uploads: Bodies that are arriving.
        cards: The model cards read last, by digest.
        git: The object ids git would give to files.
        conversions: Versions converted to other formats.
        policy_gate: Compares what is served with the policy.
        namespace_totals: What each namespace stores.
        mirror: The mirror of another hub; None without one.
        replicator: Copies what is pushed here to other places.
        upstream: The models that are not here but at another hub; None without one.
        model_bases: The whole models that are bases of adapters.
        locks: Locks on changes of repositories.
        secret: Signs the addresses of uploads.
    """

    def __init__(self, settings: HubSettings) -> None:
        # The operator's policy and the one stored in the registry both apply.
        settings = replace(settings, policy=join(settings.policy, policy_of(settings.registry)))
        self.settings = settings
        self.storage = open_storage(settings)
        self.database = self.storage.database
        self.store = self.storage.store()
        self.webhooks = Webhooks(self.database, self.store.log)
        self.workers = Workers(self.storage, on_move=self.webhooks.announce)
        self.access = Access(self.database, settings.require_login)
        self.upload_leases = UploadLeases(self.store)
        self.downloads, self.rankings = Downloads(self.database), Rankings(self.database)
        self.read_log = ReadLog(self.database)
        self.quotas = Quotas(self.database, self.access.namespace_settings)
        self.workers.check_record = self.quotas.check_record
        self.workers.on_open = self._set_tag_rules
        self.uploaded = UploadedBlobs(self.database, self.store, self.workers, self.quotas)
        self.uploads = Uploads(
            self.store,
            self.workers,
            limit=settings.max_file,
            room=self._count_upload,
            count=self._count_file,
            forget=lambda name, digest: self.uploaded.forget(name, [digest]),
            on_end=self.quotas.close,
        )
        self.git = GitObjectIds(self.store)
        self.cards: LRUCache[Card] = LRUCache(_MAX_CARD_BYTES)
        self.conversions = ConvertedVersions(self.storage, settings.policy)
        self.policy_gate = PolicyGate(settings.policy, self.access.check_files, self._views_with_file)
        self.issuers = Issuers(settings.provider.proxy if settings.provider else no_proxy)
        # Their own threads: a provider that hangs must not occupy those of all other requests.
        self.sign_ins = Workers(self.storage, 4, caches=self.workers.caches)
        self.secret = hub_secret(self.database)
        self._hidden_names = HiddenNames(self.access)
        self.namespace_totals = Sums()
        self._jobs = Jobs(self.database)
        self.locks = ChangeLocks(self._jobs)
        self._sha512_place = ""
        upstream = settings.mirror
        self.mirror = (
            Mirror(upstream, settings, workers=self.workers, access=self.access, quotas=self.quotas) if upstream else None
        )
        self.upstream = self._open_upstream(settings.upstream) if settings.upstream else None
        self.replicator = Replicator(
            settings.replications,
            workers=self.workers,
            database=self.database,
            jobs=self._jobs,
        )
        self.model_bases = ModelBases(self.storage, self.workers, self.access, self.upstream)
        self.conversions.find_base = self.model_bases.find

    def _open_upstream(self, upstream: ModelUpstream) -> UpstreamModels:
        shared = None
        if (bucket := self.storage.bucket) and upstream.mode == "cache":
            shared = SharedFiles(bucket, self.database, upstream.max_bytes, proxy=self.settings.proxy_blobs)
        folder = self.storage.root / "upstream"
        return UpstreamModels(upstream, folder, self.workers, self.access, shared=shared, max_copies=self.settings.cache)

    def _set_tag_rules(self, worker: Worker) -> None:
        """Have a worker's registry ask for the hub's requirements on tags, and look for signatures where a hub keeps them."""
        gate = worker.registry.gate
        read_stored = gate.read_signatures
        gate.rules_of_caller = lambda: self.settings.policy
        gate.read_signatures = lambda name, digest: [
            *read_stored(name, digest),
            *publishing.attached_signatures(worker, name, digest),
        ]
        # Whoever accepts a proposal pushes the version, and somebody else has made it.
        gate.read_authors = partial(proposals.authors, worker)
        gate.is_moved_by_program = lambda: access_tokens.is_of_program(self.database, request_context.current().token)

    async def maintain(self) -> None:
        """Remove expired state and finish the work of killed processes, every ten minutes, until canceled."""
        while True:
            try:
                await self.workers.run(self._maintain)
                await self.finish_moves()
            except AdapterhubError as error:  # a full disk, for instance: try again later
                _log.warning("maintenance is postponed: %s", error)
            await asyncio.sleep(_MAINTENANCE_INTERVAL)

    async def collect_garbage(self) -> None:
        """Collect the garbage of the registry now and then, if the settings say so, until canceled."""
        if collection := self.settings.collection:
            await garbage_collection.collect_now_and_then(collection, self._jobs, self.storage.root)

    async def finish_moves(self) -> None:
        """Finish renames of repositories that a killed process or an error left half done."""
        for old, new in await self.workers.run(renames.pending_moves):
            try:
                async with self.locks.move(old, new):
                    await self.workers.run(renames.finish, old, new)
            except AdapterhubError as error:
                _log.warning("%s is still to be moved to %s: %s", old, new, error)

    def _maintain(self, worker: Worker) -> None:
        self.webhooks.catch_up(partial(queries.names, worker.registry.index))
        self.upload_leases.rotate()
        self.quotas.expire()
        self.downloads.compact()
        self.read_log.trim()
        proposals.settle_all(worker, self.webhooks)
        # Leftovers of killed processes, such as half-written copies.
        self.storage.remove_stale()
        self.uploaded.forget_expired(worker)
        self._forget_sha512()
        self.conversions.forget_removed()

    def _forget_sha512(self) -> None:
        """Forget the sha512 of blobs that a gc has removed, some of them at a time."""
        sql = "SELECT digest, sha256 FROM sha512 WHERE digest > ? ORDER BY digest LIMIT ?"
        rows = self.database.select(sql, self._sha512_place, _MAX_LOOKS)
        gone = [(digest,) for digest, sha256 in rows if self.store.size(sha256) is None]
        self.database.execute_many("DELETE FROM sha512 WHERE digest = ?", gone)
        self._sha512_place = rows[-1][0] if len(rows) == _MAX_LOOKS else ""

    def close(self) -> None:
        """Wait for running work, then close everything."""
        if self.mirror:
            self.mirror.close()
        if self.upstream:
            self.upstream.close()
        self.replicator.close()
        self.conversions.close()
        self.sign_ins.close()
        self.workers.close()
        for counted in (self.downloads, self.read_log):
            with contextlib.suppress(AdapterhubError):  # only counts would be lost
                counted.write()
        self.upload_leases.close()
        self.storage.close()

    # ---- who asks for what

    def url(self, request: Request) -> str:
        """Return the hub's address as the client of a request reaches it, without a trailing slash."""
        if self.settings.url:
            return self.settings.url
        scheme = (
            request.headers.get("x-forwarded-proto", request.url.scheme) if self.settings.behind_proxy else request.url.scheme
        )
        return f"{'https' if scheme == 'https' else 'http'}://{request.headers.get('host', 'localhost')}"

    def own_url(self, request: Request) -> str:
        """Return the hub's public address.

        Raises:
            RefusedError: Only the request's Host header says what it is, and anybody may have written that.
        """
        url = self.url(request)
        if not self.settings.url and not is_loopback(origin(url, url)[1]):
            raise RefusedError(url, "the hub does not know its own address", "Ask its operator to start it with its URL")
        return url

    def identify(self, request: Request) -> Identity | None:
        """Return the account and role of a request's token; None without one. Raises `BadTokenError`."""
        return self.access.identify(request.headers)

    def identify_visitor(self, request: Request) -> Identity | None:
        """Return the account behind a token or a browser's session, for requests that change nothing; None without either.

        Another site can have a browser send its session, so that forms need more than this. Raises `BadTokenError`.
        """
        identity = self.identify(request)
        if identity is None and (cookie := request.cookies.get(sessions.COOKIE)):
            identity = self.access.session_identity(cookie)
            if identity:
                request_context.current().set_account(identity.account, identity.prefix, identity.token)
        return identity

    def visible(self, worker: Worker, identity: Identity | None, name: str) -> View | None:
        """Return a repository, or None if it does not exist or `identity` may not see it."""
        may_read = self.reader(worker, identity)
        return find_view(worker, name, may_read) or self._converted_view(worker, name, may_read)

    def reader(self, worker: Worker, identity: Identity | None) -> MayRead:
        """Return what tells whether `identity` may see a repository."""
        return partial(self.may_read, worker, identity)

    def may_read(self, worker: Worker, identity: Identity | None, name: str, repository: Repository | None) -> bool:
        """Return whether `identity` may see a repository in this state; one still being renamed to is hidden from everybody."""
        return self._hidden_names.may_read(worker, identity, name, repository)

    def may_read_name(self, worker: Worker, identity: Identity | None, name: str) -> bool:
        """Return whether `identity` may see an existing or removed name."""
        return self.may_read(worker, identity, name, worker.repositories.get(name))

    def _converted_view(self, worker: Worker, name: str, may_read: MayRead) -> View | None:
        """Return the view behind a name with a format suffix, once that conversion exists."""
        alias = aliases.parse(name)
        if alias is None or not alias.form:
            return None
        source = find_view(worker, alias.source, may_read)
        # A numbered alias is of a frozen view, one without a number of a live one.
        digest = (
            self.conversions.find(source.newest.digest, alias.form)
            if source and source.newest and source.frozen == bool(alias.number)
            else ""
        )
        return (
            frozen_view(name, source, replace(source.newest, digest=digest, format=alias.form))
            if digest and source and source.newest
            else None
        )

    def hidden_names(self, worker: Worker, identity: Identity | None) -> frozenset[str]:
        """Return the repositories to leave out of a client's lists, counts and searches.

        A role or a setting of a namespace may have changed some seconds ago: each repository shown is checked on its own.
        """
        return self.hidden(worker, identity).names

    def hidden(self, worker: Worker, identity: Identity | None) -> HiddenSet:
        """Return the set of these names."""
        return self._hidden_names.current(worker, identity)

    def names_after(self, worker: Worker, identity: Identity | None, last: str, limit: int) -> list[str]:
        """Return the first names after `last`, sorted, without those hidden from a client."""
        hidden, index = self.hidden_names(worker, identity), worker.registry.index
        names = {*version_listing.names_after(index, last, limit, hidden)}
        names.update(repository_rows.names_after(index, last, limit, hidden))
        return sorted(names)[:limit]

    async def prepare(self, request: Request) -> None:
        """Fetch or convert what a request is about to read, if its client may see it.

        That is a repository of the mirror's upstream, or the converted version behind a name with a format suffix.

        Raises:
            NotMirroredError: The upstream has the repository, but it is not mirrored.
            RefusedError: The version cannot be converted, or conversions already exceed the quota of the namespace.
            ThrottledError: The client's address has asked for too many conversions without a token.
        """
        parts = request.path_params
        name = str(parts.get("name") or f"{parts.get('namespace')}/{parts.get('repo')}")
        alias = aliases.parse(name)
        if self.mirror and _is_repository_read(request):
            revision = str(parts.get("revision", ""))
            await self.mirror.refresh(self.identify(request), alias.name if alias else name, revision)
        if (
            alias
            and alias.form
            and (row := await self.workers.run(self._version_to_convert, self.identify(request), name, alias))
        ):
            # A conversion takes CPU time and disk space, so a network gets only so many without a token.
            if self.identify(request) is None:
                self.access.count_attempt(self.access.conversions)
            async with self.locks.change(f"{row.digest} as {alias.form}"):
                await self.conversions.make(row, alias.form)

    def _version_to_convert(self, worker: Worker, identity: Identity | None, name: str, alias: Alias) -> VersionRow | None:
        if self.visible(worker, identity, name):
            return None
        source = self.visible(worker, identity, alias.source)
        if source is None or source.newest is None or source.frozen != bool(alias.number):
            return None
        self.access.check_files(identity, name)  # nothing is converted for a client that may not read it
        if self.quotas.has_byte_limit(name):
            self.quotas.check(worker, name, self.conversions.blob_sizes(worker.registry, name.partition("/")[0]))
        return source.newest

    # ---- changes

    @asynccontextmanager
    async def change(self, name: str, counted_name: str = "") -> AsyncIterator[None]:
        """Hold the lock on changes of a repository for the block; if that fails, what it has stored is removed again.

        Where only a gc removes it, it counts for `counted_name`, else for the repository.
        """
        async with self.locks.change(name):
            with collecting_new_blobs() as blobs:
                try:
                    yield
                except Exception:  # not of a canceled request, whose thread goes on
                    await asyncio.shield(self.workers.read(self._take_back, counted_name or name, blobs))
                    raise

    def _take_back(self, name: str, blobs: dict[Digest, FileState]) -> None:
        if blobs:
            with contextlib.suppress(AdapterhubError):  # the disk that has failed: a gc removes them
                removed = self.storage.take_back(self.store, blobs)
                if removed is None:
                    self.quotas.count_left(name, {digest: self.store.size(digest) or 0 for digest in blobs})
                self.uploaded.forget(name, removed or ())
                self.quotas.recount(name)

    # ---- blobs

    def blob(self, digest: Digest, size: int, headers: dict[str, str], range_header: str | None) -> BlobResponse:
        """Return the response with a blob of the store. The caller has checked that the client may read it."""
        open_blob, address = partial(self.storage.open_blob, digest), partial(self.storage.address, digest, size)
        return BlobResponse(self.workers, open_blob, size, headers, range_header=range_header, address=address)

    def record_read(self, view: View, digest: Digest, protocol: str) -> None:
        """Log that the client of this request reads a version, or a blob, of a repository."""
        name, repository = source_name(view), view.repository
        is_restricted = bool(repository and repository.private) or self.access.has_members_only(name)
        self.read_log.record(name, digest, protocol, always=is_restricted or gates.find_gate(self.database, name) is not None)

    def _count_upload(self, name: str, upload: str, size: int, extra: int, lifetime: float) -> int | None:
        return self.quotas.open(self.workers.worker(), name, upload, size, extra=extra, lifetime=lifetime)

    def _views_with_file(self, worker: Worker, identity: Identity | None, digest: Digest) -> Iterator[View]:
        names = queries.names_with(worker.registry.index, digest, without=self.hidden_names(worker, identity))
        readable = (name for name in names if self.access.may_read_files(identity, name))
        yield from filter(None, (self.visible(worker, identity, name) for name in readable))

    def _count_file(self, name: str, digest: Digest, size: int, upload: str) -> None:
        self.uploaded.count(name, {digest: size}, [upload])

    def stage_files(self, name: str) -> StagedFiles:
        """Return where the small files of a commit to a repository wait."""
        return StagedFiles(self.store, self.workers, self.quotas, self.uploaded, name)

    def blob_size(
        self, worker: Worker, repository_view: View | None, name: str, digest: Digest, *, uploads: bool = True
    ) -> int | None:
        """Return the size in bytes of a blob that a repository has; None for any other blob of the store.

        `uploads`: Include blobs uploaded for the repository that no manifest names yet, for clients that may write.
        """
        # Ask the store last: timing must not reveal whether another repository has the blob.
        is_uploaded = uploads and self.uploaded.has(name, digest)
        has_blob = is_uploaded or (repository_view and self._has_link_to(worker, repository_view, digest))
        return self.store.size(digest) if has_blob else None

    def _has_link_to(self, worker: Worker, repository_view: View, digest: Digest) -> bool:
        """Return whether a repository refers to a blob: as a file, manifest or config of a version, or in another manifest."""
        if repository_view.newest and repository_view.frozen:
            manifest = worker.manifest(repository_view.newest)
            return digest in (manifest.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers))
        index, manifests = worker.registry.index, repository_view.repository.manifests if repository_view.repository else {}
        if digest in manifests or any(digest in manifest.blobs for manifest in manifests.values()):
            return True
        return queries.has_blob(index, repository_view.name, digest) or any(
            worker.config(version_digest) == digest for version_digest in queries.digests(index, repository_view.name)
        )


def _is_repository_read(request: Request) -> bool:
    """Return whether a request reads a repository by name, rather than a blob whose digest it must have read there before."""
    parts = request.path_params
    reading = request.method in ("GET", "HEAD") or "/paths-info/" in request.url.path
    return reading and not parts.keys() & {"digest", "oid", "session"}
