"""A mirror: adapters of one other hub, fetched on first request, kept, and served from then on.

The operator names the upstream; no client can name another. A repository that is not here is requested there by name, without a
token. If it is an adapter, its files are received, compared with their digests, checked like those of a push, and become
version v1 here. After a while `main` is checked again, and a new commit there becomes the next version. Nothing is ever
removed, and a commit once fetched names the same version forever; what the upstream withdraws is withdrawn here, too.

A namespace belongs either to the upstream or to this hub. If somebody has a role in it here, or it has or had a name that did
not come from the upstream, then no name of it is revealed to the upstream, and nothing new there is taken in. The same holds
for a single mirrored name once its newest version is not from the upstream, or the name was removed here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from adapterhub.bases.hub_address import MAIN
from adapterhub.bases.hub_address import Hub as HuggingFace
from adapterhub.digest import is_hex
from adapterhub.http.http_errors import DeniedError
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.http_server.rate_windows import Windows
from adapterhub.index import queries
from adapterhub.index.queries import VersionRow
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref, is_name
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.signature_policy import kept_unasked
from adapterhub.registry.version_lookup import Version
from adapterhub.remotes import attached_signatures
from adapterhub.remotes.hub.hub_client import COMMIT, Bounds, HubAddress
from adapterhub.remotes.hub.hub_repository import HubRepository
from adapterhub.remotes.local_name import LocalName
from adapterhub.remotes.protocol import Source
from adapterhub.remotes.version_copy import distinct_blobs
from adapterhub_converters.adapter_files import ADAPTER_CONFIG
from adapterhub_converters.display import printable
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    FormatError,
    LocalIOError,
    NotFoundError,
    RefusedError,
    RemoteError,
    UsageError,
)
from adapterhub_converters.lazy_dataclass import dataclass

from . import commits, mirror_origin, mirrored_withdrawals, publishing, request_context
from .access_control import Access, ThrottledError
from .accounts.access_tokens import Identity
from .namespace_owner import is_own_namespace
from .quotas import Quotas
from .settings import MAX_MIRRORED, HubSettings, Upstream
from .workers import Worker, Workers

AUTHOR = "mirror"
_log = logging.getLogger("adapterhub.hub")
_ABSENT_TTL = 300.0  # seconds until the upstream is asked again for a missing or refused repository
_AWAY_TTL = 30.0  # seconds until it is asked again after it did not respond
_NO_API_TTL = 3600.0  # seconds until an upstream that is not an adapterhub is asked again whether it is one
_MAX_REPLIES = 10_000  # replies kept in memory
_MAX_ATTEMPTS, _WINDOW = 100, 300  # names an address may request from the upstream, in how many seconds
_THREADS = 4  # repositories fetched at a time
_PATIENCE = 5.0  # seconds that readers of a version already here wait for news; huggingface_hub gives up after 10
_PAUSES = (0.5,)  # seconds before a retry, while clients wait
_BOUNDS = Bounds(listing=4 << 20, plain=32 << 20)  # bytes in memory for each repository being fetched
_MAX_FOR_STRANGERS, _DAY = 200 << 30, 24 * 3600  # bytes that all clients without an account may have fetched in a day
_MAX_HEADER = 8 << 20  # bytes of a GGUF adapter's header; only a whole model's, with its vocabulary, is larger
_MAX_HEADERS = 20  # GGUF headers read to find an adapter in a repository


class NotMirroredError(NotFoundError):
    """The upstream has a repository of that name that is not mirrored, such as a whole model."""

    default_code = "not-mirrored"


def upstream(
    url: str, age: float, hub: Callable[[], HuggingFace], proxy: ProxyOf = no_proxy, *, max_bytes: int = MAX_MIRRORED
) -> Upstream:
    """Return the upstream at `hf://`, which is the hub that `hub` returns, or at `hub+https://HOST`.

    Raises:
        UsageError: The URL is neither.
    """
    name = "org/name"
    hint = "Write hf:// or hub+https://HOST"
    if "@" in url:
        raise UsageError(url.rpartition("@")[2][:200], "the address of a hub has no user and no password", hint)
    try:
        address = HubAddress.parse(f"{url if url.endswith('/') else f'{url}/'}{name}")
    except UsageError as error:
        raise UsageError(error.where.removesuffix(name)[:200], f"not the address of a hub: {error.what}", hint) from error
    if address.name != name:
        raise UsageError(url[:200], "a hub is named as a whole, not one namespace of it", hint)
    return Upstream(address.repository.removesuffix(name), address.endpoint or hub().endpoint, age, max_bytes, proxy)


@dataclass(frozen=True, slots=True)
class _Reply:
    """The upstream's reply about a name: until when it holds, why the name is not mirrored, and a warning for readers."""

    until: float
    refusal: str = ""
    warning: str = ""


