"""Compresses the blobs that versions need, and makes them plain again. A version stays what it is, to the byte.

A blob is packed when that saves something worth having, against nothing or as a difference to a near parent: the same
file in an earlier version of the name, or in an earlier push to its namespace that is of the same shape. The plain file goes
after the pack, flushed, has been read back and has given the digest. A writer killed anywhere leaves the blob plain,
packed, or both; the next `pack` or `unpack` tidies that up.
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
from adapterhub.index import tensor_search
from adapterhub.index.database import Row
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.packs import byte_planes, chains, container, cutting
from adapterhub.store.store import local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.errors import IntegrityError, NotFoundError

DEFAULT_LEVEL = byte_planes.DEFAULT_LEVEL
_NEAR = 4  # versions back, and as many of other names, that are looked at for a parent
_LEAST = 4096  # bytes: a file system gives no less back
_WORTH = 0.97
_KIN = ("base", "method", "r", "format", "dtype", "parameters")

Progress = Callable[[int, int], None]
"""Bytes done, bytes in all."""


@dataclass(frozen=True)
class Change:
    """What became of one blob.

    Attributes:
        ref: The first version that needs it.
        path: What it is called there.
        size: Bytes of the blob.
        stored: Bytes it takes on the disk now, or would.
        parent: What it is a difference to, if it is one.
        outcome: `packed`; `kept`: plain, as packing gains too little; `already`: it was packed; `unpacked`.
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
    """Pack what the versions of `names` need, or all versions; `dry_run` only says what it would come to.

    Manifests, configs and adapter.json stay plain: they are small, and read by everybody.
    """
    if not dry_run:
        registry.store.sweep()
    with _held(registry, names) as rows:
        packer = _Packer(registry, level, dry_run=dry_run)
        return [packer.pack(row, layer) for row, layer in _work(registry, rows, progress)]


def unpack(registry: Registry, names: Sequence[str] = (), *, progress: Progress | None = None) -> list[Change]:
    """Make plain what the versions of `names` need, or all versions."""
    with _held(registry, names) as rows:
        found = _work(registry, rows, progress)
        return [_change(row, layer, layer.size, "", "unpacked") for row, layer in found if _unpack(registry, layer)]


def _unpack(registry: Registry, layer: Descriptor) -> bool:
    """Make one blob plain; whether it was packed."""
    if registry.store.packs.head(layer.digest) is None:
        return False
    try:
        registry.store.make_plain(layer.digest, layer.size)
    except NotFoundError:  # somebody else unpacked it meanwhile
        return False
    with registry.locked():
        registry.store.drop_pack(layer.digest)
    return True


@contextmanager
def _held(registry: Registry, names: Sequence[str]) -> Iterator[list[Row]]:
    """The versions of `names`; no gc removes a blob of them until the context ends."""
    with registry.store.lease("pack", required=False) as lease:
        for row in selected(registry, names):
            lease.note(row.digest)
        yield selected(registry, names)  # looked at again, as in `Registry.reading`


def _work(registry: Registry, rows: Sequence[Row], progress: Progress | None) -> Iterator[tuple[Row, Descriptor]]:
    """Every blob once, with the first version that needs it: the oldest, as those after it may become differences to it."""
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
    """The versions that names, namespaces or refs mean, all if there are none of them; the oldest push first."""
    rows: dict[tuple[str, int], Row] = {}
    for name in names or (None,):
        for row in _rows(registry, name):
            rows[row.name, row.number] = row
    return sorted(rows.values(), key=_age)


def _age(row: Row) -> tuple[str, str, int]:
    """Sorts versions as they were pushed."""
    return row.time, row.name, row.number


def _rows(registry: Registry, name: str | None) -> list[Row]:
    if name is not None and (":" in name or "@" in name):
        version = registry.resolve(Ref.parse(name))
        return [row for row in registry.list(version.name) if row.number == version.number]
    rows = registry.list(name)
    if name is not None and not rows:
        raise NotFoundError(name, "no adapter of this name or namespace", "Run `adapterhub list`")
    return rows


def _layers(registry: Registry, row: Row) -> tuple[Descriptor, ...]:
    return oci_manifest.parse(registry.store.read_document(row.digest), str(row.ref)).layers


def _change(row: Row, layer: Descriptor, stored: int, parent: Digest, outcome: str) -> Change:
    return Change(str(row.ref), layer.path, layer.digest, layer.size, stored, parent, outcome)


