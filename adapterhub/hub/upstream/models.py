"""The models of the upstream, for requests to this hub: their listings, and files from the cache or past it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from starlette.requests import Request

from adapterhub.bases.hub_address import SCHEME, HubPath
from adapterhub.bases.hub_address import Hub as HuggingFace
from adapterhub.http_server.rate_windows import Windows
from adapterhub.hub import request_context
from adapterhub.hub.access_control import Access
from adapterhub.hub.accounts.access_tokens import Identity
from adapterhub.hub.blob_response import BlobResponse, RangeError, parse_range
from adapterhub.hub.git_objects import GitFile
from adapterhub.hub.namespace_owner import is_own_namespace
from adapterhub.hub.settings import ModelUpstream
from adapterhub.hub.stored_model import StoredModel
from adapterhub.hub.workers import Worker, Workers
from adapterhub_converters.errors import ConflictError, LocalIOError, NotFoundError, RemoteError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .cached_files import CachedFiles, key_of
from .file_responses import FillResponse, PassedResponse
from .fills import Fill, Fills
from .listing_cache import CheckedListing, ListingCache
from .model_client import ModelClient, file_url, open_range
from .model_listing import ModelListing
from .shared_documents import SharedDocuments
from .shared_files import SharedFiles

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_BASE_FILES = (".json", ".safetensors", ".gguf", ".jinja")
_THREADS = 8  # documents asked for, and bodies passed on, at a time
_MAX_ATTEMPTS, _WINDOW = 300, 300  # models that nobody asked for before, which an address may ask for, in how many seconds
_LISTING_PATIENCE = 5.0  # seconds that readers of a branch that is kept wait for news; huggingface_hub gives up after 10
_PATIENCE = 2.0  # seconds until a large file is sent while it arrives
_SMALL, _SMALL_PATIENCE = 8 << 20, 60.0  # bytes of a file that is sent once it is whole, and the seconds that may take
_MAX_AHEAD = 64 << 20  # bytes that a client waits for; a range beyond is asked of the upstream
_TOKENIZER = "tokenizer.json"
_MAX_KEPT = 500  # models that are listed
T = TypeVar("T")


@dataclass(frozen=True)
class KeptModel:
    """A model of which a commit is known here, with the bytes of all its files, here or not."""

    name: str
    commit: str
    size: int


class UpstreamModels:
    """The models of the upstream; `close` it when done.

    Args:
        upstream: The hub that has them.
        folder: Where they are kept.
        workers: Threads of this hub.
        access: Who may read.
        shared: Where the processes of a hub keep files for each other; None for a hub in one folder.
        max_copies: Bytes of copies in the folder, if they are shared elsewhere.

    Attributes:
        reads: How many reads of files were answered from where: this folder, the bucket, the upstream with the file kept
            (`fetched`), or without (`passed`).
    """

    def __init__(
        self,
        upstream: ModelUpstream,
        folder: Path,
        workers: Workers,
        access: Access,
        *,
        shared: SharedFiles | None = None,
        max_copies: int = 0,
    ) -> None:
        self.settings = upstream
        self._workers, self._access, self._shared = workers, access, shared
        self.cached = (
            SharedDocuments(folder, min(upstream.max_bytes, max_copies), shared)
            if shared
            else CachedFiles(folder, upstream.max_bytes)
        )
        self.reads = dict.fromkeys(("folder", "bucket", "fetched", "passed"), 0)
        self._client = ModelClient.of(upstream)
        self._listings = ListingCache(upstream, self._client, self.cached)
        self._fills = Fills(self._client, self.cached, shared)
        # What is here is read in threads of the hub, so that an upstream that hangs holds up nobody who can have it.
        self._pool = ThreadPoolExecutor(_THREADS, "hub-upstream")
        self._passing = ThreadPoolExecutor(_THREADS, "hub-upstream-pass")
        self._asked: dict[tuple[str, str], asyncio.Future[CheckedListing]] = {}
        self._attempts = Windows(_MAX_ATTEMPTS, _WINDOW)

    def close(self) -> None:
        """Stop the downloads; each goes on when its file is next asked for."""
        self._client.stop()
        self._fills.close()
        self._pool.shutdown(cancel_futures=True)
        self._passing.shutdown(cancel_futures=True)
        self._client.close()

    # ---- for metrics

    @property
    def received_bytes(self) -> int:
        """The bytes of files that came from the upstream and were kept."""
        return self._fills.received_bytes

    def kept_bytes(self) -> int:
        """Return the bytes of everything that is kept, in the bucket if there is one."""
        return (self._shared or self.cached).total()

    # ---- whose a name is

    async def has_name(self, identity: Identity | None, name: str) -> bool:
        """Return whether a name may be one of the upstream, for this client; nothing is asked there."""
        return self._is_allowed(name) and await self._workers.run(self._may_ask, identity, name.lower())

    def may_show(self, worker: Worker, identity: Identity | None, name: str) -> bool:
        """Return whether a client may be told that a model of the upstream is kept here."""
        return self._is_allowed(name) and self._may_ask(worker, identity, name.lower())

    def may_name(self, worker: Worker, name: str) -> bool:
        """Return whether a name of a base model may be told to the upstream."""
        return self._is_allowed(name) and not is_own_namespace(worker, self._access, name.lower().partition("/")[0])

    def _is_allowed(self, name: str) -> bool:
        allowed, lower = self.settings.organizations, name.lower()
        return is_model_name(name) and (not allowed or lower.partition("/")[0] in allowed or lower in allowed)

    def _may_ask(self, worker: Worker, identity: Identity | None, name: str) -> bool:
        # Whether the client could read it here; and never for a namespace of this hub, whatever is in it.
        return self._access.may_read(identity, name, None) and not is_own_namespace(
            worker, self._access, name.partition("/")[0]
        )

    def address(self, request: Request) -> str:
        """Return the address of the same request at the upstream."""
        query = f"?{request.url.query}" if request.url.query else ""
        return f"{self.settings.endpoint}{request.scope['raw_path'].decode('latin-1')}{query}"

    def address_of_file(self, listing: ModelListing, path: str) -> str:
        """Return the address of a file of a commit at the upstream."""
        return file_url(self.settings, listing.name, listing.commit, path)

    # ---- what it says

    async def listing(self, name: str, revision: str) -> ModelListing:
        """Return a model at a revision.

        Raises:
            NotFoundError: The upstream has no such model or revision (`model_client`).
            RemoteError: It does not answer.
            ThrottledError: The client's address has asked for too many models that are not in the cache.
        """
        cached = await self._workers.read(self._listings.cached_listing, name, revision)
        if cached and cached[1]:
            return cached[0]
        key = name, revision
        question = self._asked.get(key)
        if question is None:
            if cached is None:
                self._access.count_attempt(self._attempts)
            question = self._asked[key] = asyncio.ensure_future(self._in_thread(self._listings.find, name, revision))
            question.add_done_callback(partial(self._end_question, key))
        # `wait` ends no question: others wait for the same answer when this client is gone.
        finished, _ = await asyncio.wait([question], timeout=_LISTING_PATIENCE if cached else None)
        if cached and not finished:
            request_context.current().warning = "the upstream takes long; this is what it was"
            return cached[0]
        answer = question.result()
        request_context.current().warning = answer.warning
        return answer.listing

    def _end_question(self, key: tuple[str, str], question: asyncio.Future[CheckedListing]) -> None:
        del self._asked[key]
        if not question.cancelled():  # codespell:ignore
            question.exception()  # perhaps nobody waits for it any more, which asyncio would log

    async def document(self, path: str, name: str, limit: int) -> tuple[bytes, str]:
        """Return a document of the upstream's API as it is now, and its `Link` header; errors as for `listing`."""
        return await self._in_thread(self._listings.read_document, path, name, limit)

    def read_base(self, name: str, revision: str) -> BaseSpec:
        """Return the description of a model, read from its configs and headers: those kept here, else at the upstream.

        Raises:
            NotFoundError: The upstream has no such model, or it is no base.
            RemoteError: It does not answer.
        """
        from adapterhub_converters.bases import hub_layout, read_files

        listing = self._listings.find(name, revision).listing
        needed = _base_files(listing)
        model = self._model(listing, needed)
        main = model.main_file()
        if main is None:
            raise NotFoundError(name, "is no base model")
        if all(map(self._has, needed)):
            return hub_layout.with_repo(read_files(model, main), name, listing.commit)
        token = self.settings.token if self.settings.mode == "cache" else None
        hub = HuggingFace(self.settings.endpoint, token, self.settings.proxy)
        from adapterhub.bases import remote_base  # numpy, which the start of a hub does without

        return remote_base.read_url(f"{SCHEME}{name}@{listing.commit}{'/' if main else ''}{main}", hub, pauses=(0.5,))

    # ---- what is kept here

    def kept_models(self) -> list[KeptModel]:
        """Return the models whose branches and tags are kept here, those asked for last first, each at its newest commit."""
        models: dict[str, KeptModel] = {}
        for name, revision in self.cached.revisions(_MAX_KEPT):
            with suppress(NotFoundError):
                if name not in models and (cached := self._listings.cached_listing(name, revision)):
                    models[name] = KeptModel(name, cached[0].commit, sum(file.size for file in cached[0].files.values()))
        return list(models.values())

    def kept_commit(self, name: str, revision: str) -> str:
        """Return the commit of a model that is kept here; empty if its listing is not. The upstream is not asked."""
        with suppress(NotFoundError):
            cached = self._listings.cached_listing(name, revision)
            return cached[0].commit if cached else ""
        return ""

    def read_kept_base(self, name: str, commit: str) -> BaseSpec:
        """Return the description of a model all of whose weights are kept here, without the upstream.

        Raises:
            NotFoundError: Not all of them are, or it is no base.
        """
        from adapterhub_converters.bases import hub_layout, read_files

        cached = self._listings.cached_listing(name, commit)
        listed = _base_files(cached[0]) if cached else []
        # Programs leave out what they do not need; of the tokenizer, only the digest in the listing is read.
        files = [file for file in listed if file.path == _TOKENIZER or self._has(file)]
        weights = [file for file in listed if file.path.endswith(".safetensors")] or [
            file for file in listed if file.path.endswith(".gguf")
        ]
        model = self._model(cached[0], files) if cached and weights and {*weights} <= {*files} else None
        main = model.main_file() if model else None
        if model is None or main is None:
            raise NotFoundError(name, "is not kept as a whole")
        return hub_layout.with_repo(read_files(model, main), name, commit)

    def _model(self, listing: ModelListing, files: Iterable[GitFile]) -> StoredModel:
        sizes = {file.path: (file.digest, file.size) for file in files}
        return StoredModel(listing.name, sizes, lambda path: self._open(listing.files[path]))

    # ---- files

    async def file(
        self, listing: ModelListing, file: GitFile, headers: Mapping[str, str], range_header: str | None
    ) -> BlobResponse:
        """Return the response with a file: from here, while it arrives, or past the cache if it cannot be kept.

        Raises:
            IntegrityError: The upstream sends other bytes than it lists.
            RemoteError: It does not answer.
        """
        key = key_of(file)
        if self._fills.was_wrong(file):
            range_header = None  # a client may have the first of the wrong bytes, and must not add right ones
        if not file.size or await self._workers.read(self.cached.has_whole, key):
            self.reads["folder"] += 1
            return self._whole(file, headers, range_header)
        # A small one is copied here, by a download from there.
        if self._shared and file.size > _SMALL and await self._workers.read(self._shared.size, key) == file.size:
            self.reads["bucket"] += 1
            address = partial(self._shared.address, key, file.size)
            opened = partial(self._shared.open, key)
            return BlobResponse(self._workers, opened, file.size, headers, range_header=range_header, address=address)
        try:
            start = (parse_range(range_header, file.size) or (0, 0))[0]
        except RangeError:
            return self._whole(file, headers, range_header)
        url, location = self.address_of_file(listing, file.path), f"{listing.name}: {file.path}"
        try:
            fill = self._fills.start(file, url, location)
            await self._wait(fill)
            if fill.is_whole:
                self.reads["fetched"] += 1
                return self._whole(file, headers, range_header)
            if fill.has_begun and start <= fill.readable + _MAX_AHEAD:
                self.reads["fetched"] += 1
                return FillResponse(self._workers, self.cached, fill, headers, range_header)
        except (LocalIOError, ConflictError):
            pass  # it cannot be kept now
        self.reads["passed"] += 1
        open_body = partial(open_range, self._client, url, location, size=file.size)
        return PassedResponse(self._workers, file, headers, range_header, pool=self._passing, open_body=open_body)

    async def _wait(self, fill: Fill) -> None:
        """Wait until a download is whole, or a large one or one that waits for others a little; raise its error."""
        with suppress(TimeoutError):
            await asyncio.wait_for(fill.wait_beyond(fill.file.size), _PATIENCE)
        if fill.has_begun and fill.file.size <= _SMALL:
            try:
                await asyncio.wait_for(fill.wait_beyond(fill.file.size), _SMALL_PATIENCE)
            except TimeoutError:
                raise RemoteError(fill.file.path, "the upstream takes too long") from None
        if fill.error:
            raise fill.error

    def _has(self, file: GitFile) -> bool:
        key = key_of(file)
        return not file.size or self.cached.has_whole(key) or (self._shared is not None and self._shared.size(key) == file.size)

    def _whole(self, file: GitFile, headers: Mapping[str, str], range_header: str | None) -> BlobResponse:
        return BlobResponse(self._workers, partial(self._open, file), file.size, headers, range_header=range_header)

    def _open(self, file: GitFile) -> BinaryIO:
        opened = self.cached.open_whole(key_of(file))
        if opened is None and self._shared and self._shared.size(key_of(file)) == file.size:
            return self._shared.open(key_of(file))
        if opened is None:
            raise RemoteError(file.path, "it was removed to make room; ask again")
        return opened

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        # The copied context carries `request_context` into the thread.
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(context.run, work, *args))


def _base_files(listing: ModelListing) -> list[GitFile]:
    """Return the files of a model that describe it as a base."""
    return [file for file in listing.files.values() if "/" not in file.path and file.path.endswith(_BASE_FILES)]


def is_model_name(name: str) -> bool:
    """Return whether a name, with or without a namespace, is valid for a model of the Hugging Face Hub."""
    try:
        return HubPath.parse(f"{SCHEME}{name}") == HubPath(name)
    except UsageError:
        return False
