"""Search for the versions of a registry that contain a file, a folder or a digest, as a whole or by its tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import field
from pathlib import Path
from typing import BinaryIO

from adapterhub.digest import Digest
from adapterhub.index.queries import VersionRow
from adapterhub.index.tensor_search import Share, nearest, with_digest
from adapterhub.index.version_search import Holder, holders
from adapterhub.store.store import Progress, counter, local_errors
from adapterhub.store.tensor_digests import Hashing, Tensor, digests
from adapterhub_converters.adapter_files import is_weights
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.lazy_dataclass import dataclass

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


@dataclass(frozen=True)
class FileContents:
    """What a file or the weights of a folder contain.

    Attributes:
        version: The digest of the version that a push of the folder would create; empty for a file.
        files: The digests of the files.
        tensors: The tensors in those that are weights.
    """

    version: Digest = ""
    files: tuple[Digest, ...] = ()
    tensors: tuple[Tensor, ...] = ()


def read_contents(path: Path, bar: Bar) -> FileContents:
    """Hash a file or a folder, and the tensors in its weights, each opened once."""
    weights = _Weights()
    version = ""
    with bar("hashing") as progress:
        if path.is_dir():
            version = weights.read_folder(path, progress)
        else:
            weights.read_file(path, progress)
    return FileContents(version, tuple(weights.digests), tuple(tensor for tensor in weights.tensors if tensor.size))


def by_content(registry: Registry, source: str, path: Path, bar: Bar) -> ContentMatches:
    """Search for the version that a folder is, or for the bytes of a file; failing that, for the tensors in the weights."""
    return matching(registry, source, read_contents(path, bar), lambda: _list_tensors(registry, bar))


def matching(
    registry: Registry,
    source: str,
    contents: str | FileContents,
    list_tensors: Callable[[], object],
    sees: Callable[[VersionRow], bool] = lambda _: True,
) -> ContentMatches:
    """Search for the digest of a file, a version or a tensor, or the beginning of one; or for the contents of a file or folder.

    Args:
        registry: The registry to search.
        source: The name of `contents` in the answer.
        contents: The first digits of a digest, or contents.
        list_tensors: Called before tensors are searched, to list those of files that were not read yet.
        sees: Returns whether a version may be among the results.
    """
    index, store = registry.index, registry.store

    def visible(candidates: Iterable[Holder]) -> list[Holder]:
        return [holder for holder in candidates if sees(holder.row)]

    if isinstance(contents, str):
        list_tensors()
        with index.snapshot():
            return ContentMatches(source, visible([*holders(index, contents), *with_digest(index, store, contents)]))
    with index.snapshot():
        version_holders = visible(holders(index, contents.version)) if contents.version else []
        file_holders = visible(holder for digest in contents.files for holder in holders(index, digest))
    if version_holders or file_holders:
        return ContentMatches(source, version_holders or file_holders)
    list_tensors()
    size = sum(tensor.size for tensor in contents.tensors)
    shares = nearest(index, store, contents.tensors, sees=sees)
    return ContentMatches(source, [], len(contents.tensors), size, shares)


@dataclass
class _Weights:
    """The digests of files, each opened once, and of the tensors in those that are weights."""

    digests: list[Digest] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    def read_file(self, path: Path, progress: Progress | None) -> None:
        size = path.stat().st_size
        with local_errors(path), open_regular(path) as file:
            digest, file_tensors = digests(file, size, counter(progress, size))
        self.digests.append(digest)
        self.tensors += file_tensors if is_weights(path.name) else ()

    def read_folder(self, folder: Path, progress: Progress | None) -> Digest:
        """Return the digest of the version that a push of the folder would create."""
        from adapterhub.manifest import folder_contents, oci_manifest, package_files  # numpy, which lists do without

        size = sum((folder / path).stat().st_size for path in package_files.survey(folder)[0])
        hashings: dict[Path, Hashing] = {}

        def hashing(path: Path, file: BinaryIO) -> Hashing:
            hashings[path] = Hashing.for_file(file, os.fstat(file.fileno()).st_size)
            return hashings[path]

        contents = folder_contents.read_folder(folder, on_bytes=counter(progress, size), weights_reader=hashing)
        manifest = oci_manifest.build_from(contents)
        # Only weights: configs and READMEs are often the same in unrelated adapters.
        for layer in manifest.layers:
            if layer.media_type == oci_manifest.WEIGHT_LAYER:
                self.digests.append(layer.digest)
                self.tensors += hashings[folder / layer.path].result() or ()
        return manifest.digest


def _list_tensors(registry: Registry, bar: Bar) -> None:
    with bar("listing tensors") as progress:
        registry.list_tensors(progress)
