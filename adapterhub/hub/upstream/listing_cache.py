"""The listings of the upstream's models, cached: each is asked for once, and still used while the upstream does not answer.

A commit never changes, so its document is asked for once. The commit of a branch or tag is asked for again after a while.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from contextlib import suppress

from adapterhub.digest import is_hex
from adapterhub.hub.lru_cache import LRUCache
from adapterhub.hub.settings import ModelUpstream
from adapterhub_converters.containers import json_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

from . import model_listing
from .cached_files import MAX_DOCUMENT, CachedFiles
from .model_client import ModelClient, NoModelError, NoRevisionError, info_url
from .model_listing import ModelListing

_log = logging.getLogger("adapterhub.hub")
_COMMIT = 40  # hexadecimal digits
_AWAY_TTL, _ABSENT_TTL = 30.0, 300.0  # seconds until the upstream is asked again after it did not answer, or had no such model
_MAX_IN_MEMORY = 16 << 20  # bytes of listings
_MAX_ABSENT = 10_000  # names and revisions remembered as missing
AWAY = "the upstream does not answer; this is what it was"
GONE = "the upstream has no such model any more; this is what it was"


@dataclass(frozen=True)
class CheckedListing:
    """A listing, and a warning about it for clients; empty if it is up to date."""

    listing: ModelListing
    warning: str = ""


class ListingCache:
    """A cache of listings; several threads may use it at once.

    Args:
        upstream: The hub that has them.
        client: A client of it.
        cached: Where documents are kept.
    """

    def __init__(self, upstream: ModelUpstream, client: ModelClient, cached: CachedFiles) -> None:
        self._upstream, self._client, self._cached = upstream, client, cached
        self._lock = threading.Lock()
        self._in_memory: LRUCache[ModelListing] = LRUCache(_MAX_IN_MEMORY)
        self._absent: OrderedDict[tuple[str, str], tuple[float, type[NotFoundError], str]] = OrderedDict()
        self._away_until = 0.0

    def cached_listing(self, name: str, revision: str) -> tuple[ModelListing, bool] | None:
        """Return the cached listing of a revision, and whether it is up to date; None without one. The upstream is not asked.

        Raises:
            NoModelError, NoRevisionError: The upstream did not have it a moment ago.
        """
        commit, age = self._known_commit(name, revision)
        if commit and (listing := self._listing_at(name, commit)):
            return listing, is_hex(revision, _COMMIT) or age < self._upstream.age
        if absence := self._absence(name, revision):
            raise absence
        return None

    def find(self, name: str, revision: str) -> CheckedListing:
        """Return the listing of a model at a revision.

        Raises:
            NoModelError: The upstream has no such model.
            NoRevisionError: The model has no such revision.
            RemoteError: The upstream does not answer, and the revision was not asked for before; or it is gated there.
        """
        earlier, is_fresh = self.cached_listing(name, revision) or (None, False)
        if earlier and is_fresh:
            return CheckedListing(earlier)
        try:
            return CheckedListing(self._ask(name, revision))
        except (NoModelError, NoRevisionError):
            if earlier is None:
                raise
            return CheckedListing(earlier, GONE)
        except RemoteError as error:
            if earlier is None:
                raise
            _log.warning("the upstream did not answer: %s", printable(str(error)))
            return CheckedListing(earlier, AWAY)

    # ---- the cache

    def _known_commit(self, name: str, revision: str) -> tuple[str, float]:
        """Return the commit that a revision was at, and the seconds since then; empty if that is not known."""
        if is_hex(revision, _COMMIT):
            return (revision, 0.0) if self._listing_at(name, revision) else ("", 0.0)
        document = self._cached.read_document(f"revision {name}@{revision}")
        with suppress(FormatError):
            commit = json_file.parse_object(document[0], name).get("commit") if document else None
            if document and isinstance(commit, str) and is_hex(commit, _COMMIT):
                return commit, time.time() - document[1]
        return "", 0.0

    def _listing_at(self, name: str, commit: str) -> ModelListing | None:
        """Return the listing of a commit; None if it is not here, or damaged."""
        with suppress(RemoteError):
            return self._in_memory.get((name, commit), lambda: self._read(name, commit))
        return None

    def _read(self, name: str, commit: str) -> ModelListing:
        document = self._cached.read_document(f"model {name}@{commit}")
        listing = model_listing.parse(document[0] if document else b"", name, name)
        if listing.commit != commit:
            raise RemoteError(name, "the document of another commit")
        return listing

    # ---- the upstream

    def _ask(self, name: str, revision: str) -> ModelListing:
        if self._away_until > time.monotonic():
            raise RemoteError(name, "the upstream does not answer")
        try:
            listing = self._fetch(name, revision)
        except (NoModelError, NoRevisionError) as error:
            self._remember_absence(name, revision, error)
            raise
        except NotFoundError as error:
            no_model = NoModelError(name, "the upstream has no such model")
            self._remember_absence(name, revision, no_model)
            raise no_model from error
        except RemoteError as error:
            if error.code == "no-answer":
                self._away_until = time.monotonic() + _AWAY_TTL
            raise
        self._keep(listing, revision)
        return listing

    def _fetch(self, name: str, revision: str) -> ModelListing:
        location = f"{name}@{revision}"
        raw = self._client.get(info_url(self._upstream, name, revision), location, n=MAX_DOCUMENT).body
        listing = model_listing.parse(raw, name, location)
        # The operator's token may read what is nobody else's.
        if listing.document.get("private") or listing.document.get("disabled"):
            raise NoModelError(name, "the upstream has no such model for others")
        if is_hex(revision, _COMMIT) and listing.commit != revision:
            raise RemoteError(location, "the upstream answers with another commit")
        return listing

    def _keep(self, listing: ModelListing, revision: str) -> None:
        self._in_memory.get((listing.name, listing.commit), lambda: listing)
        documents = {f"model {listing.name}@{listing.commit}": listing.dump()}
        if not is_hex(revision, _COMMIT):
            pointer = {"name": listing.name, "revision": revision, "commit": listing.commit}
            documents[f"revision {listing.name}@{revision}"] = json.dumps(pointer).encode()
        try:
            # The document of the commit first: a branch must never lead to one that is not here.
            if self._cached.make_room(sum(map(len, documents.values()))):
                for name, data in documents.items():
                    self._cached.write_document(name, data)
        except LocalIOError as error:  # a full disk: what was just asked for can still be told
            _log.warning("the document of a model is not kept: %s", error.what)

    def _absence(self, name: str, revision: str) -> NotFoundError | None:
        """Return the error of a revision that was missing in the last minutes."""
        with self._lock:
            until, kind, what = self._absent.get((name, revision), (0.0, NotFoundError, ""))
        return kind(name, what) if until > time.monotonic() else None

    def _remember_absence(self, name: str, revision: str, error: NotFoundError) -> None:
        with self._lock:
            self._absent[name, revision] = time.monotonic() + _ABSENT_TTL, type(error), error.what
            while len(self._absent) > _MAX_ABSENT:
                self._absent.popitem(last=False)

    def read_document(self, path: str, name: str, limit: int) -> tuple[bytes, str]:
        """Return a document of the upstream's API that is not kept, and its `Link` header.

        Raises:
            NotFoundError: There is none.
            RemoteError: The upstream does not answer.
        """
        answer = self._client.get(f"{self._upstream.endpoint}{path}", name, n=limit)
        return answer.body, answer.headers.get("link", "")