@dataclass(frozen=True, slots=True)
class _NameState:
    """A name that may be mirrored: its newest version here, and whether the upstream is due to be asked."""

    newest: VersionRow | None
    due: bool


class Mirror:
    """The mirror of a hub; `close` it when done.

    Args:
        upstream: The hub it fetches from.
        settings: The settings of this hub.
        workers: Threads of this hub; the mirror fetches in threads of its own.
        access: Who may read.
        quotas: How much namespaces may hold.
    """

    def __init__(
        self,
        upstream: Upstream,
        settings: HubSettings,
        *,
        workers: Workers,
        access: Access,
        quotas: Quotas,
    ) -> None:
        self._upstream, self._settings = upstream, settings
        self._workers, self._access, self._quotas = workers, access, quotas
        self._database = access.database
        self._pool = ThreadPoolExecutor(_THREADS, "hub-mirror")
        self._sources: set[HubRepository] = set()
        self._running: dict[str, asyncio.Future[None]] = {}
        self._replies: dict[str, _Reply] = {}
        self._attempts = Windows(_MAX_ATTEMPTS, _WINDOW)
        self._stranger_bytes = Windows(_MAX_FOR_STRANGERS, _DAY)
        self._asked_by_strangers: set[str] = set()
        self._without_api_until = 0.0

    def close(self) -> None:
        """Stop the transfers; each resumes when its repository is next requested."""
        for source in list(self._sources):
            # Wakes threads that wait for the upstream, so that shutdown is quick.
            source.stop()
        self._pool.shutdown(cancel_futures=True)

    async def refresh(self, identity: Identity | None, name: str, revision: str = "") -> None:
        """Fetch a repository before it is read, and refresh its `main` if the last check is too old.

        `revision`: If it is a commit that is not here, `main` is checked again, because the commit may be new.

        Raises:
            NotMirroredError: The upstream has the repository, but it is not an adapter, or one this hub refuses.
            ThrottledError: The client has requested too many names that are not here.
        """
        address = self._address(name)
        if address is None:
            return
        pin = revision if is_hex(revision, COMMIT) else ""
        state = await self._workers.run(self._name_state, identity, name, pin)
        if state is None:
            return
        if state.due and (question := self._pending_question(address, pin, state)):
            finished, _ = await asyncio.wait([question], timeout=_PATIENCE if state.newest else None)
            if not finished:
                request_context.current().warning = "the upstream of this mirror takes long; this is what was fetched before"
                return
            question.result()
        if reply := self._replies.get(name):
            request_context.current().warning = reply.warning
            if reply.refusal and state.newest is None:
                raise NotMirroredError(f"{name} is not mirrored", reply.refusal)

    def _pending_question(self, address: HubAddress, pin: str, state: _NameState) -> asyncio.Future[None] | None:
        """Return the running request to the upstream, whoever started it; None if there is no reason to ask now."""
        name = address.name
        # Another request may have refreshed it meanwhile.
        fresh = self._is_fresh(name) and (not pin or self._is_fresh(f"{name}@{pin}"))
        if name not in self._running and not fresh and self._check_may_ask(state):
            if not request_context.current().account:
                self._asked_by_strangers.add(name)
            question = asyncio.get_running_loop().run_in_executor(self._pool, self._ask, address, pin)
            self._running[name] = question
            question.add_done_callback(lambda _: self._forget_question(name))
        return self._running.get(name)

    def _forget_question(self, name: str) -> None:
        self._running.pop(name)
        self._asked_by_strangers.discard(name)

    def _address(self, name: str) -> HubAddress | None:
        """Return the address of a name at the upstream; None for a name it cannot have."""
        if not is_name(name) or name.count("/") != 1:
            return None
        try:
            return HubAddress.parse(f"{self._upstream.prefix}{name}")
        except UsageError:
            return None

    def _name_state(self, worker: Worker, identity: Identity | None, name: str, pin: str) -> _NameState | None:
        """Return the state of a name here; None if it is this hub's own, or `identity` may not read it."""
        # Treat a hidden repository like a missing one until the end: timing must not tell them apart.
        may_read = partial(self._access.may_read, identity)
        view, hidden = commits.find_view(worker, name, may_read), not may_read(name, worker.repositories.get(name))
        newest = view.newest if view else None
        if newest is None and (view is not None or worker.registry.ledger.current(name).deleted):
            return None
        if newest and not mirror_origin.is_mirrored(self._database, name, newest.digest):
            return None
        due = not self._is_fresh(name) or (view is not None and self._is_unknown(worker, view, pin))
        is_own = due and is_own_namespace(worker, self._access, name.partition("/")[0])
        return None if is_own or hidden else _NameState(newest, due)

    def _is_fresh(self, key: str) -> bool:
        reply = self._replies.get(key)
        return reply is not None and reply.until > time.monotonic()

    def _is_unknown(self, worker: Worker, view: commits.View, pin: str) -> bool:
        """Return whether a commit is not here, and was not looked for in the last minutes."""
        if not pin or self._is_fresh(f"{view.name}@{pin}"):
            return False
        try:
            commits.find(worker, view, pin)
        except NotFoundError:
            return True
        return False

    def _check_may_ask(self, state: _NameState) -> bool:
        """Return whether the upstream may be asked on behalf of this client.

        Raises:
            ThrottledError: The client has asked too often, or those without an account for too many bytes, and there is no
            version here to serve instead.
        """
        try:
            self._access.count_attempt(self._attempts)
            if not request_context.current().account and (window := self._stranger_bytes.count("", 0)).over:
                raise ThrottledError(window.seconds)
        except ThrottledError:
            if state.newest is None:
                raise
            return False
        return True

    # ---- in a thread of the mirror

    def _ask(self, address: HubAddress, pin: str) -> None:
        """Fetch what is new in a repository, and remember the upstream's reply."""
        worker = self._workers.worker()
        # Not the account of the client that happened to ask.
        worker.registry.author = AUTHOR
        view = commits.find_view(worker, address.name)
        self._remember(address.name, self._answer(worker, address, view.newest if view else None))
        if pin:
            self._remember(f"{address.name}@{pin}", _Reply(time.monotonic() + _ABSENT_TTL))

    def _answer(self, worker: Worker, address: HubAddress, newest: VersionRow | None) -> _Reply:
        refusal, lifetime = "", _ABSENT_TTL
        try:
            if self._fetch(worker, address, newest):
                lifetime = self._upstream.age
            elif newest:
                refusal = f"{address} is not there any more; this is what it was"
        except LocalIOError:
            raise
        except ConflictError:
            pass  # somebody pushed to the name meanwhile, so it is this hub's own now
        except RemoteError as error:
            if not isinstance(error, DeniedError):
                _log.warning("the upstream did not answer: %s", printable(str(error)))
                fallback = "; this is what was fetched before" if newest else ""
                return _Reply(time.monotonic() + _AWAY_TTL, warning=f"the upstream of this mirror does not answer{fallback}")
            refusal = error.what
        except AdapterhubError as error:
            refusal = str(error)
        if refusal:
            _log.warning("not mirrored: %s: %s", address, printable(refusal))
        until = time.monotonic() + lifetime
        return _Reply(until, warning=refusal) if newest else _Reply(until, refusal=refusal)

    def _remember(self, key: str, reply: _Reply) -> None:
        if len(self._replies) >= _MAX_REPLIES:
            self._replies.clear()
        self._replies[key] = reply

    def _fetch(self, worker: Worker, address: HubAddress, newest: VersionRow | None) -> bool:
        """Create a version from the commit `main` is at, unless it exists; return False if there is no such repository."""
        if self._settings.policy is not None:
            self._settings.policy.check_name(address.name)
        source = HubRepository(address, self._upstream.endpoint, pauses=_PAUSES, proxy=self._upstream.proxy, bounds=_BOUNDS)
        self._sources.add(source)
        try:
            try:
                source.tags()
            except NotFoundError:
                return False
            if newest and time.monotonic() >= self._without_api_until:
                is_ours = mirrored_withdrawals.learn(worker, address, self._upstream)
                self._without_api_until = 0.0 if is_ours else time.monotonic() + _NO_API_TTL
            commit = source.commits.get(MAIN, "")
            digest = mirror_origin.find(self._database, address.name, commit)
            if newest and digest:
                if digest != newest.digest:  # the upstream's `main` went back to an earlier commit
                    manifest, message = (
                        LocalName(worker.registry, address.name).manifest(digest),
                        f"mirrored from {address.with_reference(commit)}",
                    )
                    worker.registry.push_manifest(
                        manifest, Ref(address.name), expect=newest.digest, tags=(LATEST,), message=message
                    )
                return True
            manifest = source.manifest(commit or MAIN)
            signatures = attached_signatures.stored(source, manifest.digest)
            version = self._publish(worker, source, manifest, newest, signatures=signatures)
            mirror_origin.add(self._database, address.name, source.commit_id, version.digest)
            if version.digest == manifest.digest:  # without an adapter.json there, they are about other files
                for raw in kept_unasked(signatures, manifest, self._settings.policy, address.name):
                    publishing.attach_signature(worker, address.name, manifest, raw)
            _log.info("mirrored %s as v%d", address.with_reference(source.commit_id), version.number)
            return True
        finally:
            self._sources.discard(source)
            source.close()

    def _publish(
        self,
        worker: Worker,
        source: HubRepository,
        manifest: Manifest,
        newest: VersionRow | None,
        *,
        signatures: Sequence[bytes],
    ) -> Version:
        """Receive the files of a version and store it, under the upstream's digest if it has an adapter.json.

        The policy of the hub may ask for `signatures`, which the upstream has of it.
        """
        name, location = source.address.name, source.address.repository
        check_adapter(source, manifest, location)
        for layer in manifest.layers:
            if layer.size > self._settings.max_file:
                raise RefusedError(
                    f"{location}: {layer.path}", f"a file may have at most {self._settings.max_file:,} bytes here"
                )
        sizes = {layer.digest: layer.size for layer in manifest.layers}
        if (size := sum(sizes.values())) > self._upstream.max_bytes:
            raise RefusedError(
                location, f"has {size:,} bytes, and a repository may have at most {self._upstream.max_bytes:,} here"
            )
        # Before receiving anything: the sizes are known from the manifest.
        self._quotas.check(worker, name, sizes, count=True)
        if name in self._asked_by_strangers:
            self._stranger_bytes.count("", size + sum(map(len, signatures)))
        policy, message = self._settings.policy, f"mirrored from {location}@{source.commit_id}"
        expect = newest.digest if newest else ABSENT
        local = LocalName(worker.registry, name)
        # Lease the blobs until the version that names them is committed.
        with local.lease_for_push():
            for blob in distinct_blobs(manifest):
                # Receive a file even if another name here has it: knowing its digest does not prove that the upstream has its
                # bytes.
                if not (queries.versions(worker.registry.index, name=name, file=blob.digest) and local.has_blob(blob)):
                    local.put_blob(blob, source)
            options: dict[str, Any] = {"tags": (LATEST,), "expect": expect, "policy": policy, "message": message}
            options["signatures"] = lambda _digest: signatures
            with mirror_origin.reserve(self._database, name, source.commit_id):
                if manifest.adapter_json is not None:
                    return publishing.publish_manifest(worker.registry, Ref(name), manifest, **options)
                files = {layer.path: (layer.digest, layer.size) for layer in manifest.layers}
                return publishing.publish_tree(worker.registry, name, files, **options)


