"""Lossless compression of the blobs that versions need, and its reversal.

A blob is packed if that saves enough, alone or as a difference to a near parent: the same file in an earlier version of the
name, in an earlier push of the same shape to the namespace, or any earlier file with most of its tensors. The plain file is
removed after the pack was flushed, read back and found to have the digest. A killed writer leaves the blob plain, packed, or
both, which the next `pack` or `unpack` tidies up.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub.digest import Digest, copy_hashing
from adapterhub.index import queries, tensors
from adapterhub.index.queries import Row
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.packs import byte_planes, chains, container, cutting
from adapterhub.store.store import local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.errors import IntegrityError, NotFoundError

DEFAULT_LEVEL = byte_planes.DEFAULT_LEVEL
_NEAR = 4  # earlier versions, and as many of other names, that are candidates for a parent
_LEAST = 4096  # bytes: a file system frees no less
_WORTH = 0.97  # share of the size above which a pack is not worth it
_KIN = ("base", "method", "r", "format", "dtype", "parameters")

Progress = Callable[[int, int], None]
"""Called with bytes done and total bytes."""


@dataclass(frozen=True)
class Change:
    """Outcome for one blob.

    Attributes:
        ref: The first version that needs it.
        path: Its path there.
        size: Bytes of the blob.
        stored: Bytes it takes on the disk now, or would take.
        parent: The blob it is a difference to; empty if it is not one.
        outcome: `packed`; `kept`: plain, as packing saves too little; `already`: it was packed; `unpacked`.
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
    progress: Progress | None = None,
) -> list[Change]:
    """Pack the blobs of the versions of `names`, or of all versions.

    Manifests, configs and adapter.json stay plain: they are small and read often. Weights whose tensors are not listed yet are
    read first, to find parents.

    Args:
        registry: The registry.
        names: Names, namespaces or refs.
        level: zstd's level for bytes that are not numbers.
        dry_run: Pack nothing; the outcomes are those of packing.
        progress: Called with bytes done and total bytes.
    """
    if not dry_run:
        registry.store.files.sweep()
    registry.list_tensors(progress)
    with _held(registry, names) as rows:
        packer = _Packer(registry, level, dry_run=dry_run)
        return [packer.pack(row, layer) for row, layer in _work(registry, rows, progress)]


def unpack(registry: Registry, names: Sequence[str] = (), *, progress: Progress | None = None) -> list[Change]:
    """Unpack the blobs of the versions of `names`, or of all versions."""
    with _held(registry, names) as rows:
        found = _work(registry, rows, progress)
        return [_change(row, layer, layer.size, "", "unpacked") for row, layer in found if _unpack(registry, layer)]


def _unpack(registry: Registry, layer: Descriptor) -> bool:
    """Unpack a blob; return True if it was packed."""
    if registry.store.packs.head(layer.digest) is None:
        return False
    try:
        registry.store.make_plain(layer.digest, layer.size)
    except NotFoundError:  # another process unpacked it meanwhile
        return False
    with registry.locked():
        registry.store.drop_pack(layer.digest)
    return True


@contextmanager
def _held(registry: Registry, names: Sequence[str]) -> Iterator[list[Row]]:
    """Return the versions of `names`; no gc removes a blob of them until the context ends."""
    with registry.store.lease("pack", required=False) as lease:
        for row in selected(registry, names):
            lease.note(row.digest)
        yield selected(registry, names)  # selected again, as in `Registry.reading`


def _work(registry: Registry, rows: Sequence[Row], progress: Progress | None) -> Iterator[tuple[Row, Descriptor]]:
    """Yield every blob once, with the oldest version that needs it: later blobs may become differences to it."""
    found: dict[Digest, tuple[Row, Descriptor]] = {}
    for row in rows:
        for layer in _layers(registry, row):
            if layer.path != ADAPTER_JSON:
                found.setdefault(layer.digest, (row, layer))
    done, total = 0, sum(layer.size for _, layer in found.values())
    for row, layer in found.values():
        yield row, layer
        done += layer.size
        if progress:
            progress(done, total)


def selected(registry: Registry, names: Sequence[str]) -> list[Row]:
    """Return the versions of names, namespaces or refs, or all versions, oldest push first."""
    rows: dict[tuple[str, int], Row] = {}
    for name in names or (None,):
        for row in _rows(registry, name):
            rows[row.name, row.number] = row
    return sorted(rows.values(), key=_age)


def _age(row: Row) -> tuple[str, str, int]:
    """Return a key that sorts versions by push."""
    return row.time, row.name, row.number


