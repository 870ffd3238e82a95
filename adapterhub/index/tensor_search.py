"""Finding versions by tensors: of a file that no version has as a whole, which versions have what is in it.

Bytes are compared, not names: a tensor is found in a file of another format too, and under another name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adapterhub.digest import Digest
from adapterhub.store.store import Store
from adapterhub.store.tensor_digests import Tensors, shared

from . import tensor_rows
from .database import Catalog, Row
from .search import Holder, holders

LIMIT = 20
_FILES = 64  # looked at in their lists


@dataclass(frozen=True, slots=True)
class Share:
    """A file of a version, `digest`, that has `count` of the tensors that were looked for, of `size` bytes."""

    row: Row
    path: str
    digest: Digest
    count: int
    size: int


def nearest(catalog: Catalog, store: Store, tensors: Tensors, limit: int = LIMIT) -> list[Share]:
    """The versions that have most of some tensors, the nearest first, and then by name with the newest first."""
    found = []
    for digest in tensor_rows.nearest(catalog.select, tensors, _FILES):
        have = shared(tensors, store.tensors.read(digest) or ())
        if have:
            count, size = len(have), sum(tensor.size for tensor in have)
            found += [Share(row, path, digest, count, size) for row, path in _files(catalog, digest)]
    found.sort(key=lambda share: (-share.count, -share.size, share.row.name, -share.row.number, share.path))
    return found[:limit]


def _files(catalog: Catalog, digest: Digest) -> Iterable[tuple[Row, str]]:
    rows = {(row.name, row.number): row for row in catalog.rows("id IN (SELECT version FROM files WHERE digest = ?)", digest)}
    places = catalog.select("SELECT name, number, path FROM files JOIN versions ON id = version WHERE files.digest = ?", digest)
    return [(rows[name, number], path) for name, number, path in places]


def of_tensor(catalog: Catalog, store: Store, prefix: str) -> list[Holder]:
    """The versions that have a tensor whose digest begins so, and where."""
    found = []
    for digest in tensor_rows.having(catalog.select, prefix):
        named = [tensor for tensor in store.tensors.read(digest) or () if tensor.digest.startswith(prefix)]
        whole = holders(catalog, digest) if named else []
        found += [Holder(at.row, at.path, tensor.digest, tensor.name) for at in whole if at.path for tensor in named]
    return sorted(found, key=lambda holder: (holder.row.name, -holder.row.number, holder.path))


def repeated(catalog: Catalog, digests: Iterable[Digest]) -> int:
    """Bytes of tensors that lie in more than one of these files, each without the first."""
    return tensor_rows.repeated(catalog.select, digests)
