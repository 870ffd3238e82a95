"""Search for the versions of a registry that contain a file, a folder or a digest, as a whole or by its tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub.digest import Digest
from adapterhub.index.tensor_search import Share, nearest, with_digest
from adapterhub.index.version_search import Holder, holders
from adapterhub.manifest import oci_manifest
from adapterhub.store.store import ByteCounter, Progress, counter, local_errors
from adapterhub.store.tensor_digests import Tensor, Tensors, digests
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.containers.open_file import open_regular

from .registry import Registry

Bar = Callable[[str], AbstractContextManager[Progress | None]]
"""Opens a progress bar, given its title."""


@dataclass(frozen=True)
class ContentMatches:
    """The search results for one file, folder or digest.

    Attributes:
        source: The file, folder or digest, as given.
        holders: Versions that contain all of it.
        tensors: Number of its tensors if no version contains all of it; otherwise 0.
        size: Bytes of those tensors.
        shares: Versions that contain some of those tensors.
    """

    source: str
    holders: list[Holder]
    tensors: int = 0
    size: int = 0
    shares: list[Share] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether a version contains all of it."""
        return bool(self.holders) or bool(self.shares and self.shares[0].count == self.tensors)


def by_digest(registry: Registry, source: str, prefix: str, bar: Bar) -> ContentMatches:
    """Search for the digest of a file, a version or a tensor, or for the beginning of one."""
    _list_tensors(registry, bar)
    return ContentMatches(source, [*holders(registry.index, prefix), *with_digest(registry.index, registry.store, prefix)])


def by_content(registry: Registry, source: str, path: Path, bar: Bar) -> ContentMatches:
    """Search for the version that a folder is, or for the bytes of a file; failing that, for the tensors in the weights."""
    if path.is_dir():
        # The digest that the folder would get from a push.
        manifest = oci_manifest.build(path)
        version_holders = holders(registry.index, manifest.digest)
        if version_holders:
            return ContentMatches(source, version_holders)
        # Only weights: configs and READMEs are often the same in unrelated adapters.
        files = [path / layer.path for layer in manifest.layers if layer.media_type == oci_manifest.WEIGHT_LAYER]
    else:
        files = [path]
    file_holders: list[Holder] = []
    tensors: list[Tensor] = []
    with bar("hashing") as progress:
        count_bytes = counter(progress, sum(file.stat().st_size for file in files))
        for file in files:
            digest, file_tensors = _file_digests(file, count_bytes)
            file_holders += holders(registry.index, digest)
            tensors += file_tensors if is_weights(file.name) else ()
    if file_holders:
        return ContentMatches(source, file_holders)
    _list_tensors(registry, bar)
    nonempty_tensors = tuple(tensor for tensor in tensors if tensor.size)
    size = sum(tensor.size for tensor in nonempty_tensors)
    return ContentMatches(source, [], len(nonempty_tensors), size, nearest(registry.index, registry.store, nonempty_tensors))


def _list_tensors(registry: Registry, bar: Bar) -> None:
    with bar("listing tensors") as progress:
        registry.list_tensors(progress)


def _file_digests(path: Path, count_bytes: ByteCounter | None) -> tuple[Digest, Tensors]:
    with local_errors(path), open_regular(path) as file:
        return digests(file, path.stat().st_size, count_bytes)