def _rows(registry: Registry, name: str | None) -> list[Row]:
    if name is not None and (":" in name or "@" in name):
        version = registry.resolve(Ref.parse(name))
        return [row for row in registry.list(version.name) if row.number == version.number]
    rows = registry.list(name)
    if name is not None and not rows:
        what = "no adapter of this name or namespace"
        raise NotFoundError(name, what, "List the adapters of the registry", code="no-such-adapter")
    return rows


def _layers(registry: Registry, row: Row) -> tuple[Descriptor, ...]:
    return oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref)).layers


def _change(row: Row, layer: Descriptor, stored: int, parent: Digest, outcome: str) -> Change:
    return Change(str(row.ref), layer.path, layer.digest, layer.size, stored, parent, outcome)


class _Packer:
    """Packs blobs one by one; `parents` has the parent of each pack, including those of a dry run."""

    def __init__(self, registry: Registry, level: int, *, dry_run: bool) -> None:
        self.registry, self.store, self.level, self.dry_run = registry, registry.store, level, dry_run
        self.parents = self.store.packs.parents()

    def pack(self, row: Row, layer: Descriptor) -> Change:
        """Pack a blob if that saves enough."""
        if self.store.has_pack(layer.digest) and self._settled(layer):
            with contextlib.suppress(FileNotFoundError):  # another process has just unpacked it
                head = self.store.packs.head(layer.digest)
                stored = self.store.files.status(self.store.packs.path(layer.digest)).st_size
                return _change(row, layer, stored, head.parent if head else "", "already")
        if layer.size <= _LEAST:
            return _change(row, layer, layer.size, "", "kept")
        with contextlib.ExitStack() as stack:
            blob = stack.enter_context(self.store.open_blob(layer.digest))
            runs = cutting.runs(container.at(blob), layer.size)
            parent, runs = self._nearest(row, layer, blob, runs, stack)
            return self._encoded(row, layer, blob, runs, parent)

    def _settled(self, layer: Descriptor) -> bool:
        """Return True if an existing pack is right; a plain file left next to it by a killed writer is then removed."""
        if not self.store.has_plain(layer.digest) or self.dry_run:
            return True
        with contextlib.suppress(IntegrityError), self.store.open_pack(layer.digest) as file:
            if copy_hashing(file, None, limit=layer.size) == (layer.digest, layer.size):
                with self.registry.locked():
                    if self.store.has_pack(layer.digest):  # no other process unpacked it meanwhile
                        self.store.drop_plain(layer.digest)
                        return True
        return False

    def _encoded(
        self, row: Row, layer: Descriptor, blob: BinaryIO, runs: list[cutting.Run], parent: tuple[Digest, BinaryIO] | None
    ) -> Change:
        with contextlib.ExitStack() as stack:
            path, file = (Path(), None) if self.dry_run else stack.enter_context(self.store.files.temporary())
            written = self._write(file, layer, blob, runs, parent)
            digest = parent[0] if parent and written.delta else ""
            if layer.size - written.size < _LEAST or written.size > _WORTH * layer.size:
                return _change(row, layer, layer.size, "", "kept")
            if file is not None:
                self._prove(path, layer, parent)
                if not self._adopt(path, layer.digest, digest):
                    return _change(row, layer, layer.size, "", "kept")
            if digest:
                self.parents[layer.digest] = digest
            return _change(row, layer, written.size, digest, "packed")

    def _write(
        self,
        file: BinaryIO | None,
        layer: Descriptor,
        blob: BinaryIO,
        runs: list[cutting.Run],
        parent: tuple[Digest, BinaryIO] | None,
    ) -> container.Written:
        buffered: Any = _Nowhere() if file is None else io.BufferedWriter(file)
        known = (parent[0], container.at(parent[1])) if parent else None
        blocks = cutting.blocks(runs)
        written = container.write(buffered, container.at(blob), layer.size, blocks, parent=known, level=self.level)
        if file is not None:
            buffered.flush()
            buffered.detach()
            os.fsync(file.fileno())
            if hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), 0o444)
        return written

    def _prove(self, path: Path, layer: Descriptor, parent: tuple[Digest, BinaryIO] | None) -> None:
        """Read a whole pack back; IntegrityError if the bytes do not have the blob's digest."""
        with local_errors(path), self.store.files.open(path) as file:
            again = container.Reader(file, str(path), parent[1] if parent else None)
            if copy_hashing(again, None, limit=layer.size) != (layer.digest, layer.size):
                where = str(self.store.blob_path(layer.digest))
                what = "its bytes do not have the digest of its name; it was not packed"
                raise IntegrityError(where, what, "Check the registry", code="check-registry")

    def _adopt(self, path: Path, digest: Digest, parent: Digest) -> bool:
        """Replace a blob with its pack, unless blob or parent was removed meanwhile, or the parent now needs the blob."""
        with self.registry.locked():
            if not self.store.has_plain(digest):
                return False
            if parent and (self.store.size(parent) is None or digest in self._above(parent)):
                return False
            self.store.adopt_pack(path, digest)
        return True

    def _above(self, digest: Digest) -> list[Digest]:
        """Return `digest` and the parents it needs on the disk now."""
        found = [digest]
        while len(found) <= chains.READ_DEPTH and (head := self.store.packs.head(found[-1])) and head.parent:
            found.append(head.parent)
        return found

    # ---- parents

    def _nearest(
        self, row: Row, layer: Descriptor, blob: BinaryIO, runs: list[cutting.Run], stack: contextlib.ExitStack
    ) -> tuple[tuple[Digest, BinaryIO] | None, list[cutting.Run]]:
        """Return the open parent to which the blob differs least, and the runs with their offsets in it."""
        best, least = None, _WORTH
        for candidate in self._candidates(row, layer):
            with contextlib.suppress(IntegrityError):  # a damaged blob cannot be a parent
                file = stack.enter_context(self.store.open_blob(candidate.digest))
                theirs = cutting.runs(container.at(file), candidate.size)
                matched = cutting.matched(runs, theirs, self._equal(layer.digest, candidate.digest))
                alone, delta = container.gain(container.at(blob), list(cutting.blocks(matched)), container.at(file))
                # The part that the parent lacks is not shortened by it.
                share = sum(run.size for run in matched if run.parent is not None) / layer.size
                if alone and 1 - share * (1 - delta / alone) < least:
                    best, least = (candidate.digest, file, matched), 1 - share * (1 - delta / alone)
        return ((best[0], best[1]), best[2]) if best else (None, runs)

    def _candidates(self, row: Row, layer: Descriptor) -> list[Descriptor]:
        """Return files of versions that may be near, each once, without those that would make a circle or a long chain."""
        if not is_weights(layer.path):
            return []
        found: dict[Digest, Descriptor] = {}
        for other in self._kin(row):
            for candidate in self._layers(other):
                if candidate.path == layer.path and chains.may_follow(layer.digest, candidate.digest, self.parents):
                    found.setdefault(candidate.digest, candidate)
        for candidate in self._twins(row, layer):
            if chains.may_follow(layer.digest, candidate.digest, self.parents):
                found.setdefault(candidate.digest, candidate)
        return list(found.values())

    def _twins(self, row: Row, layer: Descriptor) -> list[Descriptor]:
        """Return files of earlier versions that have most of its tensors."""
        listed = self.store.list_tensors(layer.digest) or ()
        near = tensors.nearest(self.registry.index, self.store, listed)
        older = [share for share in near if share.digest != layer.digest and _age(share.row) < _age(row)]
        sizes = {share.digest: self.store.size(share.digest) for share in older[: 4 * _NEAR]}
        return [Descriptor(layer.media_type, digest, size) for digest, size in sizes.items() if size is not None][:_NEAR]

    def _equal(self, digest: Digest, parent: Digest) -> dict[str, str]:
        """Return the names of tensors of a file to the names of tensors in another that have the same bytes."""
        theirs = self.store.list_tensors(parent) or ()
        names = {tensor.digest: tensor.name for tensor in theirs}
        own = {(tensor.name, tensor.digest) for tensor in theirs}
        ours = [tensor for tensor in self.store.list_tensors(digest) or () if (tensor.name, tensor.digest) not in own]
        return {tensor.name: names[tensor.digest] for tensor in ours if tensor.digest in names}

    def _kin(self, row: Row) -> list[Row]:
        """Return the last versions of the name before `row`, and the last similar ones of other names in its namespace."""
        own = [other for other in queries.versions(self.registry.index, name=row.name) if other.number < row.number]
        near = queries.similar(self.registry.index, row, _KIN)
        older = [other for other in near if _age(other) < _age(row)]
        return own[:_NEAR] + sorted(older, key=_age, reverse=True)[:_NEAR]

    def _layers(self, row: Row) -> tuple[Descriptor, ...]:
        try:
            return _layers(self.registry, row)
        except IntegrityError:
            return ()


class _Nowhere(io.RawIOBase):
    """A file that discards what is written."""

    def write(self, data: Any) -> int:
        """Discard the data."""
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Return the offset."""
        return offset
