"""What a manifest is derived from, read from a folder with one opening of each file: digests, headers and short texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub.digest import Digest, sha256_and_head, sha256_bytes
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, HEAD_SIZE
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile, SafetensorsHeader
from adapterhub_converters.errors import AdapterhubError

from . import card as cards
from .card import Card
from .package_files import Listing, listing


@dataclass(frozen=True)
class FolderContents:
    """The files of an adapter's own folder.

    Attributes:
        folder: The folder.
        listing: The files that belong to the adapter.
        files: Path to digest and size of each, including adapter.json.
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


def read_folder(folder: Path) -> FolderContents:
    """Read the files of an adapter's own folder; what is malformed is hashed alone, for its reader to refuse.

    Raises:
        RefusedError: A file that may be meant as part of the adapter cannot be packaged; the error names it.
    """
    reader = _Reader(folder)
    if readme := cards.find(folder):
        reader.record(*readme)
    packaged = listing(folder, head=reader.head)
    files = {path: (reader.digests[folder / path], (folder / path).stat().st_size) for path in packaged.files}
    card = cards.decode(readme[1]) if readme else Card()
    return FolderContents(folder, packaged, files, reader.texts, reader.headers, card)


@dataclass
class _Reader:
    """Reads each file once, when its first bytes are asked for."""

    folder: Path
    heads: dict[Path, bytes] = field(default_factory=dict)
    digests: dict[Path, Digest] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    headers: dict[Path, SafetensorsHeader] = field(default_factory=dict)

    def head(self, path: Path) -> bytes:
        if path not in self.heads:
            try:
                self._parse(path)
            except AdapterhubError:
                self.digests[path], self.heads[path] = sha256_and_head(path, HEAD_SIZE)
        return self.heads[path]

    def record(self, path: Path, raw: bytes) -> None:
        self.digests[path], self.heads[path] = sha256_bytes(raw), raw[:HEAD_SIZE]

    def _parse(self, path: Path) -> None:
        if path.parent == self.folder and path.name in (ADAPTER_JSON, ADAPTER_CONFIG):
            text = json_file.read_text(path)
            self.record(path, text.encode())
            self.texts[path.name] = text
        elif path.suffix == ".safetensors":
            with SafetensorsFile(path) as file:
                self.digests[path], self.heads[path] = file.digest(), file.head
                self.headers[path] = file.header
        else:
            self.digests[path], self.heads[path] = sha256_and_head(path, HEAD_SIZE)
