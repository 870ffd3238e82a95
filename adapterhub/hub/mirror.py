"""A mirror: adapters of one other hub, fetched when somebody first asks for them, kept, and served from then on.

The operator names the upstream; no client can name another. A repository that is not here is asked for there by its name,
without a token. If it is an adapter, its files are received and compared with their digests, checked as those of a push, and
become version v1 here. After a while `main` is looked at again, and a commit that is new there becomes the next version.
Nothing is ever removed, and a commit that was fetched names the same version forever.

A namespace is the upstream's or this hub's. Of one in which somebody has a role here, or in which there is or was a name that
did not come from there, no name is told to the upstream, and nothing that is new there is taken in. The same holds for a single
name that was mirrored, once its newest version is not from there, or it was removed here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from adapterhub.bases.hub_address import MAIN
from adapterhub.bases.hub_address import Hub as HuggingFace
from adapterhub.digest import is_hex
from adapterhub.http.errors import DeniedError
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub.http_server.limits import Windows
from adapterhub.index import queries
from adapterhub.index.queries import Row
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.ref import LATEST, Ref, is_name
from adapterhub.registry.moves import ABSENT
from adapterhub.registry.versions import Version
from adapterhub.remotes.copy import unique
from adapterhub.remotes.hub.client import COMMIT, Bounds, HubAddress
from adapterhub.remotes.hub.repository import HubRepository
from adapterhub.remotes.local import Local
from adapterhub.remotes.protocol import Source
from adapterhub.store.store import HUB, REFS
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

from . import asking, commits, origins, publishing
from .access import Access, ThrottledError
from .people.tokens import Identity
from .quotas import Quotas
from .settings import MAX_MIRRORED, HubSettings, Upstream
from .workers import Worker, Workers

AUTHOR = "mirror"
_log = logging.getLogger("adapterhub.hub")
_ABSENT = 300.0  # seconds until the upstream is asked again for what it has not, or what was refused
_AWAY = 30.0  # seconds until it is asked again after it did not answer
_MOST = 10_000  # answers that are remembered
_ASKED, _WINDOW = 100, 300  # names that an address may have asked for there in so many seconds
_AT_ONCE = 4  # repositories that are fetched
_PATIENCE = 5.0  # seconds that readers of what is here wait for news; those of huggingface_hub give up after 10
_PAUSES = (0.5,)  # seconds before another try; clients wait meanwhile
_BOUNDS = Bounds(listing=4 << 20, plain=32 << 20)  # in memory, of each repository that is fetched
_MAX_HEADER = 8 << 20  # bytes of the header of a GGUF adapter; that of a model has its vocabulary
_MAX_HEADERS = 20  # that are looked at to find a GGUF adapter in a repository


class NotMirroredError(NotFoundError):
    """The upstream has a repository of that name that is not mirrored, as a whole model is not."""

    default_code = "not-mirrored"


def upstream(
    url: str, age: float, hub: Callable[[], HuggingFace], proxy: ProxyOf = no_proxy, *, max_bytes: int = MAX_MIRRORED
) -> Upstream:
    """The upstream at `hf://`, which is the hub that `hub` returns, or at `hub+https://HOST`.

    Raises:
        UsageError: The URL is neither.
    """
    name = "org/name"
    hint = "Write hf:// or hub+https://HOST"
    try:
        place = HubAddress.parse(f"{url if url.endswith('/') else f'{url}/'}{name}")
    except UsageError as error:
        raise UsageError(error.where.removesuffix(name)[:200], f"not a hub that can be mirrored: {error.what}", hint) from error
    if place.name != name:
        raise UsageError(url[:200], "a hub is mirrored as a whole, not one namespace of it", hint)
    return Upstream(place.repository.removesuffix(name), place.endpoint or hub().endpoint, age, max_bytes, proxy)


@dataclass(frozen=True, slots=True)
class _Said:
    """What the upstream said of a name: until when that holds, why it is not mirrored, and what readers are warned of."""

    until: float
    refusal: str = ""
    warning: str = ""


@dataclass(frozen=True, slots=True)
class _State:
    """A name that may be mirrored: its newest version here, and whether the upstream is to be asked."""

    newest: Row | None
    due: bool


class Mirror:
    """The mirror of a hub; `close` it in the end.

    Args:
        of: Where it fetches from.
        settings: Those of the hub.
        workers: Its threads; what is fetched has some of its own.
        access: Who may read.
        quotas: What namespaces may hold.
    """

    def __init__(
        self,
        of: Upstream,
        settings: HubSettings,
        *,
        workers: Workers,
        access: Access,
        quotas: Quotas,
    ) -> None:
        self._of, self._settings = of, settings
        self._workers, self._access, self._quotas = workers, access, quotas
        self._database = access.database
        self._pool = ThreadPoolExecutor(_AT_ONCE, "hub-mirror")
        self._sources: set[HubRepository] = set()
        self._running: dict[str, asyncio.Future[None]] = {}
        self._said: dict[str, _Said] = {}
        self._asked = Windows(_ASKED, _WINDOW)

    def close(self) -> None:
        """Stop the transfers; each resumes when its repository is next asked for."""
        for source in list(self._sources):
            source.stop()
        self._pool.shutdown(cancel_futures=True)

    async def look(self, who: Identity | None, name: str, revision: str = "") -> None:
        """Have a repository here before it is read, and its `main` as fresh as was settled.

        `revision`: If it is a commit that is not here, `main` is looked at again, as it may be there by now.

        Raises:
            NotMirroredError: The upstream has it, and it is no adapter, or one that this hub refuses.
            ThrottledError: The client has asked for too many names that are not here.
        """
        address = self._address(name)
        if address is None:
            return
        pin = revision if is_hex(revision, COMMIT) else ""
        state = await self._workers.run(self._state, who, name, pin)
        if state is None:
            return
        if state.due and (asked := self._asking(address, pin, state)):
            done, _ = await asyncio.wait([asked], timeout=_PATIENCE if state.newest else None)
            if not done:
                asking.now().warning = "the upstream of this mirror takes long; this is what was fetched before"
                return
            asked.result()
        if said := self._said.get(name):
            asking.now().warning = said.warning
            if said.refusal and state.newest is None:
                raise NotMirroredError(f"{name} is not mirrored", said.refusal)

    def _asking(self, address: HubAddress, pin: str, state: _State) -> asyncio.Future[None] | None:
        """The question that is under way, for whichever request it was begun; None if there is none to ask now."""
        name = address.name
        fresh = self._is_fresh(name) and (not pin or self._is_fresh(f"{name}@{pin}"))  # since the state was looked at
        if name not in self._running and not fresh and self._may_ask(state):
            asked = asyncio.get_running_loop().run_in_executor(self._pool, self._ask, address, pin)
            self._running[name] = asked
            asked.add_done_callback(lambda _: self._running.pop(name))
        return self._running.get(name)

    def _address(self, name: str) -> HubAddress | None:
        """The address of a name at the upstream; None for one that it cannot have."""
        if not is_name(name) or name.count("/") != 1:
            return None
        try:
            return HubAddress.parse(f"{self._of.prefix}{name}")
        except UsageError:
            return None

    def _state(self, worker: Worker, who: Identity | None, name: str, pin: str) -> _State | None:
        """How a name is here; None for one that is this hub's own, or that `who` may not read."""
        # What `who` may not see is looked at as what is not here: the time would tell them apart.
        may_read = partial(self._access.may_read, who)
        of, hidden = commits.view(worker, name, may_read), not may_read(name, worker.repositories.get(name))
        newest = of.newest if of else None
        if newest is None and (of is not None or worker.registry.ledger.current(name).deleted):
            return None
        if newest and not origins.has(self._database, name, newest.digest):
            return None
        due = not self._is_fresh(name) or (of is not None and self._is_unknown(worker, of, pin))
        own = due and self._is_own(worker, name.partition("/")[0])
        return None if own or hidden else _State(newest, due)

    def _is_own(self, worker: Worker, namespace: str) -> bool:
        """Whether a namespace is this hub's own, whose names are nobody else's business."""
        if self._access.is_taken(namespace):
            return True
        log = worker.registry.store.log
        return not origins.names(self._database, namespace).issuperset(log.names(REFS, namespace) + log.names(HUB, namespace))

    def _is_fresh(self, key: str) -> bool:
        said = self._said.get(key)
        return said is not None and said.until > time.monotonic()

    def _is_unknown(self, worker: Worker, of: commits.View, pin: str) -> bool:
        """Whether a commit is not here, and was not looked for in the last minutes."""
        if not pin or self._is_fresh(f"{of.name}@{pin}"):
            return False
        try:
            commits.find(worker, of, pin)
        except NotFoundError:
            return True
        return False

    def _may_ask(self, state: _State) -> bool:
        """Whether the upstream may be asked on behalf of this client; ThrottledError if nothing can be served without."""
        try:
            self._access.attempt(self._asked)
        except ThrottledError:
            if state.newest is None:
                raise
            return False
        return True

    # ---- in a thread of the mirror

    def _ask(self, address: HubAddress, pin: str) -> None:
        """Fetch what is new of a repository, and remember what the upstream said."""
        worker = self._workers.worker()
        worker.registry.author = AUTHOR
        of = commits.view(worker, address.name)
        self._remember(address.name, self._answer(worker, address, of.newest if of else None))
        if pin:
            self._remember(f"{address.name}@{pin}", _Said(time.monotonic() + _ABSENT))

    def _answer(self, worker: Worker, address: HubAddress, newest: Row | None) -> _Said:
        refusal, lasts = "", _ABSENT
        try:
            if self._fetch(worker, address, newest):
                lasts = self._of.age
            elif newest:
                refusal = f"{address} is not there any more; this is what it was"
        except LocalIOError:
            raise
        except ConflictError:
            pass  # somebody pushed to the name meanwhile: it is this hub's own now
        except RemoteError as error:
            if not isinstance(error, DeniedError):
                _log.warning("the upstream did not answer: %s", printable(str(error)))
                there = "; this is what was fetched before" if newest else ""
                return _Said(time.monotonic() + _AWAY, warning=f"the upstream of this mirror does not answer{there}")
            refusal = error.what
        except AdapterhubError as error:
            refusal = str(error)
        if refusal:
            _log.warning("not mirrored: %s: %s", address, printable(refusal))
        until = time.monotonic() + lasts
        return _Said(until, warning=refusal) if newest else _Said(until, refusal=refusal)

    def _remember(self, key: str, said: _Said) -> None:
        if len(self._said) >= _MOST:
            self._said.clear()
        self._said[key] = said

    def _fetch(self, worker: Worker, address: HubAddress, newest: Row | None) -> bool:
        """Make a version of the commit that `main` is at, unless that was done; False for no such repository."""
        if self._settings.policy is not None:
            self._settings.policy.check_name(address.name)
        source = HubRepository(address, self._of.endpoint, pauses=_PAUSES, proxy=self._of.proxy, bounds=_BOUNDS)
        self._sources.add(source)
        try:
            try:
                source.tags()
            except NotFoundError:
                return False
            commit = source.commits.get(MAIN, "")
            known = origins.find(self._database, address.name, commit)
            if newest and known:
                if known != newest.digest:  # `main` went back
                    made, message = Local(worker.registry, address.name).manifest(known), f"mirrored from {address.at(commit)}"
                    worker.registry.admit(made, Ref(address.name), expect=newest.digest, tags=(LATEST,), message=message)
                return True
            made = source.manifest(commit or MAIN)
            version = self._publish(worker, source, made, newest)
            origins.add(self._database, address.name, source.commit_id, version.digest)
            _log.info("mirrored %s as v%d", address.at(source.commit_id), version.number)
            return True
        finally:
            self._sources.discard(source)
            source.close()

    def _publish(self, worker: Worker, source: HubRepository, made: Manifest, newest: Row | None) -> Version:
        """Receive the files of a version, and store it: under the same digest if it has an adapter.json."""
        name, where = source.address.name, source.address.repository
        check_adapter(source, made, where)
        for layer in made.layers:
            if layer.size > self._settings.max_file:
                raise RefusedError(f"{where}: {layer.path}", f"a file may have at most {self._settings.max_file:,} bytes here")
        sizes = {layer.digest: layer.size for layer in made.layers}
        if (size := sum(sizes.values())) > self._of.max_bytes:
            raise RefusedError(where, f"has {size:,} bytes, and a repository may have at most {self._of.max_bytes:,} here")
        self._quotas.check(worker, name, sizes, take=True)
        policy, message = self._settings.policy, f"mirrored from {where}@{source.commit_id}"
        expect = newest.digest if newest else ABSENT
        local = Local(worker.registry, name)
        with local.at_work():
            for blob in unique(made):
                # A file of another name is received too: an upstream that names its digest need not have its bytes.
                if not (queries.versions(worker.registry.index, name=name, file=blob.digest) and local.has(blob)):
                    local.put_blob(blob, source)
            more: dict[str, Any] = {"tags": (LATEST,), "expect": expect, "policy": policy, "message": message}
            with origins.making(self._database, name, source.commit_id):
                if made.adapter_json is not None:
                    return publishing.publish_manifest(worker.registry, name, made, **more)
                files = {layer.path: (layer.digest, layer.size) for layer in made.layers}
                return publishing.publish_tree(worker.registry, name, files, **more)


