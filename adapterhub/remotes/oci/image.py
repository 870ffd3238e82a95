"""An adapter as a container image, and back, for KServe and Kubernetes' image volumes.

The image has one layer, a tar with the adapter's files below /models, as in KServe's modelcars; no program, times and owners 0.
Nothing is written to disk: the layer is put together from the adapter's own blobs, header by header. The image's config
contains the manifest that was packaged, so that the same files and digest come out again (image-spec v1.1, `config.md`,
`layer.md`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from adapterhub.digest import CHUNK, Digest, sha256_bytes
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import IMAGE_LAYER, MANIFEST_TYPE, MAX_MANIFEST, TITLE, Descriptor, Manifest
from adapterhub.ref import LATEST
from adapterhub.remotes.download import Steady
from adapterhub.remotes.layouts import tar as archive_tar
from adapterhub.remotes.protocol import Reader, Source, damaged
from adapterhub.store.store import local_errors
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
ORIGINAL = "io.adapterhub.digest"  # an annotation: the digest of what was packaged
_MANIFEST, _CONFIG = "io.adapterhub.manifest", "io.adapterhub.config"  # labels: its manifest and config
_FOLDER = "models"
_LAYER_NAME = "models.tar"
_GZIP = f"{IMAGE_LAYER}+gzip"  # a layer that skopeo or another tool compressed on the way

Piece = bytes | Descriptor
"""Part of a layer: a header or padding, or the bytes of a file."""


class Image:
    """A version of a source as an image, which is itself a source of that one image. Creating it reads every file once.

    Attributes:
        made: The image's manifest.
    """

    def __init__(self, source: Source, reference: str) -> None:
        self._source = source
        original = source.manifest(reference)
        config = _text(source, original.config)
        self._pieces = _pieces(original.layers)
        layer = Descriptor(IMAGE_LAYER, self._hash(original.layers), _size(self._pieces), _LAYER_NAME)
        self.made = _assemble(original, config, layer)
        self._layer = layer.digest

    @property
    def where(self) -> str:
        """That of the packaged source."""
        return self._source.where

    def _hash(self, layers: Sequence[Descriptor]) -> Digest:
        """The digest of the layer; the digest of each file is checked."""
        whole, wanted = hashlib.sha256(), {layer.digest: layer for layer in layers}
        buffer = memoryview(bytearray(CHUNK))
        for piece in self._pieces:
            if isinstance(piece, bytes):
                whole.update(piece)
                continue
            state, size = hashlib.sha256(), 0
            with Steady(self._source, piece) as reader:
                while size < piece.size and (n := reader.readinto(buffer[: min(CHUNK, piece.size - size)])):
                    whole.update(buffer[:n])
                    state.update(buffer[:n])
                    size += n
            digest = f"sha256:{state.hexdigest()}"
            if (size, digest) != (piece.size, piece.digest):
                raise damaged(f"{self.where}: {wanted[piece.digest].path}", size, digest, piece, "Nothing was sent")
        return f"sha256:{whole.hexdigest()}"

    def manifest(self, reference: str) -> Manifest:
        """The only manifest, by its digest or as `latest`."""
        if reference not in (LATEST, self.made.digest):
            raise NotFoundError(f"{self.where}: {reference}", "no such version in the image")
        return self.made

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The layer from `start` on, or the config."""
        if blob.digest == self.made.config.digest:
            yield io.BytesIO(self.made.config_bytes[start:])
        elif blob.digest == self._layer:
            with _Spliced(self._source, self._pieces, start) as reader:
                yield reader
        else:
            raise NotFoundError(self.where, f"the image has no blob {blob.digest}")

    def tags(self) -> list[str]:
        """None."""
        return []

    def stop(self, *, on: bool = True) -> None:
        """Stop the source."""
        self._source.stop(on=on)


def _pieces(layers: Sequence[Descriptor]) -> list[Piece]:
    """The layer: folders and files by path, each after its header."""
    files = {f"{_FOLDER}/{layer.path}": layer for layer in layers}
    folders = {"/".join(path.split("/")[:depth]) + "/" for path in files for depth in range(1, path.count("/") + 1)}
    found: list[Piece] = []
    for path in sorted({*files, *folders}):
        layer = files.get(path)
        found.append(archive_tar.header(path, layer.size if layer else 0, folder=layer is None))
        if layer:
            found += [layer, archive_tar.padding(layer.size)]
    return [*found, archive_tar.END]


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.size


