"""The store: an OCI image layout that holds all bytes of a registry and the log of every move of a ref.

    oci-layout              marks an OCI image layout (image-spec v1.1, `image-layout.md`)
    index.json              derived: every version and tag, so that skopeo and oras read the store in place (`oci_index`)
    blobs/sha256/<hex>      read-only; complete and flushed before the name appears
    packs/sha256/<hex>      the same blobs, compressed on request; only adapterhub reads them (`packs`)
    tensors/sha256/<hex>    derived: the tensors of a blob of weights (`tensor_digests`)
    signatures/sha256/<hex> signatures of versions (`signature_files`)
    refs/, bases/, merges/, hub/  logs: one exclusively created file per move (`ref_log`)
    pending/<id>.json       a move that has begun and that registry.db may not contain yet
    leases/<id>.lease       a running process and the blobs it needs (`leases`)
    gc.json                 derived: what the last gc has read (`maintenance.gc_marks`)
    cache/                  converted versions, which may be deleted at any time (`registry.conversion_cache`)
    tmp/                    incomplete files, which nothing refers to

No file is written under its final name: a killed writer leaves a temporary file, never half a blob or entry.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from adapterhub.digest import Digest, copy_hashing, is_hex, parse_digest, sha256_bytes
from adapterhub.store.packs.pack_chains import READ_DEPTH
from adapterhub.store.packs.pack_folder import Packs
from adapterhub_converters.containers.atomic import sync_to_disk
from adapterhub_converters.errors import IntegrityError, LocalIOError, NotFoundError, RefusedError

from . import oci_index, tensor_digests
from .leases import Lease, active_leases, dead_leases, hold
from .ref_log import BASES, DOCUMENTS, HUB, MERGES, REFS, Entry, RefLog
from .signature_files import Signatures
from .store_files import ASIDE, MAX_DOCUMENT, StoreFiles, local_errors, open_regular, write_all
from .tensor_digests import TensorLists, Tensors

__all__ = [
    "BASES",
    "DOCUMENTS",
    "FOLDER",
    "HUB",
    "MERGES",
    "REFS",
    "ByteCounter",
    "Entry",
    "Progress",
    "Store",
    "counter",
    "local_errors",
    "open_regular",
]

FOLDER = ".adapterhub"
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
# `ingest` is where oras keeps incomplete blobs.
_FOLDERS = {"blobs", "packs", "tensors", "signatures", REFS, *DOCUMENTS, "pending", "tmp", "leases", "cache", "ingest"}
_CHUNK_SIZE = 1 << 20  # bytes
ByteCounter = Callable[[int], object]
"""Called with the number of bytes read since the last call."""
Progress = Callable[[int, int], None]
"""Called with bytes done and total bytes."""


class Store:
    """An OCI image layout below `root`. Open one with `Store(root)`; `create` makes it if it is missing.

    A hub that runs on several machines has a subclass, whose folder is a copy of the blobs that they share
    (`hub.storage.bucket_blobs`).

    Attributes:
        files: Writes files of the store in one step.
        log: The logs of refs, bases and merge recipes.
        packs: Compressed blobs.
        tensors: Lists of the tensors of blobs.
        signatures: Signatures of versions.
        index_file: index.json.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = StoreFiles(root)
        self.log = RefLog(self.files)
        self.packs = Packs(self.files)
        self.tensors = TensorLists(root / "tensors" / "sha256", self.files)
        self.signatures = Signatures(root / "signatures" / "sha256", self.files)
        self.index_file = oci_index.IndexFile(self.files)
        self._blobs = root / "blobs" / "sha256"

    def create(self) -> None:
        """Create the store unless there is one; `oci-layout` is written last, as a store exists only with that file."""
        with local_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self.check()
            for folder in (self._blobs, self.root / REFS, self.root / "pending", self.root / "tmp"):
                self.files.make_dir(folder)
            if not self.index_file.stamp():
                self.index_file.write([])
            self.files.sync(self.root / "blobs")
            if not self.exists():
                self.files.replace(self.root / "oci-layout", _LAYOUT)
                sync_to_disk(self.root.parent)

    def exists(self) -> bool:
        """Return True if there is a store at `root`; RefusedError if `root` is a link."""
        with local_errors(self.root):
            return self.files.is_file(self.root / "oci-layout")

    def check(self) -> None:
        """Raise RefusedError if the store's folder, or one directly in it, is a link; links further down are refused later."""
        if self.root.is_symlink():
            problem = "a link; the store must be a folder of the registry itself"
            raise RefusedError(str(self.root), problem, "Remove it, or name the registry that it leads to", code="linked-store")
        with local_errors(self.root), contextlib.suppress(FileNotFoundError):
            self.files.list_subfolders(self.root)

    # ---- reading blobs

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a blob's plain file, which is missing if the blob is only packed."""
        return self._blobs / parse_digest(digest, "store").removeprefix("sha256:")

    def blobs(self) -> Iterator[Path]:
        """Yield every file in the folder of plain blobs, sorted."""
        with local_errors(self._blobs):
            yield from self.files.list_folder(self._blobs)

    def has_blob(self, digest: Digest, size: int) -> bool:
        """Return True if there is a blob with this digest and size in bytes; its bytes are not read."""
        return self.size(digest) == size

    def size(self, digest: Digest, depth: int = 0) -> int | None:
        """Return the bytes of a blob, plain or packed; None if it is missing, or packed against a parent that is missing."""
        path = self.blob_path(digest)
        if (plain_size := self._plain_size(path)) is not None:
            return plain_size
        with contextlib.suppress(IntegrityError):  # an unreadable pack is missing here; fsck reports it
            head = self.packs.head(digest)
            if head and (not head.parent or (depth < READ_DEPTH and self.size(head.parent, depth + 1) is not None)):
                return head.size
        return self._plain_size(path)  # of a blob that was unpacked between the two checks

    def _plain_size(self, path: Path) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return self.files.status(path).st_size
        return None

    def stored_size(self, digest: Digest) -> int:
        """Return the bytes that a blob occupies on the disk, plain and packed together; 0 if it is missing."""
        total = 0
        for path in (self.blob_path(digest), self.packs.path(digest)):
            with contextlib.suppress(FileNotFoundError):
                total += self.files.status(path).st_size
        return total

    @contextmanager
    def open_blob(self, digest: Digest) -> Iterator[BinaryIO]:
        """Open a blob, plain or packed, for reading, unbuffered. Comparing the digest is up to the reader."""
        with self.open_stream(digest) as file:
            yield file

    def open_stream(self, digest: Digest, depth: int = 0) -> BinaryIO:
        """Open a blob that the caller closes; `depth` is the number of packs that led here, each as the child of the next."""
        path = self.blob_path(digest)
        for _ in range(2):  # a blob unpacked between the two attempts is found by the second
            try:
                return self.files.open(path)
            except FileNotFoundError:
                packed = self.packs.open(digest, self.open_stream, depth)
            except OSError as error:
                raise LocalIOError(str(path), error.strerror or str(error)) from error
            if packed is not None:
                return cast(BinaryIO, packed)
        raise IntegrityError(str(path), f"blob {digest} is missing", "Check the registry", code="check-registry")

    def read_document(self, digest: Digest, *, limit: int = MAX_DOCUMENT) -> bytes:
        """Read a small blob (a manifest, a config, an adapter.json); IntegrityError if its bytes do not have the digest."""
        with self.open_blob(digest) as file, local_errors(self.blob_path(digest)):
            raw, size = b"", 0
            # Read one byte more than the limit, so that a larger blob is noticed without reading all of it.
            while size <= limit and (piece := file.read(min(_CHUNK_SIZE, limit + 1 - size))):
                raw, size = raw + piece, size + len(piece)
        if size > limit or sha256_bytes(raw) != digest:
            problem = f"its bytes do not have the digest {digest}"
            raise IntegrityError(str(self.blob_path(digest)), problem, "Check the registry", code="check-registry")
        return raw

    def rehash(self, digest: Digest, count_bytes: ByteCounter | None = None) -> Digest:
        """Read a blob, plain or packed, and return the digest of its bytes."""
        with self.open_blob(digest) as file, local_errors(self.blob_path(digest)):
            return copy_hashing(file, None, on_bytes=count_bytes)[0]

    def list_tensors(self, digest: Digest, count_bytes: ByteCounter | None = None) -> Tensors | None:
        """Return the tensors of a blob of weights, from its list or, without one, from the blob itself.

        The blob is then read once, and the list is written, or kept in memory if the store cannot be written. Returns None for
        a missing or damaged blob.
        """
        if (stored_list := self.tensors.read(digest)) is not None:
            return stored_list
        with contextlib.suppress(IntegrityError):
            if (size := self.size(digest)) is not None:
                with self.open_blob(digest) as blob, local_errors(self.blob_path(digest)):
                    actual_digest, tensors = tensor_digests.digests(blob, size, count_bytes)
                if actual_digest == digest:
                    self.tensors.keep(digest, tensors)
                    return tensors
        return None

    # ---- writing blobs

    def put_stream(self, source: Any, *, count_bytes: ByteCounter | None = None) -> tuple[Digest, int]:
        """Store the contents of an unbuffered file; return digest and size. Call `sync_blobs` before a ref names the blob."""
        with self.files.temporary() as (path, file):
            # The digest is known only after the copy; if the blob exists already, the copy is dropped.
            digest, size = copy_hashing(source, file, on_bytes=count_bytes)
            if not self.retain_if_present(digest, size):
                self.commit_blob(path, file, digest)
        return digest, size

    def put_bytes(self, data: bytes) -> tuple[Digest, int]:
        """Store bytes as a blob; return digest and size. Call `sync_blobs` before a ref names the blob."""
        digest = sha256_bytes(data)
        if not self.retain_if_present(digest, len(data)):
            with self.files.temporary() as (path, file):
                write_all(file, data)
                self.commit_blob(path, file, digest)
        return digest, len(data)

    def put_back(self, source: Any, digest: Digest, size: int | None) -> bool:
        """Replace a missing or damaged blob with the contents of an unbuffered file; False if these are not its bytes."""
        with self.files.temporary() as (path, file):
            copied = copy_hashing(source, file, limit=2**63 if size is None else size)
            is_right = copied[0] == digest and size in (None, copied[1])
            if is_right:
                self.commit_blob(path, file, digest)
        return is_right

    def retain_if_present(self, digest: Digest, size: int) -> bool:
        """Return True if the blob is stored, and protect it from gc: the current lease lists it, and its time is renewed."""
        if self.files.lease:
            with local_errors(self.root / "leases"):
                self.files.lease.note(digest)
        # The lease lists the blob before this check: a gc either sees the lease, or has removed the blob already.
        if not self.has_blob(digest, size):
            return False
        for path in (self.blob_path(digest), self.packs.path(digest)):
            with contextlib.suppress(OSError):  # perhaps another user's file
                self.files.touch(path)  # for a gc on another host, which cannot tell whether a lease's process still runs
        return True

    def part_path(self, digest: Digest) -> Path:
        """Return the path in tmp/ of a blob that is being received; for a day, a later run can resume it."""
        return self.root / "tmp" / f"{parse_digest(digest, 'store').removeprefix('sha256:')}.part"

    def adopt(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        """Turn a complete file in tmp/ into a blob; the caller has compared its bytes with `digest`."""
        with local_errors(path):
            self.commit_blob(path, file, digest)

    def commit_blob(self, path: Path, file: BinaryIO, digest: Digest) -> None:
        """Flush a complete file in tmp/ and turn it into a blob; every new blob of the store passes through here."""
        # Read-only, as blobs are immutable. Windows has no fchmod.
        if hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), 0o444)
        # Flushed before the rename: after a power cut, a name must never lead to an incomplete blob.
        os.fsync(file.fileno())
        file.close()
        self.files.move(path, self.blob_path(digest))

    def sync_blobs(self) -> None:
        """Flush the folder entries of all blobs stored so far."""
        with local_errors(self._blobs):
            self.files.sync(self._blobs)

    def has_plain(self, digest: Digest) -> bool:
        """Return True if a blob has a plain file."""
        with local_errors(self._blobs):
            return self.files.is_file(self.blob_path(digest))

    def has_pack(self, digest: Digest) -> bool:
        """Return True if a blob has a pack."""
        with local_errors(self.packs.folder):
            return self.files.is_file(self.packs.path(digest))

    # ---- packed blobs

    @contextmanager
    def open_pack(self, digest: Digest) -> Iterator[BinaryIO]:
        """Open the blob in a pack, even if there is a plain file as well."""
        packed = self.packs.open(digest, self.open_stream)
        if packed is None:
            raise NotFoundError(str(self.packs.path(digest)), "no such pack")
        with packed:
            yield cast(BinaryIO, packed)

    def require_packs(self) -> None:
        """Raise RefusedError if this store cannot have packs."""

    def adopt_pack(self, path: Path, digest: Digest) -> None:
        """Replace a plain blob with a complete, flushed and verified pack.

        The plain file is removed only after the pack's name is flushed.
        """
        final = self.packs.path(digest)
        with local_errors(final):
            self.files.make_dir(final.parent)
            # In this order, so that a readable copy of the blob exists at every moment.
            self.files.move(path, final)
            self.files.sync(final.parent)
        self.drop_plain(digest)

    def drop_plain(self, digest: Digest) -> None:
        """Remove the plain file of a blob whose pack is verified. Call this under the write lock."""
        with local_errors(self.blob_path(digest)):
            self._remove(self.blob_path(digest))
            self.files.sync(self._blobs)

    def make_plain(self, digest: Digest, size: int) -> None:
        """Unpack a blob of `size` bytes into a flushed plain file; the pack stays."""
        with self.open_pack(digest) as source, self.files.temporary() as (path, file):
            if copy_hashing(source, file, limit=size) != (digest, size):
                problem = f"its bytes do not have the digest {digest}"
                raise IntegrityError(str(self.packs.path(digest)), problem, "Check the registry", code="check-registry")
            self.commit_blob(path, file, digest)
        self.sync_blobs()

    def drop_pack(self, digest: Digest) -> None:
        """Remove the pack of a blob that has a plain file. Call this under the write lock: a gc might be removing that file."""
        if self.has_plain(digest):
            with local_errors(self.packs.folder):
                self._remove(self.packs.path(digest))
                self.files.sync(self.packs.folder)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.remove(path)

    # ---- what is needed, and what is left over

    @contextmanager
    def lease(self, kind: str, *, required: bool = True) -> Iterator[Lease]:
        """Hold a lease, to which stored blobs are added; a nested call returns the same lease.

        Args:
            kind: What the process does, for a person who reads the file.
            required: Raise LocalIOError if the lease cannot be written.
        """
        if self.files.lease:
            yield self.files.lease
            return
        with hold(self.files, kind, required=required) as lease:
            self.files.lease = lease
            try:
                yield lease
            finally:
                self.files.lease = None

    def leased_digests(self) -> set[Digest]:
        """Return the blobs in leases of running processes."""
        with local_errors(self.root):
            return active_leases(self.files)[0]

    def unknown_folders(self) -> list[Path]:
        """Return the folders that this adapterhub does not know; a newer one may refer to any blob from them."""
        with local_errors(self.root):
            return [path for path in self.files.list_subfolders(self.root) if path.name not in _FOLDERS]

    def restore_set_aside(self) -> None:
        """Give the blobs their names again that a killed process of a hub had set aside: somebody may rely on them."""
        with local_errors(self.root):
            for aside in self.files.list_folder(self.root / "tmp"):
                digits = aside.name.removeprefix(ASIDE)
                if digits != aside.name and is_hex(digits, 64):
                    with contextlib.suppress(FileNotFoundError):  # another thread is taking it back, or restoring it
                        self.files.move(aside, self.blob_path(f"sha256:{digits}"))

    def leftovers(self, age: float) -> list[Path]:
        """Return leases and temporary files of killed processes; a temporary file without a lease only after `age` seconds.

        No blob that was set aside: `restore_set_aside` is for those.
        """
        leftover_paths, active_ids = dead_leases(self.files), active_leases(self.files)[1]
        dead_ids = {path.stem for path in leftover_paths}
        for path in self.files.list_folder(self.root / "tmp"):
            # The name begins with the id of the writer's lease.
            owner = path.name.partition("-")[0]
            if path.name.startswith(ASIDE):
                continue
            with contextlib.suppress(FileNotFoundError):
                if owner in dead_ids or (owner not in active_ids and time.time() - self.files.status(path).st_mtime > age):
                    leftover_paths.append(path)
        return leftover_paths

    def stray_lists(self, needed: set[Digest]) -> list[Path]:
        """Return the tensor lists of blobs that neither exist nor are `needed`."""
        existing = self._existing_or_needed(needed)
        # Check each again: its blob may have been stored, and its list written, since the blobs were listed.
        return [
            self.tensors.path(digest)
            for digest in self.tensors.digests()
            if digest not in existing and not self.stored_size(digest)
        ]

    def stray_signatures(self, needed: set[Digest]) -> list[Path]:
        """Return the signatures of manifests that neither exist nor are `needed`."""
        return [
            path
            for digest, path in self.signatures.signatures_of_others(self._existing_or_needed(needed))
            if not self.stored_size(digest)
        ]

    def _existing_or_needed(self, needed: set[Digest]) -> set[Digest]:
        return needed.union(f"sha256:{path.name}" for path in (*self.blobs(), *self.packs.files()))

    def conversions(self) -> list[Path]:
        """Return the folders of the conversion cache."""
        folder = self.root / "cache"
        with local_errors(folder), contextlib.suppress(FileNotFoundError):  # created with the first conversion
            return self.files.list_folder(folder)
        return []


def counter(progress: Progress | None, total: int) -> ByteCounter | None:
    """Return a function that counts bytes and calls `progress` with bytes done and `total`; None without `progress`."""
    if progress is None:
        return None
    bytes_done = 0

    def count_bytes(count: int) -> None:
        nonlocal bytes_done
        bytes_done += count
        progress(bytes_done, total)

    return count_bytes