def check_adapter(source: Source, made: Manifest, where: str) -> None:
    """Refuse what is no adapter before its files are received, by their names and by the headers of GGUF files.

    Raises:
        RefusedError: It has none.
    """
    files = {layer.path: (layer.digest, layer.size) for layer in made.layers}
    if made.adapter_json is not None:
        return
    if not publishing.is_whole(files):
        raise RefusedError(where, "has no whole adapter in it, and this hub mirrors nothing else")
    if ADAPTER_CONFIG in files:
        return
    top = (layer for layer in made.layers if layer.path.endswith(".gguf") and "/" not in layer.path)
    if not any(_is_gguf_adapter(source, layer, where) for layer in itertools.islice(top, _MAX_HEADERS)):
        raise RefusedError(where, "is a whole model, and this hub mirrors adapters only")


def _is_gguf_adapter(source: Source, blob: Descriptor, where: str) -> bool:
    from adapterhub_converters.containers import gguf_file

    data, buffer = bytearray(), memoryview(bytearray(1 << 16))
    with source.open_blob(blob) as body:

        def read_at(offset: int, size: int) -> bytes:
            end = min(offset + size, _MAX_HEADER)
            while len(data) < end and (n := body.readinto(buffer)):
                data.extend(buffer[:n])
            return bytes(data[offset : offset + size])

        try:
            return gguf_file.read_header(read_at, blob.size, f"{where}: {blob.path}").text("general.type") == "adapter"
        except FormatError:
            return False