def check_adapter(source: Source, manifest: Manifest, location: str) -> None:
    """Refuse a repository that is not an adapter before receiving its files, by their names and by the headers of GGUF files.

    Raises:
        RefusedError: It has no adapter.
    """
    files = {layer.path: (layer.digest, layer.size) for layer in manifest.layers}
    if manifest.adapter_json is not None:
        return
    if not publishing.is_whole_by_name(files):
        raise RefusedError(location, "has no whole adapter in it, and this hub mirrors nothing else")
    if ADAPTER_CONFIG in files or publishing.DIFFUSERS_WEIGHTS in files:
        return
    ggufs = (layer for layer in manifest.layers if layer.path.endswith(".gguf") and "/" not in layer.path)
    if not any(_is_gguf_adapter(source, layer, location) for layer in itertools.islice(ggufs, _MAX_HEADERS)):
        raise RefusedError(location, "is a whole model, and this hub mirrors adapters only")


def _is_gguf_adapter(source: Source, blob: Descriptor, location: str) -> bool:
    from adapterhub_converters.containers import gguf_file

    data, buffer = bytearray(), memoryview(bytearray(1 << 16))
    with source.open_blob(blob) as body:

        def read_at(offset: int, size: int) -> bytes:
            end = min(offset + size, _MAX_HEADER)
            # Read on only as far as the parser asks, up to the limit.
            while len(data) < end and (count := body.readinto(buffer)):
                data.extend(buffer[:count])
            return bytes(data[offset : offset + size])

        try:
            return gguf_file.read_header(read_at, blob.size, f"{location}: {blob.path}").text("general.type") == "adapter"
        except FormatError:
            return False