def _size(pieces: Sequence[Piece]) -> int:
    return sum(map(_length, pieces))


def _assemble(original: Manifest, config: str, layer: Descriptor) -> Manifest:
    labels = {_MANIFEST: original.raw.decode(), _CONFIG: config}
    config_bytes = json_file.canonical(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [layer.digest]},
            "history": [{"created_by": "adapterhub"}],
        }
    )
    if len(config_bytes) > MAX_MANIFEST:
        raise RefusedError(layer.path, f"the image's config has {len(config_bytes)} bytes, over the limit of {MAX_MANIFEST}")
    described = Descriptor(CONFIG_TYPE, sha256_bytes(config_bytes), len(config_bytes))
    annotations = {**original.annotations, ORIGINAL: original.digest}
    raw = json_file.canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": described.digest, "size": described.size},
            "layers": [
                {
                    "mediaType": layer.media_type,
                    "digest": layer.digest,
                    "size": layer.size,
                    "annotations": {TITLE: layer.path},
                }
            ],
            "annotations": annotations,
        }
    )
    return Manifest(sha256_bytes(raw), raw, described, (layer,), annotations, config_bytes)


def _text(source: Source, blob: Descriptor) -> str:
    """A small blob as text, verified."""
    where = f"{source.where}: its config"
    if blob.size > MAX_MANIFEST:
        raise FormatError(where, f"{blob.size} bytes are over the limit of {MAX_MANIFEST}")
    data, buffer = bytearray(), memoryview(bytearray(min(CHUNK, blob.size + 1)))
    with Steady(source, blob) as reader:
        while len(data) <= blob.size and (n := reader.readinto(buffer)):
            data += buffer[:n]
    if sha256_bytes(bytes(data)) != blob.digest:
        raise IntegrityError(where, f"its bytes do not match {blob.digest}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(where, "not UTF-8 text") from error


class _Spliced:
    """The concatenation of pieces as an unbuffered file, from `start` on."""

    def __init__(self, source: Source, pieces: Sequence[Piece], start: int) -> None:
        self._source, self._pieces = source, iter(pieces)
        self._stack = ExitStack()
        self._reader: Reader = io.BytesIO()
        self._left, self._skip = 0, start

    def __enter__(self) -> _Spliced:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes of a piece; 0 at the end of the last."""
        while not self._left:
            self._stack.close()
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            start = min(self._skip, _length(piece))
            self._skip -= start
            self._left = _length(piece) - start
            if isinstance(piece, bytes):
                self._reader = io.BytesIO(piece[start:])
            elif self._left:
                self._reader = self._stack.enter_context(Steady(self._source, piece, start))
        n: int = self._reader.readinto(memoryview(buffer)[: self._left])
        if not n:
            self._left, self._pieces = 0, iter(())  # a file that has become shorter: the digest cannot match
        self._left -= n
        return n


# ---- from an image to its adapter


class Unpacked:
    """A source in which the image of an adapter appears as that adapter; anything else is unchanged."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._known: dict[Digest, bytes] = {}
        self._offsets: dict[Digest, int] = {}
        self._layer: Descriptor | None = None
        self._unzipped: _Unzipped | None = None

    @property
    def where(self) -> str:
        """That of the source."""
        return self._source.where

    def manifest(self, reference: str) -> Manifest:
        """The manifest; of an image, the one that was packaged."""
        made = self._source.manifest(reference)
        return self._inside(made) if made.config.media_type == CONFIG_TYPE else made

    def _inside(self, made: Manifest) -> Manifest:
        where = f"{self.where}@{made.digest[:19]}"
        wanted = made.annotations.get(ORIGINAL)
        if not wanted:
            what = "is a container image that adapterhub did not make"
            raise RefusedError(where, what, "Extract its files, and push those")
        config = oci_manifest.parse_json(_text(self._source, made.config).encode(), where).get("config")
        labels = config.get("Labels") if isinstance(config, dict) else None
        texts = [labels.get(key) for key in (_MANIFEST, _CONFIG)] if isinstance(labels, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise FormatError(where, "the labels of the image do not contain the packaged manifest")
        raw, packaged = (str(text).encode("utf-8", "surrogatepass") for text in texts)
        original = oci_manifest.parse(raw, where)
        if (original.digest, sha256_bytes(packaged)) != (wanted, original.config.digest):
            raise IntegrityError(where, f"the image contains another manifest or config than that of {wanted[:80]}")
        pieces = _pieces(original.layers)
        kinds = [layer.media_type for layer in made.layers]
        if kinds != [_GZIP] and (kinds != [IMAGE_LAYER] or made.layers[0].size != _size(pieces)):
            what = f"its layer is not the one that was packaged, but {', '.join(kinds)[:120]}"
            hint = "Copy the image with its digests preserved, or the adapter that it contains"
            raise RefusedError(where, what, hint, code="image-repacked")
        at = 0
        for piece in pieces:
            if isinstance(piece, Descriptor):
                self._offsets.setdefault(piece.digest, at)
            at += _length(piece)
        self._layer, self._known = made.layers[0], {original.config.digest: packaged}
        self._unzipped = _Unzipped(self._source, self._layer, at) if kinds == [_GZIP] else None
        return original

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """The bytes of a file, out of the middle of the layer; unverified."""
        if blob.digest in self._known:
            yield io.BytesIO(self._known[blob.digest][start:])
        elif self._layer and blob.digest in self._offsets:
            at = self._offsets[blob.digest] + start
            if self._unzipped:
                yield _Bounded(self._unzipped.reader(at), blob.size - start)
                return
            with self._source.open_blob(self._layer, at) as reader:
                yield _Bounded(reader, blob.size - start)
        else:
            with self._source.open_blob(blob, start) as reader:
                yield reader

    def tags(self) -> list[str]:
        """Those of the source."""
        return self._source.tags()

    def stop(self, *, on: bool = True) -> None:
        """Stop the source."""
        self._source.stop(on=on)


class _Bounded:
    """The first `size` bytes of a reader."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader, self._left = reader, max(size, 0)

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes; 0 at the end."""
        n = int(self._reader.readinto(memoryview(buffer)[: self._left]) or 0) if self._left else 0
        self._left -= n
        return n


class _Unzipped:
    """The bytes of a layer in gzip, which is decompressed once, as far as they are read and in whatever order.

    They are kept in a file without a name: to begin again for every file of an adapter would be quadratic.

    Args:
        source: It has the layer.
        layer: The compressed one.
        size: Bytes after decompression; no more of them are kept.
    """

    def __init__(self, source: Source, layer: Descriptor, size: int) -> None:
        self._where, self._size = source.where, size
        self._connection = Steady(source, layer)
        self._compressed = _Bounded(self._connection, layer.size)
        self._state, self._buffer = zlib.decompressobj(31), memoryview(bytearray(CHUNK))
        self._place = Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with this object
        self._done = 0
        self._lock = threading.Lock()

    def reader(self, at: int) -> _Position:
        """The bytes from `at` on."""
        return _Position(self, at)

    def read_at(self, buffer: memoryview, at: int) -> int:
        """Read up to `len(buffer)` bytes from `at` on; 0 at the end."""
        with self._lock:
            while self._done <= at and self._more():
                pass
            with local_errors(self._place):
                self._file.seek(at)
                return self._file.readinto(buffer[: max(self._done - at, 0)]) or 0

    def _more(self) -> bool:
        """Decompress the next piece; False at the end."""
        if self._state.eof or self._done == self._size:
            self._connection.close()
            return False
        waiting = self._state.unconsumed_tail or self._buffer[: self._compressed.readinto(self._buffer)]
        try:
            piece = self._state.decompress(waiting, min(CHUNK, self._size - self._done))
        except zlib.error as error:
            raise FormatError(self._where, "its layer is not gzip, or is damaged") from error
        with local_errors(self._place):
            self._file.seek(self._done)
            self._file.write(piece)
        self._done += len(piece)
        return bool(waiting)


class _Position:
    """A reader of decompressed bytes from a position on."""

    def __init__(self, whole: _Unzipped, at: int) -> None:
        self._whole, self._at = whole, at

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes; 0 at the end."""
        n = self._whole.read_at(memoryview(buffer), self._at)
        self._at += n
        return n
