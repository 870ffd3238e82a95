"""An adapter in an object store: `s3://`, `gs://`, `az://`, or a folder, `file://`.

    oci-layout                        as in a local registry's store
    blobs/sha256/<hex>                files, configs and manifests
    refs/<namespace>/<name>/<seq>.json   every move of the name's refs; the first writer of a number wins
    capabilities.json                 records that this store creates exclusively (`probe`)
    tmp/                              leftovers of a probe

Only whole objects are put. A blob is hashed while it is sent, and the store is then asked for its size; it is hashed again when
it is read. Nothing relies on an ETag, a range or a listing.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterhub.digest import CHUNK, Digest, copy_hashing, parse_digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE, MAX_MANIFEST, Descriptor, Manifest
from adapterhub.ref import LATEST, RefError, parse_prefix, parse_tag
from adapterhub.registry.moves import ABSENT, latest_tags, now
from adapterhub.remotes.download import PAUSES, Steady
from adapterhub.remotes.protocol import Connected, Put, Reader, Source, check_complete, damaged
from adapterhub.store.store import FOLDER, Entry
from adapterhub_converters.errors import ConflictError, IntegrityError, NotFoundError, RefusedError

from . import probe as objects_probe
from .address import ObjectAddress
from .bucket import RETRIES, Bucket, Unsupported
from .log import Log, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterhub.remotes.location import Surroundings

PIECE = 16 << 20  # bytes of one part; a smaller blob is sent in one request
_MOST_PIECES = 10_000  # parts of one object on S3
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_TRIES = 30
SINGLE_WRITER = "this store cannot create exclusively; let one writer push at a time"


def parse(text: str) -> ObjectAddress:
    """Parse the address of a name in an object store, with or without a version."""
    return ObjectAddress.parse(text)


def connect(address: ObjectAddress, who: Surroundings) -> Objects:
    """Open a name, with the credentials of the environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`)."""
    return Objects(address, who.environ, author=who.author)


class Objects(Connected):
    """One name in an object store; `close` it in the end.

    Attributes:
        verify: Read each blob again after it was put.
    """

    kind = "an object store"

    def __init__(
        self,
        address: ObjectAddress,
        environ: Mapping[str, str],
        *,
        pauses: Sequence[float] = PAUSES,
        piece: int = PIECE,
        retries: int = RETRIES,
        verify: bool = False,
        author: str = "",
    ) -> None:
        super().__init__()
        self.address, self.verify = address, verify
        self._author, self._message = author, ""
        self._expected: str | None = None
        self._bucket = Bucket(address, environ, retries=retries)
        self._log = Log(self._bucket, address.ref.name)
        self._pauses, self._piece = pauses, piece
        self._exclusive: bool | None = None
        self._lock = threading.Lock()  # several blobs are put at once
        self._there: set[tuple[Digest, int]] = set()

    @property
    def where(self) -> str:
        """The address without a version."""
        return self.address.repository

    def close(self) -> None:
        """Close its connections."""
        self._bucket.close()

    def expect(self, digest: str) -> None:
        """Write the tag only if it is at this digest, its first digits, or ABSENT."""
        self._expected = digest

    def annotate(self, message: str) -> None:
        """Record a message in the log."""
        self._message = message

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a tag, a version number, a range or a digest of this name."""
        where = f"{self.where}{'@' if ':' in reference else ':'}{reference}"
        digest, size = self._log.version(reference, where)
        raw = self._bucket.read(_key(digest), MAX_MANIFEST)
        if raw is None:
            raise IntegrityError(where, f"its manifest {digest} is missing", "Push that version again")
        if (sha256_bytes(raw), len(raw)) != (digest, size):
            raise IntegrityError(where, f"the manifest there is not {digest}", "Push that version again")
        return oci_manifest.parse(raw, where)

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a blob from `start` on."""
        if start and start >= blob.size:
            yield io.BytesIO()
            return
        where = f"{self.where}: {blob.path or blob.digest}"
        with self._bucket.stream(_key(blob.digest), blob.size, start, where) as reader:
            yield reader

    def tags(self) -> list[str]:
        """All tags that point to a version now, sorted, then the numbers of all versions."""
        state = self._log.there()
        return [*sorted(state.tags), *(f"v{number}" for number in sorted(state.versions))]

    def history(self) -> list[Entry]:
        """The entries of the log, the oldest first."""
        self._log.refresh()
        return list(self._log.entries)

    def find(self, digest: Digest) -> Any:
        """An unbuffered file with the unverified bytes of a digest, to be closed; None without one."""
        size = self._bucket.size(_key(digest))
        return None if size is None else Steady(self, Descriptor("", digest, size), pauses=self._pauses)

    # ---- writing

    def has(self, blob: Descriptor) -> bool:
        """Tell whether the object of a blob exists with its size."""
        self._begin()
        return self._is_there(blob)

    def _is_there(self, blob: Descriptor) -> bool:
        found = (blob.digest, blob.size) in self._there or self._bucket.size(_key(blob.digest)) == blob.size
        if found:
            self._there.add((blob.digest, blob.size))
        return found

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Send a blob, hashed while it is sent: wrong bytes never become an object."""
        self._begin()
        where, key = f"{self.where}: {blob.path or blob.digest}", _key(blob.digest)
        piece = max(self._piece, -(-blob.size // _MOST_PIECES))
        with Steady(source, blob, pauses=self._pauses) as reader, ThreadPoolExecutor(2) as workers:
            pieces = _pieces(reader, blob, piece, where, workers)
            if blob.size <= piece:
                self._bucket.put(key, b"".join(pieces))
            else:
                self._bucket.put_pieces(key, pieces, piece)
        stored = self._bucket.size(key)
        if stored != blob.size:
            raise IntegrityError(where, f"the store has {stored} bytes of it, not {blob.size}", "Try again")
        if self.verify:
            with Steady(self, blob, pauses=self._pauses) as reader:
                if copy_hashing(reader, None) != (blob.digest, blob.size):
                    raise IntegrityError(where, "the store has other bytes than were sent", "Try again")
        self._there.add((blob.digest, blob.size))
        return blob.size

    def put_manifest(self, made: Manifest, tag: str | None) -> Put:
        """Make a manifest the next version of the name, or point a tag at the version that it is already."""
        tag = None if tag in (None, LATEST) else parse_tag(str(tag), self.where)
        self._begin()
        check_complete((*made.layers, made.config), self._is_there, self.where)
        itself = Descriptor(MANIFEST_TYPE, made.digest, len(made.raw))
        if not self._is_there(itself):
            self._bucket.put(_key(made.digest), made.raw)
        for _ in range(_TRIES):
            state = self._log.refresh()
            entry = self._decided(state, made, tag)
            if entry is None or self._appended(entry):
                number = entry.number if entry else state.number_of(made.digest)
                return Put(new=entry is not None and entry.op == "push", moved=entry is not None, number=number)
            time.sleep(random.uniform(0, 0.05))  # noqa: S311 - so that concurrent writers do not collide again
        raise ConflictError(self.where, f"others moved it {_TRIES} times in the meantime", "Try again")

    def untag(self, tag: str) -> None:
        """Remove a tag by an entry in the log; the version stays."""
        self._begin()
        for _ in range(_TRIES):
            state = self._log.there()
            if tag not in state.tags:
                raise NotFoundError(f"{self.where}:{tag}", "no such tag", code="no-such-tag", repository=self.where)
            if tag in state.protected:
                raise _protected(f"{self.where}:{tag}")
            name = self.address.ref.name
            if self._appended(Entry(name, state.seq + 1, "untag", now(), tags=(tag,), previous=state.head)):
                return
        raise ConflictError(self.where, f"others moved it {_TRIES} times in the meantime", "Try again")

    def _begin(self) -> None:
        """Check once, before anything is written, that it is allowed, and what the store supports."""
        with self._lock:
            if self._exclusive is None:
                self._exclusive = self._prepared()

    def _prepared(self) -> bool:
        ref, root = self.address.ref, self.address.root
        if ref.number or ref.range or ref.digest:
            raise RefError(
                str(self.address),
                "a push assigns the number itself",
                f"Push to {self.where}, or to a tag of it",
                code="version-number",
            )
        if root.rpartition("/")[2] == FOLDER:
            what = "is the store of a local registry"
            raise RefusedError(self.where, what, "Name an adapter in that registry instead", code="store-of-registry")
        self._bucket.make()
        if self._bucket.read("oci-layout", 1 << 16) is None:
            self._bucket.put("oci-layout", _LAYOUT)
        exclusive = objects_probe.exclusive(self._bucket)
        if self._expected is not None and not exclusive:
            raise RefusedError(self.where, "this store cannot compare and move a tag in one step", code="expect-unsupported")
        state = self._log.refresh()
        if ref.tag or state.deleted:  # before anything is sent; the check before the entry is created decides
            self._check(state, ref.tag)
        self.notes += [] if exclusive else [SINGLE_WRITER]
        return exclusive

    def _check(self, state: State, tag: str | None) -> None:
        """Refuse a push to a deleted name, or to a tag that is at another version than expected."""
        if state.deleted:
            raise ConflictError(self.where, "this name was removed", "Choose another name")
        if self._expected is None:
            return
        wanted = ABSENT if self._expected == ABSENT else parse_prefix(self._expected, f"{self.where}: expected digest")
        found = state.versions.get(state.tags.get(tag or LATEST, 0), (ABSENT, 0))[0]
        if not found.startswith(wanted):
            what = f"moved in the meantime: it is {found}, not {self._expected}"
            raise ConflictError(f"{self.where}:{tag or LATEST}", what, "Review that version, then try again")

    def _decided(self, state: State, made: Manifest, tag: str | None) -> Entry | None:
        """The entry that makes a manifest a version and moves the tag to it; None if both are so already."""
        self._check(state, tag)
        number, name = state.number_of(made.digest), self.address.ref.name
        if number and (tag is None or state.tags.get(tag) == number):
            return None
        if tag in state.protected:
            raise _protected(f"{self.where}:{tag}")
        op, tags = ("tag", (str(tag),)) if number else ("push", latest_tags(tag))
        of = (made.digest, len(made.raw), number or state.number + 1, tags, state.head)
        return Entry(name, state.seq + 1, op, now(), *of, message=self._message)

    def _appended(self, entry: Entry) -> bool:
        """Commit an entry; False when another writer had that number first."""
        self._log.check_room(entry.seq)
        key, raw = self._log.key(entry.seq), replace(entry, author=self._author).dump()
        try:
            created = self._bucket.create(key, raw)
        except Unsupported:
            self._bucket.put(key, raw)
            created = True
        if created and self._exclusive:
            return True
        found = self._log.raw(entry.seq)
        if created and found != raw:
            raise ConflictError(self.where, "another writer wrote at the same time", "Try again, one writer at a time")
        return found == raw  # a repeated request finds the entry that the first one created


def _protected(where: str) -> RefusedError:
    return RefusedError(where, "is protected", "Remove the protection in the registry that set it")


def _key(digest: Digest) -> str:
    return f"blobs/sha256/{parse_digest(digest, 'store').removeprefix('sha256:')}"


def _pieces(reader: Reader, blob: Descriptor, size: int, where: str, workers: ThreadPoolExecutor) -> Iterator[bytearray]:
    """The bytes of a blob in pieces, each hashed while it is sent; IntegrityError instead of the last one for a wrong digest.

    They are read in another thread: the caller may be obstore at work, which must not be entered again in the same thread.
    """
    state, done = hashlib.sha256(), 0
    while True:
        piece = bytearray(min(size, blob.size - done))
        n = workers.submit(_fill, reader, memoryview(piece)).result()
        hashed = workers.submit(state.update, memoryview(piece)[:n])
        done += n
        if n < len(piece) or done == blob.size:
            hashed.result()
            break
        yield piece
        hashed.result()
        del piece, hashed  # before there is the next one
    digest = f"sha256:{state.hexdigest()}"
    if (done, digest) != (blob.size, blob.digest):
        raise damaged(where, done, digest, blob)
    yield piece


def _fill(reader: Reader, piece: memoryview) -> int:
    """Read until `piece` is full or the reader ends; return the number of bytes."""
    done = 0
    while done < len(piece) and (n := reader.readinto(piece[done : done + CHUNK])):
        done += n
    return done
