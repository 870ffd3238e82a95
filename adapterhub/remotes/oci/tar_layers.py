"""Artifacts of ModelPack and of KitOps whose layers are tars, as the adapter in them.

ModelPack has its files raw, or in tars that may be compressed with gzip or zstd (modelpack/model-spec, `docs/spec.md`, "Layer
media types"); a ModelKit of KitOps has one tar for each part of its Kitfile. The layers are fetched, verified and decompressed
into temporary files, out of which the adapter's files are read; nothing is unpacked under a name of the archive. A tar that two
programs could read differently is refused (`layouts.archive_tar`), and so is one that grows too much when it is decompressed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from adapterhub.digest import CHUNK, Digest
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.manifest.package_files import divide_names
from adapterhub.remotes.download import receive
from adapterhub.remotes.layouts import archive_tar
from adapterhub.remotes.layouts.archive_tar import Member
from adapterhub.remotes.layouts.image_layout import FileSection
from adapterhub.remotes.protocol import Reader, Source
from adapterhub.store.store import local_errors
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import FormatError, RefusedError

_CONFIGS = (ADAPTER_CONFIG, ADAPTER_JSON)
# Bytes of all decompressed tars in relation to those of the layers: weights hardly shrink, and texts by less than this.
_MAX_GROWTH, _FREE_GROWTH = 100, 1 << 20


def has_nested_adapter(manifest: Manifest) -> bool:
    """Return whether the adapter of an artifact is in a tar among its layers, or in raw files in a folder."""
    if any(oci_manifest.is_model_tar(layer.media_type) for layer in manifest.layers):
        return True
    configs = [layer.path.rpartition("/") for layer in manifest.layers if layer.path.rpartition("/")[2] in _CONFIGS]
    return bool(configs) and all(folder for folder, _, _ in configs)


class TarLayers:
    """The adapter in an artifact with tars.

    Attributes:
        manifest: A manifest of its files, as of a version without adapter.json, with the digest of the artifact, by which
            the remote has it.
        left_out: The names of files that belong to no adapter.
    """

    def __init__(self, source: Source, manifest: Manifest) -> None:
        """Fetch the tars, and hash the files in them.

        Raises:
            FormatError: A tar is damaged, or could be read in two ways.
            RefusedError: There is no adapter in it, or it grows too much when it is decompressed.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="adapterhub-")
        self._places: dict[Digest, tuple[Path, Member]] = {}
        folder, location = Path(self._scratch.name), f"{source.location}@{manifest.digest[:19]}"
        files: dict[str, tuple[Digest, int]] = {}
        room = _FREE_GROWTH
        for layer in manifest.layers:
            if not oci_manifest.is_model_tar(layer.media_type):
                _add(files, layer.path, (layer.digest, layer.size), location)
                continue
            room += _MAX_GROWTH * layer.size
            tar = _fetch(source, layer, folder, room)
            with open_regular(tar) as file:
                room -= (size := os.fstat(file.fileno()).st_size)
                for name, member in archive_tar.scan_members(file, size, location).items():
                    digest = _digest(file, member)
                    self._places.setdefault(digest, (tar, member))
                    _add(files, name, (digest, member.size), location)
        names, self.left_out = _select(files, location)
        of_adapter = oci_manifest.of_files({name: files[path] for name, path in names.items()}, location)
        self.manifest = dataclasses.replace(of_adapter, digest=manifest.digest, raw=manifest.raw)

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a file in a tar for reading from `start` on."""
        path, member = self._places[blob.digest]
        with FileSection(open_regular(path), member.offset + start, member.size - start) as section:
            yield section

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._places


def _add(files: dict[str, tuple[Digest, int]], name: str, file: tuple[Digest, int], location: str) -> None:
    if files.setdefault(name, file) != file:
        raise FormatError(location, f"two of its layers have different files {name[:80]!r}")


def _select(files: Mapping[str, object], location: str) -> tuple[dict[str, str], list[str]]:
    """Return the path in the artifact of each file of the adapter, and the files that are left out.

    A ModelKit has the folder of the Kitfile around the adapter, which is then the folder with its config.
    """
    folders = {path.rpartition("/")[0] for path in files if path.rpartition("/")[2] in _CONFIGS}
    folders = folders or {path.rpartition("/")[0] for path in files if path.endswith(".gguf")}
    if "" not in folders and len(folders) > 1:
        raise RefusedError(location, f"has {len(folders)} adapters", "Unpack it, and push each of them")
    prefix = f"{next(iter(folders))}/" if folders and "" not in folders else ""
    inside = {path.removeprefix(prefix): path for path in files if path.startswith(prefix)}
    chosen, left_out = divide_names(inside)
    outside = [path for path in files if not path.startswith(prefix)]
    return {name: inside[name] for name in chosen}, sorted([*(inside[name] for name in left_out), *outside])


def _fetch(source: Source, layer: Descriptor, folder: Path, limit: int) -> Path:
    """Fetch a layer, verified, and return the file of its tar without compression; RefusedError if it grows over `limit`."""
    part = folder / f"{layer.digest[7:]}.part"
    with receive(source, layer, ConfinedFiles(folder), part) as (_, file):
        file.seek(0)
        with local_errors(folder), tempfile.NamedTemporaryFile(dir=folder, suffix=".tar", delete=False) as target:
            for piece in _decompressed(file, layer.media_type.rpartition("+")[2], source.location):
                target.write(piece)
                if target.tell() > limit:
                    raise RefusedError(source.location, f"the layer {layer.digest[:19]}… grows to over {limit} bytes")
    part.unlink()
    return Path(target.name)


def _decompressed(file: BinaryIO, kind: str, location: str) -> Iterator[bytes]:
    """Yield the bytes of a tar in pieces of bounded size, decompressed if its media type ends in +gzip or +zstd."""
    import zstandard  # late: few layers need it

    # Both may be in several parts, which follow one another.
    if kind == "zstd":
        reader: Any = zstandard.ZstdDecompressor().stream_reader(file, closefd=False, read_across_frames=True)
    elif kind == "gzip":
        reader = gzip.GzipFile(fileobj=file)
    else:
        reader = file
    try:
        while piece := reader.read(CHUNK):
            yield piece
    except (zlib.error, gzip.BadGzipFile, zstandard.ZstdError, EOFError) as error:
        raise FormatError(location, f"its layer is not {kind}, or is damaged") from error


def _digest(file: BinaryIO, member: Member) -> Digest:
    state, bytes_left = hashlib.sha256(), member.size
    file.seek(member.offset, io.SEEK_SET)
    while bytes_left and (piece := file.read(min(CHUNK, bytes_left))):
        state.update(piece)
        bytes_left -= len(piece)
    return f"sha256:{state.hexdigest()}"
