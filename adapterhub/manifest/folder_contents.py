"""What a manifest is derived from, read from a folder with one opening of each file: digests, headers and short texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from adapterhub.digest import Digest, sha256_and_head, sha256_bytes
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, HEAD_SIZE, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.open_file import BytesConsumer
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.containers.safetensors_header import SafetensorsHeader
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats.adapter_claims import AdapterClaims
from adapterhub_converters.lazy_dataclass import dataclass

from . import card as cards
from .card import Card
from .package_files import Listing, first_bytes, listing

if TYPE_CHECKING:
    from adapterhub_converters.containers.gguf_file import GGUFHeader

WeightsReader = Callable[[Path, BinaryIO], BytesConsumer]
"""Called with each file of weights that is hashed, which it may read in; returns what is called with its bytes, in order."""


class Inspection(NamedTuple):
    """The adapter of a folder.

    Attributes:
        format: Its format.
        adapter: The adapter, which may have zeros in place of its numbers; what it claims to be if it is not understood.
        is_complete: Whether it has its numbers, and every row is known to be in its place.
        gguf_header: The header of the file, if it is a GGUF.
    """

    format: str
    adapter: Adapter | AdapterClaims
    is_complete: bool = False
    gguf_header: GGUFHeader | None = None

    @property
    def complete_adapter(self) -> Adapter | None:
        """The adapter with its numbers; None if they have yet to be read."""
        return self.adapter if self.is_complete and isinstance(self.adapter, Adapter) else None


@dataclass(frozen=True)
class FolderContents:
    """The files of an adapter's own folder.

    Attributes:
        folder: The folder.
        listing: The files that belong to the adapter.
        files: Path to digest and size of each, including adapter.json; empty if they were not hashed.
        texts: The text of adapter.json and of adapter_config.json, as far as they can be read.
        headers: The headers of the safetensors files that are well-formed.
        card: The model card.
    """

    folder: Path
    listing: Listing
    files: Mapping[str, tuple[Digest, int]]
    texts: Mapping[str, str]
    headers: Mapping[Path, SafetensorsHeader]
    card: Card

    @property
    def manifest_text(self) -> str | None:
        """The text of its adapter.json; empty if there is none, and None if it was not read, or could not be."""
        return self.texts.get(ADAPTER_JSON, None if (self.folder / ADAPTER_JSON).exists() else "")


def read_folder(
    folder: Path,
    *,
    hashes: bool = True,
    on_bytes: Callable[[int], object] | None = None,
    text: str | None = None,
    weights_reader: WeightsReader | None = None,
) -> FolderContents:
    """Read the files of an adapter's own folder; what is malformed is hashed alone, for its reader to refuse.

    Args:
        folder: The folder.
        hashes: Whether to compute digests, for which all bytes are read.
        on_bytes: Called with the number of bytes hashed since its last call.
        text: The text of its adapter.json, if the caller has read it.
        weights_reader: Reads the bytes of weights too while they are hashed.

    Raises:
        RefusedError: A file that may be meant as part of the adapter cannot be packaged; the error names it.
    """
    reader = _Reader(folder, hashes, on_bytes, weights_reader)
    if text is not None:
        reader.record_text(folder / ADAPTER_JSON, text)
    if readme := cards.find(folder):
        reader.record(*readme)
    packaged = listing(folder, head=reader.head)
    paths = packaged.files if hashes else ()
    files = {path: (reader.digests[folder / path], (folder / path).stat().st_size) for path in paths}
    card = cards.decode(readme[1]) if readme else Card()
    return FolderContents(folder, packaged, files, reader.texts, reader.headers, card)


@dataclass
class _Reader:
    """Reads each file once, when its first bytes are asked for."""

    folder: Path
    hashes: bool
    on_bytes: Callable[[int], object] | None
    weights_reader: WeightsReader | None = None
    heads: dict[Path, bytes] = field(default_factory=dict)
    digests: dict[Path, Digest] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    headers: dict[Path, SafetensorsHeader] = field(default_factory=dict)

    def head(self, path: Path) -> bytes:
        if path not in self.heads:
            try:
                self._parse(path)
            except AdapterhubError:
                self._hash(path)
        return self.heads[path]

    def record(self, path: Path, raw: bytes) -> None:
        self.digests[path], self.heads[path] = sha256_bytes(raw), raw[:HEAD_SIZE]
        if self.on_bytes is not None:
            self.on_bytes(len(raw))

    def _parse(self, path: Path) -> None:
        if path.parent == self.folder and path.name in (ADAPTER_JSON, ADAPTER_CONFIG):
            self.record_text(path, json_file.read_text(path))
        elif path.suffix == ".safetensors":
            with SafetensorsFile(path) as file:
                if self.hashes:
                    self.digests[path] = file.digest(self.on_bytes, self._consumer_of(path))
                self.heads[path], self.headers[path] = file.head, file.header
        else:
            self._hash(path)

    def record_text(self, path: Path, text: str) -> None:
        self.record(path, text.encode())
        self.texts[path.name] = text

    def _hash(self, path: Path) -> None:
        if self.hashes:
            self.digests[path], self.heads[path] = sha256_and_head(path, HEAD_SIZE, self.on_bytes, self._consumer_of(path))
        else:
            self.heads[path] = first_bytes(path)

    def _consumer_of(self, path: Path) -> Callable[[BinaryIO], BytesConsumer] | None:
        if self.weights_reader is None or not is_weights(path.name):
            return None
        return functools.partial(self.weights_reader, path)