class _Packer:
    """Packs blobs one by one; knows which pack needs which blob, a run that only tries included."""

    def __init__(self, registry: Registry, level: int, *, dry_run: bool) -> None:
        self.registry, self.store, self.level, self.dry_run = registry, registry.store, level, dry_run
        self.parents = self.store.packs.parents()

    def pack(self, row: Row, layer: Descriptor) -> Change:
        """Pack one blob, if that is worth it."""
        if self.store.packs.path(layer.digest).exists() and self._settled(layer):
            head = self.store.packs.head(layer.digest)
            stored = self.store.packs.path(layer.digest).stat().st_size
            return _change(row, layer, stored, head.parent if head else "", "already")
        if layer.size <= _LEAST:
            return _change(row, layer, layer.size, "", "kept")
        with contextlib.ExitStack() as stack:
            blob = stack.enter_context(self.store.open_blob(layer.digest))
            runs = cutting.runs(container.at(blob), layer.size)
            parent, runs = self._nearest(row, layer, blob, runs, stack)
            return self._encoded(row, layer, blob, runs, parent)

    def _settled(self, layer: Descriptor) -> bool:
        """Whether a pack that is there is right; a plain blob beside it, as a killed writer leaves one, then goes."""
        if not self.store.blob_path(layer.digest).exists() or self.dry_run:
            return True
        with contextlib.suppress(IntegrityError), self.store.open_pack(layer.digest) as file:
            if copy_hashing(file, None, limit=layer.size) == (layer.digest, layer.size):
                with self.registry.locked():
                    if self.store.packs.path(layer.digest).exists():  # nobody unpacked it meanwhile
                        self.store.drop_plain(layer.digest)
                        return True
        return False

    def _encoded(
        self, row: Row, layer: Descriptor, blob: BinaryIO, runs: list[cutting.Run], parent: tuple[Digest, BinaryIO] | None
    ) -> Change:
        with contextlib.ExitStack() as stack:
            path, file = (Path(), None) if self.dry_run else stack.enter_context(self.store.temporary())
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
        """Read a pack back, all of it; IntegrityError when that does not give the blob."""
        with local_errors(path), open(path, "rb", buffering=0) as file:
            again = container.Reader(file, str(path), parent[1] if parent else None)
            if copy_hashing(again, None, limit=layer.size) != (layer.digest, layer.size):
                where = str(self.store.blob_path(layer.digest))
                raise IntegrityError(
                    where, "its bytes are not those of its name, so it was not packed", "Run `adapterhub fsck`"
                )

    def _adopt(self, path: Path, digest: Digest, parent: Digest) -> bool:
        """Put a pack in the place of its blob, unless either went meanwhile, or the parent became a difference to us."""
        with self.registry.locked():
            if not self.store.blob_path(digest).exists():
                return False
            if parent and (self.store.size(parent) is None or digest in self._above(parent)):
                return False
            self.store.adopt_pack(path, digest)
        return True

    def _above(self, digest: Digest) -> list[Digest]:
        """What `digest` needs, as it is on the disk now."""
        found = [digest]
        while len(found) <= chains.READ_DEPTH and (head := self.store.packs.head(found[-1])) and head.parent:
            found.append(head.parent)
        return found

    # ---- parents

    def _nearest(
        self, row: Row, layer: Descriptor, blob: BinaryIO, runs: list[cutting.Run], stack: contextlib.ExitStack
    ) -> tuple[tuple[Digest, BinaryIO] | None, list[cutting.Run]]:
        """The parent to which the blob differs least, open, and the runs with their places in it."""
        best, least = None, _WORTH
        for candidate in self._candidates(row, layer):
            with contextlib.suppress(IntegrityError):  # a damaged one is no parent
                file = stack.enter_context(self.store.open_blob(candidate.digest))
                theirs = cutting.runs(container.at(file), candidate.size)
                matched = cutting.matched(runs, theirs, self._equal(layer.digest, candidate.digest))
                alone, delta = container.gain(container.at(blob), list(cutting.blocks(matched)), container.at(file))
                # What the parent lacks is no shorter for it.
                share = sum(run.size for run in matched if run.parent is not None) / layer.size
                if alone and 1 - share * (1 - delta / alone) < least:
                    best, least = (candidate.digest, file, matched), 1 - share * (1 - delta / alone)
        return ((best[0], best[1]), best[2]) if best else (None, runs)

    def _candidates(self, row: Row, layer: Descriptor) -> list[Descriptor]:
        """The same file in versions that may be near, each once: those it would make no circle or long chain with."""
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
        """Files of earlier versions that have most of its tensors."""
        listed = self.store.tensors.read(layer.digest) or ()
        near = tensor_search.nearest(self.registry.catalog, self.store, listed)
        older = [share for share in near if share.digest != layer.digest and _age(share.row) < _age(row)]
        sizes = {share.digest: self.store.size(share.digest) for share in older[: 4 * _NEAR]}
        return [Descriptor(layer.media_type, digest, size) for digest, size in sizes.items() if size is not None][:_NEAR]

    def _equal(self, digest: Digest, parent: Digest) -> dict[str, str]:
        """What tensors of a file are called in another that has the same bytes under another name."""
        theirs = self.store.tensors.read(parent) or ()
        names = {tensor.digest: tensor.name for tensor in theirs}
        own = {(tensor.name, tensor.digest) for tensor in theirs}
        ours = [tensor for tensor in self.store.tensors.read(digest) or () if (tensor.name, tensor.digest) not in own]
        return {tensor.name: names[tensor.digest] for tensor in ours if tensor.digest in names}

    def _kin(self, row: Row) -> list[Row]:
        rows = self.registry.catalog.rows
        own = rows("name = ? AND number < ?", row.name, row.number)[:_NEAR]
        space = row.name.partition("/")[0] + "/"
        like = " AND ".join(f"{key} IS ?" for key in _KIN)
        near = rows(f"name <> ? AND substr(name, 1, length(?)) = ? AND {like}", row.name, space, space, *_values(row))
        older = [other for other in near if _age(other) < _age(row)]
        return own + sorted(older, key=_age, reverse=True)[:_NEAR]

    def _layers(self, row: Row) -> tuple[Descriptor, ...]:
        try:
            return _layers(self.registry, row)
        except IntegrityError:
            return ()


def _values(row: Row) -> list[object]:
    return [getattr(row, key) for key in _KIN]


class _Nowhere(io.RawIOBase):
    """Takes everything and keeps nothing."""

    def write(self, data: Any) -> int:
        """As if it were written."""
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As if."""
        return offset
