"""An adapter in an object store: `s3://`, `gs://`, `az://`, or a folder, `file://`.

    oci-layout                        as in a local registry's store
    blobs/sha256/<hex>                files, configs and manifests
    refs/<namespace>/<name>/<seq>.json   every move of the name's refs; the first writer of a number wins
    capabilities.json                 records that this store creates exclusively (`exclusive_create`)
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
from adapterhub.remotes.download import PAUSES, ResumingReader
from adapterhub.remotes.protocol import OpenRemote, PutResult, Reader, Source, check_complete, damaged_error
from adapterhub.store.store import FOLDER, Entry
from adapterhub_converters.errors import ConflictError, IntegrityError, NotFoundError, RefusedError

from . import exclusive_create as objects_probe
from .bucket import RETRIES, Bucket, ExclusiveCreateUnsupported
from .name_log import NameLog, NameState
from .object_address import ObjectAddress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterhub.remotes.remote_address import UserSettings

PIECE = 16 << 20  # bytes of one part; a smaller blob is sent in one request
_MAX_PIECES = 10_000  # parts of one object on S3
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_MAX_TRIES = 30
SINGLE_WRITER = "this store cannot create exclusively; let one writer push at a time"


def parse(text: str) -> ObjectAddress:
    """Parse the address of a name in an object store, with or without a version."""
    return ObjectAddress.parse(text)


def connect(address: ObjectAddress, surroundings: UserSettings) -> ObjectRepository:
    """Open a name, with the credentials of the environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`)."""
    return ObjectRepository(address, surroundings.environ, author=surroundings.author)


class ObjectRepository(OpenRemote):
    """One name in an object store, to be closed after use.

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
        self._log = NameLog(self._bucket, address.ref.name)
        self._pauses, self._piece = pauses, piece
        self._exclusive: bool | None = None
        self._lock = threading.Lock()  # several blobs are put at once
        self._stored: set[tuple[Digest, int]] = set()

    @property
    def location(self) -> str:
        """The address without a version."""
        return self.address.repository

    def close(self) -> None:
        """Close the connections."""
        self._bucket.close()

    def expect(self, digest: str) -> None:
        """Write the tag only if it is at this digest, or its first digits, or ABSENT."""
        self._expected = digest

    def annotate(self, message: str) -> None:
        """Record a message in the log."""
        self._message = message

    # ---- reading

    def manifest(self, reference: str) -> Manifest:
        """Return the manifest of a tag, a version number, a range or a digest of this name."""
        label = self._label_at(reference)
        digest, size = self._log.version(reference, label)
        raw = self._bucket.read(_blob_key(digest), MAX_MANIFEST)
        if raw is None:
            raise IntegrityError(label, f"its manifest {digest} is missing", "Push that version again")
        if (sha256_bytes(raw), len(raw)) != (digest, size):
            raise IntegrityError(label, f"the manifest there is not {digest}", "Push that version again")
        return oci_manifest.parse(raw, label)

    def resolve(self, reference: str) -> Digest:
        """Return the digest of what a reference names now, by the log of the name, without reading the manifest."""
        return self._log.version(reference, self._label_at(reference))[0]

    def _label_at(self, reference: str) -> str:
        return f"{self.location}{'@' if ':' in reference else ':'}{reference}"

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a blob for reading from `start` on."""
        if start and start >= blob.size:
            yield io.BytesIO()
            return
        label = f"{self.location}: {blob.path or blob.digest}"
        with self._bucket.stream(_blob_key(blob.digest), blob.size, start, label) as reader:
            yield reader

    def tags(self) -> list[str]:
        """Return all tags that point to a version now, sorted, then the numbers of all versions."""
        state = self._log.existing_state()
        return [*sorted(state.tags), *(f"v{number}" for number in sorted(state.versions))]

    def history(self) -> list[Entry]:
        """Return the entries of the log, oldest first."""
        self._log.refresh()
        return list(self._log.entries)

    def open_digest(self, digest: Digest) -> Any:
        """Open a digest as an unbuffered file of unverified bytes, for the caller to close; None without one."""
        size = self._bucket.size(_blob_key(digest))
        return None if size is None else ResumingReader(self, Descriptor("", digest, size), pauses=self._pauses)

    # ---- writing

    def has_blob(self, blob: Descriptor) -> bool:
        """Return whether the object of a blob exists with its size; False where a push would first create the place."""
        try:
            return self._is_stored(blob)
        except NotFoundError:
            return False

    def _is_stored(self, blob: Descriptor) -> bool:
        is_stored = (blob.digest, blob.size) in self._stored or self._bucket.size(_blob_key(blob.digest)) == blob.size
        if is_stored:
            self._stored.add((blob.digest, blob.size))
        return is_stored

    def put_blob(self, blob: Descriptor, source: Source) -> int:
        """Send a blob, hashed while it is sent: wrong bytes never become an object."""
        self._prepare_once()
        label, key = f"{self.location}: {blob.path or blob.digest}", _blob_key(blob.digest)
        piece = max(self._piece, -(-blob.size // _MAX_PIECES))
        with ResumingReader(source, blob, pauses=self._pauses) as reader, ThreadPoolExecutor(2) as workers:
            pieces = _pieces(reader, blob, piece, label, workers)
            if blob.size <= piece:
                self._bucket.put_object(key, b"".join(pieces))
            else:
                self._bucket.put_pieces(key, pieces, piece)
        # Don't rely on the answer to the upload: ask how much of the blob is there.
        stored_size = self._bucket.size(key)
        if stored_size != blob.size:
            raise IntegrityError(label, f"the store has {stored_size} bytes of it, not {blob.size}", "Try again")
        if self.verify:
            with ResumingReader(self, blob, pauses=self._pauses) as reader:
                if copy_hashing(reader, None) != (blob.digest, blob.size):
                    raise IntegrityError(label, "the store has other bytes than were sent", "Try again")
        self._stored.add((blob.digest, blob.size))
        return blob.size

    def put_manifest(self, manifest: Manifest, tag: str | None) -> PutResult:
        """Make a manifest the next version of the name, or point a tag at the version that it already is."""
        tag = None if tag in (None, LATEST) else parse_tag(str(tag), self.location)
        self._prepare_once()
        check_complete((*manifest.layers, manifest.config), self._is_stored, self.location)
        manifest_blob = Descriptor(MANIFEST_TYPE, manifest.digest, len(manifest.raw))
        if not self._is_stored(manifest_blob):
            self._bucket.put_object(_blob_key(manifest.digest), manifest.raw)
        # Another writer may take the next number in the log first: then decide again on the new state.
        for _ in range(_MAX_TRIES):
            state = self._log.refresh()
            entry = self._next_entry(state, manifest, tag)
            if entry is None or self._append(entry):
                number = entry.number if entry else state.number_of(manifest.digest)
                return PutResult(new=entry is not None and entry.op == "push", moved=entry is not None, number=number)
            time.sleep(random.uniform(0, 0.05))  # noqa: S311 - so that concurrent writers do not collide again
        raise ConflictError(self.location, f"others moved it {_MAX_TRIES} times in the meantime", "Try again")

    def untag(self, tag: str) -> None:
        """Remove a tag by an entry in the log; the version stays."""
        self._prepare_once()
        for _ in range(_MAX_TRIES):
            state = self._log.existing_state()
            if tag not in state.tags:
                raise NotFoundError(f"{self.location}:{tag}", "no such tag", code="no-such-tag", repository=self.location)
            if tag in state.protected:
                raise _protected_error(f"{self.location}:{tag}")
            name = self.address.ref.name
            if self._append(Entry(name, state.seq + 1, "untag", now(), tags=(tag,), previous=state.head)):
                return
        raise ConflictError(self.location, f"others moved it {_MAX_TRIES} times in the meantime", "Try again")

    def _prepare_once(self) -> None:
        """Check once, before anything is written, that writing is allowed, and what the store supports."""
        with self._lock:
            if self._exclusive is None:
                self._exclusive = self._prepare()

    def _prepare(self) -> bool:
        """Prepare the store for writing; return whether it creates objects exclusively."""
        ref, root = self.address.ref, self.address.root
        if ref.number or ref.range or ref.digest:
            raise RefError(
                str(self.address),
                "a push assigns the number itself",
                f"Push to {self.location}, or to a tag of it",
                code="version-number",
            )
        if root.rpartition("/")[2] == FOLDER:
            problem = "is the store of a local registry"
            raise RefusedError(self.location, problem, "Name an adapter in that registry instead", code="store-of-registry")
        self._bucket.create_folder()
        if self._bucket.read("oci-layout", 1 << 16) is None:
            self._bucket.put_object("oci-layout", _LAYOUT)
        exclusive = objects_probe.creates_exclusively(self._bucket)
        # Comparing and moving in one step takes exclusive creation of log entries.
        if self._expected is not None and not exclusive:
            raise RefusedError(self.location, "this store cannot compare and move a tag in one step", code="expect-unsupported")
        state = self._log.refresh()
        # Fail before anything is sent; the check that decides is the one before the entry is created.
        if ref.tag or state.deleted:
            self._check_expected(state, ref.tag)
        self.notes += [] if exclusive else [SINGLE_WRITER]
        return exclusive

    def _check_expected(self, state: NameState, tag: str | None) -> None:
        """Refuse a push to a deleted name, or to a tag that is not at the expected version."""
        if state.deleted:
            raise ConflictError(self.location, "this name was removed", "Choose another name")
        if self._expected is None:
            return
        expected = ABSENT if self._expected == ABSENT else parse_prefix(self._expected, f"{self.location}: expected digest")
        current = state.versions.get(state.tags.get(tag or LATEST, 0), (ABSENT, 0))[0]
        if not current.startswith(expected):
            problem = f"moved in the meantime: it is {current}, not {self._expected}"
            raise ConflictError(f"{self.location}:{tag or LATEST}", problem, "Review that version, then try again")

    def _next_entry(self, state: NameState, manifest: Manifest, tag: str | None) -> Entry | None:
        """Return the entry that makes a manifest a version and moves the tag to it; None if there is nothing to change."""
        self._check_expected(state, tag)
        number, name = state.number_of(manifest.digest), self.address.ref.name
        # The same push again, such as after a lost answer, changes nothing.
        if number and (tag is None or state.tags.get(tag) == number):
            return None
        if tag in state.protected:
            raise _protected_error(f"{self.location}:{tag}")
        op, tags = ("tag", (str(tag),)) if number else ("push", latest_tags(tag))
        version_fields = (manifest.digest, len(manifest.raw), number or state.number + 1, tags, state.head)
        return Entry(name, state.seq + 1, op, now(), *version_fields, message=self._message)

    def _append(self, entry: Entry) -> bool:
        """Commit an entry; return False if another writer had that number first."""
        self._log.check_room(entry.seq)
        key, raw = self._log.key(entry.seq), replace(entry, author=self._author).dump()
        try:
            was_created = self._bucket.create_object(key, raw)
        except ExclusiveCreateUnsupported:
            self._bucket.put_object(key, raw)
            was_created = True
        if was_created and self._exclusive:
            return True
        # Without exclusive creation, or if the answer was lost, only the stored bytes tell who wrote the entry.
        stored_entry = self._log.read_entry(entry.seq)
        if was_created and stored_entry != raw:
            raise ConflictError(self.location, "another writer wrote at the same time", "Try again, one writer at a time")
        return stored_entry == raw  # a repeated request finds the entry that the first one created


def _protected_error(location: str) -> RefusedError:
    """Return the error for a move of a protected tag."""
    return RefusedError(location, "is protected", "Remove the protection in the registry that set it")


def _blob_key(digest: Digest) -> str:
    return f"blobs/sha256/{parse_digest(digest, 'store').removeprefix('sha256:')}"


def _pieces(reader: Reader, blob: Descriptor, size: int, location: str, workers: ThreadPoolExecutor) -> Iterator[bytearray]:
    """Yield the bytes of a blob in pieces, each hashed while it is sent.

    They are read in another thread: the caller may be obstore at work, which must not be entered again in the same thread.

    Raises:
        IntegrityError: The digest is wrong; raised instead of yielding the last piece.
    """
    state, sent = hashlib.sha256(), 0
    while True:
        piece = bytearray(min(size, blob.size - sent))
        count = workers.submit(_fill, reader, memoryview(piece)).result()
        hash_job = workers.submit(state.update, memoryview(piece)[:count])
        sent += count
        if count < len(piece) or sent == blob.size:
            hash_job.result()
            break
        yield piece
        hash_job.result()
        del piece, hash_job  # free it before the next piece is allocated
    digest = f"sha256:{state.hexdigest()}"
    if (sent, digest) != (blob.size, blob.digest):
        raise damaged_error(location, sent, digest, blob)
    yield piece


def _fill(reader: Reader, piece: memoryview) -> int:
    """Read until `piece` is full or the reader ends; return the number of bytes."""
    filled = 0
    while filled < len(piece) and (count := reader.readinto(piece[filled : filled + CHUNK])):
        filled += count
    return filled
