"""Lossless compression of the blobs that versions need, and its reversal.

A blob is packed if that saves enough, either alone or as a delta to a near parent: the same file in an earlier version of the
name, in an earlier push of the same shape to the namespace, or any earlier file with most of its tensors. The plain file is
removed once the pack has been flushed, read back and found to have the digest. A killed writer leaves the blob plain, packed,
or both, which the next `pack` or `pack --undo` tidies up.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub.digest import Digest, copy_hashing
from adapterhub.index import queries, tensor_search
from adapterhub.index.queries import VersionRow
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.project import PROJECT
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.packs import byte_planes, container, cutting, pack_chains
from adapterhub.store.store import local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.errors import IntegrityError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

DEFAULT_LEVEL = byte_planes.DEFAULT_LEVEL
_DAY = 86400  # seconds
_MAX_RELATIVES = 4  # candidates for a parent: this many earlier versions, and as many versions of other names
_MIN_SAVING = 4096  # bytes; file systems free nothing smaller than a block
_MAX_SHARE = 0.97  # a pack larger than this share of the blob is not worth keeping
_KINSHIP_COLUMNS = ("base", "method", "r", "format", "dtype", "parameters")

Progress = Callable[[int, int], None]
"""Callback that takes the bytes done and the total bytes."""


@dataclass(frozen=True)
class PackingOutcome:
    """The outcome of packing or unpacking one blob.

    Attributes:
        ref: The first version that needs the blob.
        path: Its path in that version.
        size: Bytes of the blob.
        stored: Bytes it takes on disk now, or would take after a dry run.
        parent: The blob that its pack is a delta to; empty if there is none.
        outcome: `packed`; `kept` if packing would save too little; `already` if it was packed before; `unpacked`.
    """

    ref: str
    path: str
    digest: Digest
    size: int
    stored: int
    parent: Digest
    outcome: str


def pack(
    registry: Registry,
    names: Sequence[str] = (),
    *,
    level: int = DEFAULT_LEVEL,
    dry_run: bool = False,
    min_age: float = 0,
    progress: Progress | None = None,
) -> list[PackingOutcome]:
    """Pack the blobs of the versions of `names`, or of all versions.

    Manifests, configs and adapter.json stay plain because they are small and read often. Weights whose tensors are not listed
    yet are read first, to find parents.

    Args:
        registry: The registry.
        names: Names, namespaces or refs.
        level: zstd's level for bytes that are not numbers.
        dry_run: Pack nothing, but return the outcomes that packing would have.
        min_age: Leave out versions that were pushed fewer seconds ago.
        progress: Called with bytes done and total bytes.

    Raises:
        RefusedError: The store keeps no packs.
    """
    registry.store.require_packs()
    if not dry_run:
        registry.store.files.sweep()
    # Parents are found by the tensors that files share, so these must be listed first.
    registry.list_tensors(progress)
    with _leased_rows(registry, names) as rows:
        packer = _Packer(registry, level, dry_run=dry_run)
        newest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=min_age)
        old_enough = [row for row in rows if not min_age or datetime.datetime.fromisoformat(row.time) < newest]
        return [packer.pack(row, layer) for row, layer in _unique_blobs(registry, old_enough, progress)]


def is_wanted(registry: Registry) -> bool:
    """Return whether a gc is to pack old versions: the adapterhub.toml of the registry has `pack = true`."""
    from adapterhub.project import settings_file  # late: most commands have read it, or need none

    file = registry.root / PROJECT
    return os.path.lexists(file) and settings_file.read(file, follow=False).pack


def pack_old(registry: Registry, *, dry_run: bool = False) -> list[PackingOutcome]:
    """Pack the versions of over a day."""
    return pack(registry, dry_run=dry_run, min_age=_DAY)


def unpack(
    registry: Registry, names: Sequence[str] = (), *, dry_run: bool = False, progress: Progress | None = None
) -> list[PackingOutcome]:
    """Unpack the blobs of the versions of `names`, or of all versions; with `dry_run`, only return those that are packed."""
    with _leased_rows(registry, names) as rows:
        blobs = _unique_blobs(registry, rows, progress)
        return [
            _outcome(row, layer, layer.size, "", "unpacked")
            for row, layer in blobs
            if _unpack(registry, layer, dry_run=dry_run)
        ]


def _unpack(registry: Registry, layer: Descriptor, *, dry_run: bool) -> bool:
    """Unpack a blob, unless this is a `dry_run`, and return whether it was packed."""
    if registry.store.packs.head(layer.digest) is None:
        return False
    if dry_run:
        return True
    try:
        registry.store.make_plain(layer.digest, layer.size)
    except NotFoundError:  # another process unpacked it in the meantime
        return False
    # The pack is dropped only after the plain file is complete, so that a killed process loses nothing.
    with registry.write_lock():
        registry.store.drop_pack(layer.digest)
    return True


@contextmanager
def _leased_rows(registry: Registry, names: Sequence[str]) -> Iterator[list[VersionRow]]:
    """Yield the versions of `names`, under a lease that keeps a gc from removing their blobs until the context ends."""
    with registry.store.lease("pack", required=False) as lease:
        for row in selected_versions(registry, names):
            lease.note(row.digest)
        yield selected_versions(
            registry, names
        )  # selected again: a version may have been dropped before its lease was noted, as in `Registry.reading`


def _unique_blobs(
    registry: Registry, rows: Sequence[VersionRow], progress: Progress | None
) -> Iterator[tuple[VersionRow, Descriptor]]:
    """Yield every blob once, with the oldest version that needs it: later blobs may become deltas to it."""
    blobs: dict[Digest, tuple[VersionRow, Descriptor]] = {}
    for row in rows:
        for layer in _layers(registry, row):
            # adapter.json is read by nearly every command, so it stays plain.
            if layer.path != ADAPTER_JSON:
                blobs.setdefault(layer.digest, (row, layer))
    bytes_done, total = 0, sum(layer.size for _, layer in blobs.values())
    for row, layer in blobs.values():
        yield row, layer
        bytes_done += layer.size
        if progress:
            progress(bytes_done, total)


def selected_versions(registry: Registry, names: Sequence[str]) -> list[VersionRow]:
    """Return the versions of names, namespaces or refs, or all versions, oldest push first."""
    rows: dict[tuple[str, int], VersionRow] = {}
    for name in names or (None,):
        for row in _rows(registry, name):
            rows[row.name, row.number] = row
    return sorted(rows.values(), key=_push_order)


def _push_order(row: VersionRow) -> tuple[str, str, int]:
    """Return a key that sorts versions by the time of their push."""
    return row.time, row.name, row.number


def _rows(registry: Registry, name: str | None) -> list[VersionRow]:
    if name is not None and (":" in name or "@" in name):
        version = registry.row(Ref.parse(name))
        return [row for row in registry.list(version.name) if row.number == version.number]
    rows = registry.list(name)
    if name is not None and not rows:
        problem = "no adapter of this name or namespace"
        raise NotFoundError(name, problem, "List the adapters of the registry", code="no-such-adapter")
    return rows


def _layers(registry: Registry, row: VersionRow) -> tuple[Descriptor, ...]:
    return oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref)).layers


def _outcome(row: VersionRow, layer: Descriptor, stored: int, parent: Digest, outcome: str) -> PackingOutcome:
    return PackingOutcome(str(row.ref), layer.path, layer.digest, layer.size, stored, parent, outcome)


class _Packer:
    """A packer of blobs, one at a time.

    Attributes:
        parents: The parent of each pack, including those that a dry run would write.
    """

    def __init__(self, registry: Registry, level: int, *, dry_run: bool) -> None:
        self.registry, self.store, self.level, self.dry_run = registry, registry.store, level, dry_run
        self.parents = self.store.packs.parents()

    def pack(self, row: VersionRow, layer: Descriptor) -> PackingOutcome:
        """Pack a blob if that saves enough."""
        if self.store.has_pack(layer.digest) and self._has_valid_pack(layer):
            with contextlib.suppress(FileNotFoundError):  # another process has just unpacked it
                head = self.store.packs.head(layer.digest)
                stored = self.store.files.status(self.store.packs.path(layer.digest)).st_size
                return _outcome(row, layer, stored, head.parent if head else "", "already")
        if layer.size <= _MIN_SAVING:
            return _outcome(row, layer, layer.size, "", "kept")
        with contextlib.ExitStack() as stack:
            blob = stack.enter_context(self.store.open_blob(layer.digest))
            runs = cutting.runs(container.offset_reader(blob), layer.size)
            parent, runs = self._nearest_parent(row, layer, blob, runs, stack)
            return self._encode(row, layer, blob, runs, parent)

    def _has_valid_pack(self, layer: Descriptor) -> bool:
        """Return whether an existing pack is valid; then remove a plain file that a killed writer left next to it."""
        # Without a plain file the pack is all there is, and fsck is what judges it.
        if not self.store.has_plain(layer.digest) or self.dry_run:
            return True
        with contextlib.suppress(IntegrityError), self.store.open_pack(layer.digest) as file:
            if copy_hashing(file, None, limit=layer.size) == (layer.digest, layer.size):
                with self.registry.write_lock():
                    if self.store.has_pack(layer.digest):  # unless another process has unpacked it in the meantime
                        self.store.drop_plain(layer.digest)
                        return True
        return False

    def _encode(
        self,
        row: VersionRow,
        layer: Descriptor,
        blob: BinaryIO,
        runs: list[cutting.Run],
        parent: tuple[Digest, BinaryIO] | None,
    ) -> PackingOutcome:
        """Encode a blob, verify the pack, and replace the plain file if that saves enough."""
        with contextlib.ExitStack() as stack:
            path, file = (Path(), None) if self.dry_run else stack.enter_context(self.store.files.temporary())
            written = self._write(file, layer, blob, runs, parent)
            digest = parent[0] if parent and written.delta else ""
            if layer.size - written.size < _MIN_SAVING or written.size > _MAX_SHARE * layer.size:
                return _outcome(row, layer, layer.size, "", "kept")
            if file is not None:
                # The plain file may be the only other copy: nothing replaces it before the pack has been read back.
                self._verify_pack(path, layer, parent)
                if not self._adopt(path, layer.digest, digest):
                    return _outcome(row, layer, layer.size, "", "kept")
            if digest:
                self.parents[layer.digest] = digest
            return _outcome(row, layer, written.size, digest, "packed")

    def _write(
        self,
        file: BinaryIO | None,
        layer: Descriptor,
        blob: BinaryIO,
        runs: list[cutting.Run],
        parent: tuple[Digest, BinaryIO] | None,
    ) -> container.PackSizes:
        buffered: Any = _NullFile() if file is None else io.BufferedWriter(file)
        parent_source = (parent[0], container.offset_reader(parent[1])) if parent else None
        blocks = cutting.blocks(runs)
        written = container.write(
            buffered, container.offset_reader(blob), layer.size, blocks, parent=parent_source, level=self.level
        )
        if file is not None:
            buffered.flush()
            # Detached, because the temporary file belongs to the store, which closes it.
            buffered.detach()
            # On disk before the plain file is removed, so that a power failure loses neither.
            os.fsync(file.fileno())
            if hasattr(os, "fchmod"):
                # Blobs and packs are read-only, so that no other program modifies one by accident.
                os.fchmod(file.fileno(), 0o444)
        return written

    def _verify_pack(self, path: Path, layer: Descriptor, parent: tuple[Digest, BinaryIO] | None) -> None:
        """Read a whole pack back.

        Raises:
            IntegrityError: The unpacked bytes do not have the blob's digest.
        """
        with local_errors(path), self.store.files.open(path) as file:
            reader = container.PackReader(file, str(path), parent[1] if parent else None)
            if copy_hashing(reader, None, limit=layer.size) != (layer.digest, layer.size):
                blob_path = str(self.store.blob_path(layer.digest))
                problem = "its bytes do not have the digest of its name; it was not packed"
                raise IntegrityError(blob_path, problem, "Check the registry", code="check-registry")

    def _adopt(self, path: Path, digest: Digest, parent: Digest) -> bool:
        """Replace a blob with its pack.

        Return False if the blob or its parent has been removed meanwhile, or if the parent now needs the blob.
        """
        with self.registry.write_lock():
            # Checked under the lock: since the blob was encoded, a gc or another command may have changed it or its parent.
            if not self.store.has_plain(digest):
                return False
            if parent and (self.store.size(parent) is None or digest in self._parent_chain(parent)):
                return False
            self.store.adopt_pack(path, digest)
        return True

    def _parent_chain(self, digest: Digest) -> list[Digest]:
        """Return `digest` and the chain of parents that it needs on disk now."""
        chain = [digest]
        while len(chain) <= pack_chains.READ_DEPTH and (head := self.store.packs.head(chain[-1])) and head.parent:
            chain.append(head.parent)
        return chain

    # ---- parents

    def _nearest_parent(
        self, row: VersionRow, layer: Descriptor, blob: BinaryIO, runs: list[cutting.Run], stack: contextlib.ExitStack
    ) -> tuple[tuple[Digest, BinaryIO] | None, list[cutting.Run]]:
        """Return the open parent from which the blob differs least, and the runs with their offsets in that parent."""
        nearest, smallest_share = None, _MAX_SHARE
        for candidate in self._candidates(row, layer):
            with contextlib.suppress(IntegrityError):  # a damaged blob cannot be a parent
                file = stack.enter_context(self.store.open_blob(candidate.digest))
                parent_runs = cutting.runs(container.offset_reader(file), candidate.size)
                matched = cutting.match_to_parent(runs, parent_runs, self._equal_tensors(layer.digest, candidate.digest))
                alone, delta = container.gain(
                    container.offset_reader(blob), list(cutting.blocks(matched)), container.offset_reader(file)
                )
                # Runs without a counterpart in the parent gain nothing from it, so only the matched share shrinks.
                share = sum(run.size for run in matched if run.parent is not None) / layer.size
                if alone and 1 - share * (1 - delta / alone) < smallest_share:
                    nearest, smallest_share = (candidate.digest, file, matched), 1 - share * (1 - delta / alone)
        return ((nearest[0], nearest[1]), nearest[2]) if nearest else (None, runs)

    def _candidates(self, row: VersionRow, layer: Descriptor) -> list[Descriptor]:
        """Return files of related versions, each once, leaving out those that would create a cycle or too long a chain."""
        if not is_weights(layer.path):
            return []
        candidates: dict[Digest, Descriptor] = {}
        for relative in self._related_versions(row):
            for candidate in self._layers(relative):
                if candidate.path == layer.path and pack_chains.may_follow(layer.digest, candidate.digest, self.parents):
                    candidates.setdefault(candidate.digest, candidate)
        for candidate in self._files_sharing_tensors(row, layer):
            if pack_chains.may_follow(layer.digest, candidate.digest, self.parents):
                candidates.setdefault(candidate.digest, candidate)
        return list(candidates.values())

    def _files_sharing_tensors(self, row: VersionRow, layer: Descriptor) -> list[Descriptor]:
        """Return files of earlier versions that share most tensors with this one."""
        listed = self.store.list_tensors(layer.digest) or ()
        near = tensor_search.nearest(self.registry.index, self.store, listed)
        older = [share for share in near if share.digest != layer.digest and _push_order(share.row) < _push_order(row)]
        sizes = {share.digest: self.store.size(share.digest) for share in older[: 4 * _MAX_RELATIVES]}
        return [Descriptor(layer.media_type, digest, size) for digest, size in sizes.items() if size is not None][
            :_MAX_RELATIVES
        ]

    def _equal_tensors(self, digest: Digest, parent: Digest) -> dict[str, str]:
        """Map the names of a file's tensors to names of tensors in its parent that have the same bytes under another name."""
        parent_tensors = self.store.list_tensors(parent) or ()
        names = {tensor.digest: tensor.name for tensor in parent_tensors}
        named_alike = {(tensor.name, tensor.digest) for tensor in parent_tensors}
        renamed_tensors = [
            tensor for tensor in self.store.list_tensors(digest) or () if (tensor.name, tensor.digest) not in named_alike
        ]
        return {tensor.name: names[tensor.digest] for tensor in renamed_tensors if tensor.digest in names}

    def _related_versions(self, row: VersionRow) -> list[VersionRow]:
        """Return the latest versions of the name before `row`, and the latest similar ones of other names in its namespace."""
        same_name = [earlier for earlier in queries.versions(self.registry.index, name=row.name) if earlier.number < row.number]
        near = queries.similar(self.registry.index, row, _KINSHIP_COLUMNS)
        older = [earlier for earlier in near if _push_order(earlier) < _push_order(row)]
        return same_name[:_MAX_RELATIVES] + sorted(older, key=_push_order, reverse=True)[:_MAX_RELATIVES]

    def _layers(self, row: VersionRow) -> tuple[Descriptor, ...]:
        """Return the layers of a version, or nothing if its manifest is damaged."""
        try:
            return _layers(self.registry, row)
        except IntegrityError:
            return ()


class _NullFile(io.RawIOBase):
    """A file that discards everything written to it."""

    def write(self, data: Any) -> int:
        """Discard the data and return its length."""
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Return the offset unchanged."""
        return offset
