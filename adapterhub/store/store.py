"""The store: an OCI image layout that holds the bytes, and the log of every move of a ref. It is the truth.

    oci-layout              what makes it an OCI image layout (image-spec v1.1, `image-layout.md`)
    index.json              derived: every version and tag, so that skopeo and oras read the store in place
    blobs/sha256/<hex>      read-only, complete and flushed before the name appears
    tensors/sha256/<hex>    what tensors a blob of weights has (`tensors.py`); derived, made again at will
    packs/sha256/<hex>      the same blobs compressed, where their owner asked for it; only readers of ours know them
    refs/<ns>/<name>/<seq>.json   one move each, created exclusively: the compare-and-swap, and the log
    bases/<name>/<seq>.json       the same for the names of bases (`shelf`)
    merges/<name>/<seq>.json      the same for those of models kept as recipes (`kept`)
    pending/<id>.json       a writer that has begun to move a ref and hasn't told the catalog yet
    tmp/                    files that are not complete; nothing here means anything
    cache/                  conversions made by `forms`, which may go at any time
    leases/<id>.lease       a process at work, and the blobs it needs (`leases.py`)

Nothing is ever written under its final name: a killed writer leaves a temporary file, never half a blob or entry.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from adapterhub.digest import Digest, copy_hashing, parse_digest, sha256_bytes
from adapterhub.store.packs.chains import READ_DEPTH
from adapterhub.store.packs.folder import Packs
from adapterhub_converters.containers.atomic import sync
from adapterhub_converters.errors import IntegrityError, LocalIOError, NotFoundError

from . import oci_index, tensor_digests
from .atomic import local_errors, open_regular, write_all
from .leases import Lease, dead, hold, noted
from .ref_log import BASES, MERGES, REFS, Entry, Logs
from .tensor_digests import Lists, Tensors

__all__ = ["BASES", "FOLDER", "MERGES", "REFS", "Entry", "More", "Progress", "Store", "local_errors", "open_regular", "told"]

FOLDER = ".adapterhub"
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
# `ingest` is where oras puts what isn't complete.
_FOLDERS = {"blobs", "packs", "tensors", REFS, BASES, MERGES, "pending", "tmp", "leases", "cache", "ingest"}
_MAX_DOCUMENT = 4 << 20
_PIECE = 1 << 20
More = Callable[[int], object]
"""Is told how many bytes more were read."""
Progress = Callable[[int, int], None]
"""Is told bytes done and bytes in all."""


class Store(Logs):
    """An OCI image layout below `root`; open it with `Store(root)`, make one with `Store.create`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._blobs = root / "blobs" / "sha256"
        self.packs = Packs(root / "packs" / "sha256")
        self.tensors = Lists(root / "tensors" / "sha256")

    @classmethod
    def create(cls, root: Path) -> Store:
        """A store at `root`, which may hold one already; `oci-layout` comes last, so that half a store is none."""
        store = cls(root)
        with local_errors(root):
            for folder in (store._blobs, root / "refs", root / "pending", root / "tmp"):
                folder.mkdir(parents=True, exist_ok=True)
            if not (root / "index.json").exists():
                store._replace(root / "index.json", oci_index.build([]))
            sync(root / "blobs")
            if not store.exists():
                store._replace(root / "oci-layout", _LAYOUT)
                sync(root.parent)
        return store

    def exists(self) -> bool:
        """Whether there is a store here."""
        return (self.root / "oci-layout").is_file()

    # ---- blobs

    def blob_path(self, digest: Digest) -> Path:
        """Where a blob lies, or would, when it isn't packed."""
        return self._blobs / parse_digest(digest, "store").removeprefix("sha256:")

    def has(self, digest: Digest, size: int) -> bool:
        """Whether a blob of that digest and size in bytes is there; its bytes aren't read."""
        return self.size(digest) == size

    def size(self, digest: Digest, depth: int = 0) -> int | None:
        """Bytes of a blob, plain or packed; None when it isn't there, or is the difference to one that isn't."""
        # Unpacked between our two looks, it or a parent is there at the next; once is enough, or a circle would take 2^depth.
        for _ in range(1 if depth else 2):
            with contextlib.suppress(FileNotFoundError):
                return self.blob_path(digest).stat().st_size
            with contextlib.suppress(IntegrityError):  # fsck says so; for us there is nothing
                head = self.packs.head(digest)
                if head and (not head.parent or (depth < READ_DEPTH and self.size(head.parent, depth + 1) is not None)):
                    return head.size
        return None

    def put_stream(
        self, source: Any, *, beside: Callable[[memoryview], object] | None = None, more: More | None = None
    ) -> tuple[Digest, int]:
        """Store what an unbuffered file holds; its digest and size in bytes. Call `sync_blobs` before naming it.

        `beside` and `more` as `copy_hashing` takes them.
        """
        with self._temporary() as (path, file):
            digest, size = copy_hashing(source, file, consumer=beside, more=more)
            if not self._found(digest, size):
                self._settle(path, file, self.blob_path(digest))
        return digest, size

    def put_back(self, source: Any, digest: Digest, size: int | None) -> bool:
        """Store what an unbuffered file holds in place of a blob that is missing or wrong, if these are the right bytes."""
        with self._temporary() as (path, file):
            found = copy_hashing(source, file, limit=2**63 if size is None else size)
            right = found[0] == digest and size in (None, found[1])
            if right:
                self._settle(path, file, self.blob_path(digest))
        return right

    def put_bytes(self, data: bytes) -> tuple[Digest, int]:
        """Store bytes in memory."""
        digest = sha256_bytes(data)
        if not self._found(digest, len(data)):
            with self._temporary() as (path, file):
                write_all(file, data)
                self._settle(path, file, self.blob_path(digest))
        return digest, len(data)

    def holds(self, digest: Digest, size: int) -> bool:
        """`has`, for who is about to name it: noted in the lease that is held."""
        return self._found(digest, size)

    def part_path(self, digest: Digest) -> Path:
        """Where a blob comes in from elsewhere, bit by bit; what a killed run left there is gone on with for a day."""
        return self.root / "tmp" / f"{parse_digest(digest, 'store').removeprefix('sha256:')}.part"

    def adopt(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        """Give a complete file in tmp/, whose bytes have been found to be those of `digest`, its name."""
        with local_errors(path):
            self._settle(path, file, self.blob_path(digest))

    def _found(self, digest: Digest, size: int) -> bool:
        """`has`, for who needs the blob to stay."""
        if self._lease:
            with local_errors(self.root / "leases"):
                self._lease.note(digest)
        if not self.has(digest, size):
            return False
        for path in (self.blob_path(digest), self.packs.path(digest)):
            with contextlib.suppress(OSError):  # another user's, perhaps
                os.utime(path)  # as young as one just written, where leases say nothing
        return True

    def _settle(self, path: Path, file: BinaryIO, final: Path) -> None:
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), 0o444)
        os.fsync(file.fileno())
        file.close()
        os.replace(path, final)

    def sync_blobs(self) -> None:
        """Make the names of all blobs put so far survive a power cut."""
        with local_errors(self._blobs):
            sync(self._blobs)

    @contextmanager
    def open_blob(self, digest: Digest) -> Iterator[BinaryIO]:
        """A blob for reading, unbuffered, plain or packed; the reader checks the digest."""
        with self.opened(digest) as file:
            yield file

    def opened(self, digest: Digest, depth: int = 0) -> BinaryIO:
        """The same for who closes it; `depth`: of how many differences it is the parent."""
        path = self.blob_path(digest)
        for _ in range(2):  # unpacked between our two looks, it is there at the next
            try:
                return open(path, "rb", buffering=0)
            except FileNotFoundError:
                packed = self.packs.open(digest, self.opened, depth)
            except OSError as error:
                raise LocalIOError(str(path), error.strerror or str(error)) from error
            if packed is not None:
                return cast(BinaryIO, packed)
        raise IntegrityError(str(path), f"blob {digest} is missing", "Run `adapterhub fsck`")

    def rehash(self, digest: Digest, more: More | None = None) -> Digest:
        """The digest of a blob's bytes as they are now, plain or packed."""
        with self.open_blob(digest) as file, local_errors(Path(file.name)):
            return copy_hashing(file, None, more=more)[0]

    def keep_tensors(self, digest: Digest, found: Tensors) -> None:
        """Say what tensors a blob has, unless that is said. Not flushed: half a list is known for one, and made again."""
        if self.tensors.read(digest) is None:
            final = self.tensors.path(digest)
            with local_errors(final), self._temporary() as (path, file):
                self._make_dir(final.parent)
                write_all(file, tensor_digests.dump(found))
                file.close()
                os.replace(path, final)

    def list_tensors(self, digest: Digest, more: More | None = None) -> Tensors | None:
        """The tensors of a blob, which is read where that isn't said; None where it isn't there, or has other bytes."""
        if (known := self.tensors.read(digest)) is not None:
            return known
        with contextlib.suppress(IntegrityError):
            if (size := self.size(digest)) is not None:
                with self.open_blob(digest) as blob, local_errors(Path(blob.name)):
                    found = tensor_digests.digests(blob, size, more)
                if found[0] == digest:
                    self.keep_tensors(digest, found[1])
                    return found[1]
        return None

    @contextmanager
    def open_pack(self, digest: Digest) -> Iterator[BinaryIO]:
        """The blob in a pack, even where it lies plain as well."""
        packed = self.packs.open(digest, self.opened)
        if packed is None:
            raise NotFoundError(str(self.packs.path(digest)), "no such pack")
        with packed:
            yield cast(BinaryIO, packed)

    def stored(self, digest: Digest) -> int:
        """Bytes that a blob takes on the disk, however it lies; 0 when it isn't there."""
        found = 0
        for path in (self.blob_path(digest), self.packs.path(digest)):
            with contextlib.suppress(FileNotFoundError):
                found += path.stat().st_size
        return found

    def adopt_pack(self, path: Path, digest: Digest) -> None:
        """Let a complete, flushed and proven pack stand for its plain blob, which goes once the pack's name is safe."""
        final = self.packs.path(digest)
        with local_errors(final):
            self._make_dir(final.parent)
            os.replace(path, final)
            sync(final.parent)
        self.drop_plain(digest)

    def drop_plain(self, digest: Digest) -> None:
        """Remove the plain file of a blob whose pack is proven; under the write lock."""
        with local_errors(self.blob_path(digest)):
            _remove(self.blob_path(digest))
            sync(self._blobs)

    def make_plain(self, digest: Digest, size: int) -> None:
        """Make a packed blob of `size` bytes plain again; the plain name is safe, the pack still there."""
        with self.open_pack(digest) as source, self._temporary() as (path, file):
            if copy_hashing(source, file, limit=size) != (digest, size):
                raise IntegrityError(str(self.packs.path(digest)), f"holds other bytes than {digest}", "Run `adapterhub fsck`")
            self._settle(path, file, self.blob_path(digest))
        self.sync_blobs()

    def drop_pack(self, digest: Digest) -> None:
        """Remove the pack of a blob that is plain too; under the write lock, as one who packs may just remove the plain one."""
        if self.blob_path(digest).exists():
            with local_errors(self.packs.folder):
                _remove(self.packs.path(digest))
                sync(self.packs.folder)

    def read_document(self, digest: Digest, *, limit: int = _MAX_DOCUMENT) -> bytes:
        """The bytes of a small blob (a manifest, a config, adapter.json), checked against its digest."""
        with self.open_blob(digest) as file, local_errors(Path(file.name)):
            raw = b"".join(_pieces(file, limit))
        if len(raw) > limit or sha256_bytes(raw) != digest:
            raise IntegrityError(str(self.blob_path(digest)), f"its bytes are not those of {digest}", "Run `adapterhub fsck`")
        return raw

    def blobs(self) -> Iterator[Path]:
        """Every file where blobs lie, sorted."""
        with local_errors(self._blobs):
            yield from sorted(self._blobs.iterdir())

    # ---- what is needed and what is not

    @contextmanager
    def lease(self, kind: str, *, required: bool = True) -> Iterator[Lease]:
        """Hold a lease; blobs that are put meanwhile are noted in it. One within another is that one.

        `required`: Not having one is an error.
        """
        if self._lease:
            yield self._lease
            return
        with hold(self.root / "leases", kind, required=required) as lease:
            self._lease = lease
            try:
                yield lease
            finally:
                self._lease = None

    def leased(self) -> set[Digest]:
        """The blobs that processes at work have said they need."""
        return noted(self.root / "leases")[0]

    def unknown(self) -> list[Path]:
        """Folders in the store that this adapterhub knows nothing of; a newer one may keep there what it needs of the blobs."""
        with local_errors(self.root):
            return sorted(path for path in self.root.iterdir() if path.is_dir() and path.name not in _FOLDERS)

    def leftovers(self, age: float) -> list[Path]:
        """What killed processes left: their leases and temporary files; those of no known lease after `age` seconds."""
        found, at_work = dead(self.root / "leases"), noted(self.root / "leases")[1]
        gone = {path.stem for path in found}
        for path in sorted((self.root / "tmp").iterdir()):
            owner = path.name.partition("-")[0]
            with contextlib.suppress(FileNotFoundError):
                if owner in gone or (owner not in at_work and time.time() - path.stat().st_mtime > age):
                    found.append(path)
        return found

    def stray_lists(self, needed: set[Digest]) -> list[Path]:
        """Lists of tensors of blobs that are neither there nor `needed`."""
        there = needed.union(f"sha256:{path.name}" for path in (*self.blobs(), *self.packs.files()))
        # Looked at again: a push puts the blob before its list.
        return [self.tensors.path(of) for of in self.tensors.digests() if of not in there and not self.stored(of)]

    def conversions(self) -> list[Path]:
        """What `forms` keeps, a folder each."""
        folder = self.root / "cache"
        with local_errors(folder), contextlib.suppress(FileNotFoundError):  # the first one makes it
            return sorted(folder.iterdir())
        return []

    # ---- the index

    def write_index(self, lines: list[oci_index.Line]) -> str:
        """Replace index.json by one of these lines; what `index_stamp` says of it."""
        return self._write_index(oci_index.build(lines))

    def change_index(self, changes: list[tuple[str, list[oci_index.Line], str | None]]) -> str:
        """Change the lines of some names in index.json: name, lines, and the name that comes after it.

        Empty where that cannot be done: the file is not what `write_index` makes.
        """
        path = self.root / "index.json"
        with local_errors(path):
            text = path.read_bytes()
        try:
            for name, lines, before in changes:
                text = oci_index.replace(text, name, lines, before=before)
        except ValueError:
            return ""
        return self._write_index(text)

    def _write_index(self, text: bytes) -> str:
        with local_errors(self.root / "index.json"):
            self._replace(self.root / "index.json", text)
        return self.index_stamp()

    def index_stamp(self) -> str:
        """Which file index.json is: its inode, size and time; another after anybody has written it, as every move does."""
        try:
            found = os.stat(self.root / "index.json")
        except OSError:
            return ""
        return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"

    def index_is_ours(self, lines: list[oci_index.Line]) -> bool:
        """Whether index.json is what `write_index` would make of these lines, byte for byte."""
        try:
            return (self.root / "index.json").read_bytes() == oci_index.build(lines)
        except OSError:
            return False

    def index_is(self, lines: list[oci_index.Line]) -> bool:
        """Whether index.json says just this."""
        try:
            return oci_index.says((self.root / "index.json").read_bytes(), lines)
        except OSError:
            return False


def told(progress: Progress | None, total: int) -> More | None:
    """What tells `progress`, if there is one, of `total` bytes."""
    if progress is None:
        return None
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return more


def _pieces(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """What an unbuffered file holds, until it ends or has shown that it holds more than `limit` bytes."""
    size = 0
    while size <= limit and (piece := file.read(min(_PIECE, limit + 1 - size))):
        size += len(piece)
        yield piece


def _remove(path: Path) -> None:
    """Remove a read-only file, if it is there; Windows wants it writable for that."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        path.chmod(0o644)
        path.unlink(missing_ok=True)
