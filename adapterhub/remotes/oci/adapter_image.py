"""An adapter packed as a container image, and back, for KServe and Kubernetes' image volumes.

The image has one layer, a tar with the adapter's files below /models, as in KServe's modelcars; no program, and times and
owners are 0. Nothing is written to disk: the layer is put together from the adapter's own blobs, header by header. The image's
config contains the manifest that was packaged, so that the same files and digest come out again (image-spec v1.1, `config.md`,
`layer.md`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from adapterhub.digest import CHUNK, Digest, sha256_bytes
from adapterhub.manifest import licensing, oci_manifest
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.oci_manifest import IMAGE_LAYER, MANIFEST_TYPE, MAX_MANIFEST, TITLE, Descriptor, Manifest
from adapterhub.ref import LATEST
from adapterhub.remotes.download import ResumingReader
from adapterhub.remotes.layouts import archive_tar
from adapterhub.remotes.parallel_transfer import unwrapped
from adapterhub.remotes.protocol import OpenRemote, Reader, Source, damaged_error
from adapterhub.store.store import local_errors
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError

from . import tar_layers
from .tar_layers import TarLayers

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
ORIGINAL_DIGEST = "io.adapterhub.digest"  # an annotation: the digest of what was packaged
_MANIFEST_LABEL, _CONFIG_LABEL = "io.adapterhub.manifest", "io.adapterhub.config"  # labels: its manifest and config
_PAGE_ANNOTATION = "org.opencontainers.image"
_FOLDER = "models"
_LAYER_NAME = "models.tar"
_GZIP_LAYER = f"{IMAGE_LAYER}+gzip"  # a layer that skopeo or another tool compressed on the way

Piece = bytes | Descriptor
"""Part of a layer: a header or padding, or the bytes of a file."""


class AdapterImage:
    """A version of a source as an image, which is itself a source with only that image. Creating it reads every file once.

    Attributes:
        image_manifest: The image's manifest.
    """

    def __init__(self, source: Source, reference: str) -> None:
        self._source = source
        original = source.manifest(reference)
        config = _read_text(source, original.config)
        facts = next((layer for layer in original.layers if layer.path == ADAPTER_JSON), None)
        annotations = _page_annotations(_read_text(source, facts)) if facts else {}
        self._pieces = _pieces(original.layers)
        # The layer's digest is needed before its first byte is sent: every file is read once to compute it.
        layer = Descriptor(IMAGE_LAYER, self._layer_digest(original.layers), _total_size(self._pieces), _LAYER_NAME)
        self.image_manifest = _image_manifest(original, config, layer, annotations)
        self._layer = layer.digest

    @property
    def location(self) -> str:
        """The name of the packaged source in errors."""
        return self._source.location

    def _layer_digest(self, layers: Sequence[Descriptor]) -> Digest:
        """Compute the digest of the layer, checking that of each file on the way."""
        layer_state, files = hashlib.sha256(), {layer.digest: layer for layer in layers}
        buffer = memoryview(bytearray(CHUNK))
        for piece in self._pieces:
            if isinstance(piece, bytes):
                layer_state.update(piece)
                continue
            state, size = hashlib.sha256(), 0
            with ResumingReader(self._source, piece) as reader:
                while size < piece.size and (count := reader.readinto(buffer[: min(CHUNK, piece.size - size)])):
                    layer_state.update(buffer[:count])
                    state.update(buffer[:count])
                    size += count
            digest = f"sha256:{state.hexdigest()}"
            if (size, digest) != (piece.size, piece.digest):
                raise damaged_error(f"{self.location}: {files[piece.digest].path}", size, digest, piece, "Nothing was sent")
        return f"sha256:{layer_state.hexdigest()}"

    def manifest(self, reference: str) -> Manifest:
        """Return the only manifest, by its digest or as `latest`."""
        if reference not in (LATEST, self.image_manifest.digest):
            raise NotFoundError(f"{self.location}: {reference}", "no such version in the image")
        return self.image_manifest

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open the layer, from `start` on, or the config."""
        if blob.digest == self.image_manifest.config.digest:
            yield io.BytesIO(self.image_manifest.config_bytes[start:])
        elif blob.digest == self._layer:
            with _SplicedReader(self._source, self._pieces, start) as reader:
                yield reader
        else:
            raise NotFoundError(self.location, f"the image has no blob {blob.digest}")

    def tags(self) -> list[str]:
        """Return no tags: the image is selected as `latest` or by its digest."""
        return []

    def stop(self, *, on: bool = True) -> None:
        """Stop the source."""
        self._source.stop(on=on)


def _pieces(layers: Sequence[Descriptor]) -> list[Piece]:
    """Return the pieces of the layer: folders and files by path, each after its header."""
    files = {f"{_FOLDER}/{layer.path}": layer for layer in layers}
    folders = {"/".join(path.split("/")[:depth]) + "/" for path in files for depth in range(1, path.count("/") + 1)}
    pieces: list[Piece] = []
    # A folder's path ends in a slash, so it sorts before the files in it.
    for path in sorted({*files, *folders}):
        layer = files.get(path)
        pieces.append(archive_tar.header(path, layer.size if layer else 0, folder=layer is None))
        if layer:
            pieces += [layer, archive_tar.padding(layer.size)]
    return [*pieces, archive_tar.END]


def _piece_size(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece.size


def _total_size(pieces: Sequence[Piece]) -> int:
    return sum(map(_piece_size, pieces))


def _page_annotations(adapter_json: str) -> dict[str, str]:
    """Return what the page of a package shows at a registry (image-spec v1.1, `annotations.md`), as far as it is recorded.

    The manifest of a version has none: they would be in its digest, and are derived from its files. There is no
    `base.name` either, which names an image, nor a `version`, which each registry counts for itself.
    """
    try:
        manifest = AdapterManifest.salvage(json_file.parse_object(adapter_json, ADAPTER_JSON))
    except FormatError:  # that of a version of another program
        return {}
    page = manifest.download_location or ""
    values = {
        "title": manifest.name,
        "description": manifest.description,
        "licenses": licensing.expression(manifest.license),
        "vendor": manifest.supplier,
        "url": page if page.startswith("https://") else None,
        "created": manifest.training.created if manifest.training else None,
    }
    return {f"{_PAGE_ANNOTATION}.{key}": value for key, value in values.items() if value}


def _image_manifest(original: Manifest, config: str, layer: Descriptor, page_annotations: Mapping[str, str]) -> Manifest:
    """Return the manifest of an image with this layer, whose config has the original manifest and config as labels."""
    # Registries read them from the labels of an image, or from its annotations.
    labels = {_MANIFEST_LABEL: original.raw.decode(), _CONFIG_LABEL: config, **page_annotations}
    config_bytes = json_file.canonical_bytes(
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
    config_descriptor = Descriptor(CONFIG_TYPE, sha256_bytes(config_bytes), len(config_bytes))
    annotations = {**original.annotations, **page_annotations, ORIGINAL_DIGEST: original.digest}
    raw = json_file.canonical_bytes(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": config_descriptor.digest, "size": config_descriptor.size},
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
    return Manifest(sha256_bytes(raw), raw, config_descriptor, (layer,), annotations, config_bytes)


def _read_text(source: Source, blob: Descriptor) -> str:
    """Read a small blob as text, verified against its digest."""
    label = f"{source.location}: its config"
    if blob.size > MAX_MANIFEST:
        raise FormatError(label, f"{blob.size} bytes are over the limit of {MAX_MANIFEST}")
    data, buffer = bytearray(), memoryview(bytearray(min(CHUNK, blob.size + 1)))
    with ResumingReader(source, blob) as reader:
        while len(data) <= blob.size and (count := reader.readinto(buffer)):
            data += buffer[:count]
    if sha256_bytes(bytes(data)) != blob.digest:
        raise IntegrityError(label, f"its bytes do not match {blob.digest}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(label, "not UTF-8 text") from error


class _SplicedReader:
    """The concatenation of pieces as an unbuffered file, from `start` on."""

    def __init__(self, source: Source, pieces: Sequence[Piece], start: int) -> None:
        self._source, self._pieces = source, iter(pieces)
        self._stack = ExitStack()
        self._reader: Reader = io.BytesIO()
        self._bytes_left, self._skip = 0, start

    def __enter__(self) -> _SplicedReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes of one piece; return 0 at the end of the last."""
        while not self._bytes_left:
            self._stack.close()
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            start = min(self._skip, _piece_size(piece))
            self._skip -= start
            self._bytes_left = _piece_size(piece) - start
            if isinstance(piece, bytes):
                self._reader = io.BytesIO(piece[start:])
            elif self._bytes_left:
                self._reader = self._stack.enter_context(ResumingReader(self._source, piece, start))
        count: int = self._reader.readinto(memoryview(buffer)[: self._bytes_left])
        if not count:
            self._bytes_left, self._pieces = 0, iter(())  # a file that has become shorter: the digest cannot match
        self._bytes_left -= count
        return count


# ---- from an image to its adapter


class UnpackedSource:
    """A source that shows the image of an adapter, or one in tars, as that adapter; everything else is unchanged."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._configs: dict[Digest, bytes] = {}
        self._offsets: dict[Digest, int] = {}
        self._layer: Descriptor | None = None
        self._gzip_layer: _GzipLayer | None = None
        self._tars: dict[Digest, TarLayers] = {}

    @property
    def location(self) -> str:
        """The name of the source in errors."""
        return self._source.location

    def manifest(self, reference: str) -> Manifest:
        """Return the manifest; for an image, the one that was packaged, and for tars, one of the files in them."""
        manifest = self._source.manifest(reference)
        if tar_layers.has_nested_adapter(manifest):
            return self._manifest_in_tars(manifest)
        return self._packaged_manifest(manifest) if manifest.config.media_type == CONFIG_TYPE else manifest

    def _manifest_in_tars(self, manifest: Manifest) -> Manifest:
        """Return a manifest of the files in the tars of a manifest, which are fetched once."""
        if manifest.digest not in self._tars:
            tars = self._tars[manifest.digest] = tar_layers.TarLayers(self._source, manifest)
            place = unwrapped(self._source)
            if tars.left_out and isinstance(place, OpenRemote):
                place.notes += [f"left out: {path[:200]}" for path in tars.left_out]
        return self._tars[manifest.digest].manifest

    def _packaged_manifest(self, image_manifest: Manifest) -> Manifest:
        """Return the manifest that an image contains, and prepare reading its files out of the layer.

        Raises:
            RefusedError: adapterhub did not make the image, or another tool has repacked its layer.
            FormatError: The labels are malformed.
            IntegrityError: The labels contain another manifest or config than the one that the annotation names.
        """
        label = f"{self.location}@{image_manifest.digest[:19]}"
        original_digest = image_manifest.annotations.get(ORIGINAL_DIGEST)
        if not original_digest:
            problem = "is a container image that adapterhub did not make"
            raise RefusedError(label, problem, "Extract its files, and push those")
        config = json_file.parse_object(_read_text(self._source, image_manifest.config).encode(), label).get("config")
        labels = config.get("Labels") if isinstance(config, dict) else None
        texts = [labels.get(key) for key in (_MANIFEST_LABEL, _CONFIG_LABEL)] if isinstance(labels, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise FormatError(label, "the labels of the image do not contain the packaged manifest")
        raw, original_config = (str(text).encode("utf-8", "surrogatepass") for text in texts)
        original = oci_manifest.parse(raw, label)
        if (original.digest, sha256_bytes(original_config)) != (original_digest, original.config.digest):
            raise IntegrityError(label, f"the image contains another manifest or config than that of {original_digest[:80]}")
        pieces = _pieces(original.layers)
        kinds = [layer.media_type for layer in image_manifest.layers]
        # skopeo and some registries compress the layer; any other change moves the files in it.
        if kinds != [_GZIP_LAYER] and (kinds != [IMAGE_LAYER] or image_manifest.layers[0].size != _total_size(pieces)):
            problem = f"its layer is not the one that was packaged, but {', '.join(kinds)[:120]}"
            hint = "Copy the image with its digests preserved, or the adapter that it contains"
            raise RefusedError(label, problem, hint, code="image-repacked")
        # The layer is a tar without compression: each file is at an offset that follows from the files before it.
        offset = 0
        for piece in pieces:
            if isinstance(piece, Descriptor):
                self._offsets.setdefault(piece.digest, offset)
            offset += _piece_size(piece)
        self._layer, self._configs = image_manifest.layers[0], {original.config.digest: original_config}
        self._gzip_layer = _GzipLayer(self._source, self._layer, offset) if kinds == [_GZIP_LAYER] else None
        return original

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        """Open a file for reading, out of the middle of the layer; its bytes are not verified."""
        if blob.digest in self._configs:
            yield io.BytesIO(self._configs[blob.digest][start:])
        elif self._layer and blob.digest in self._offsets:
            offset = self._offsets[blob.digest] + start
            if self._gzip_layer:
                yield _BoundedReader(self._gzip_layer.reader_at(offset), blob.size - start)
                return
            with self._source.open_blob(self._layer, offset) as reader:
                yield _BoundedReader(reader, blob.size - start)
        elif tars := next((tars for tars in self._tars.values() if blob.digest in tars), None):
            with tars.open_blob(blob, start) as reader:
                yield reader
        else:
            with self._source.open_blob(blob, start) as reader:
                yield reader

    def tags(self) -> list[str]:
        """Return the source's tags."""
        return self._source.tags()

    def stop(self, *, on: bool = True) -> None:
        """Stop the source."""
        self._source.stop(on=on)


class _BoundedReader:
    """The first `size` bytes of a reader."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader, self._bytes_left = reader, max(size, 0)

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes; return 0 at the end."""
        count = int(self._reader.readinto(memoryview(buffer)[: self._bytes_left]) or 0) if self._bytes_left else 0
        self._bytes_left -= count
        return count


class _GzipLayer:
    """The decompressed bytes of a gzip layer, which is decompressed only once, as far as it is read, in whatever order.

    They are kept in a temporary file without a name: starting over for every file of an adapter would take quadratic time.

    Args:
        source: The source that has the layer.
        layer: The compressed layer.
        size: Number of bytes after decompression; no more than these are kept.
    """

    def __init__(self, source: Source, layer: Descriptor, size: int) -> None:
        self._where, self._size = source.location, size
        self._connection = ResumingReader(source, layer)
        self._compressed = _BoundedReader(self._connection, layer.size)
        self._state, self._buffer = zlib.decompressobj(31), memoryview(bytearray(CHUNK))
        self._folder = Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with this object
        self._written = 0
        self._lock = threading.Lock()

    def reader_at(self, offset: int) -> _LayerReader:
        """Return a reader of the bytes from `offset` on."""
        return _LayerReader(self, offset)

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Read up to `len(buffer)` bytes from `offset` on into `buffer`; return how many, 0 at the end."""
        with self._lock:
            while self._written <= offset and self._decompress_more():
                pass
            with local_errors(self._folder):
                self._file.seek(offset)
                return self._file.readinto(buffer[: max(self._written - offset, 0)]) or 0

    def _decompress_more(self) -> bool:
        """Decompress the next chunk; return False at the end."""
        if self._state.eof or self._written == self._size:
            self._connection.close()
            return False
        # Input that the output limit has left over comes first.
        compressed = self._state.unconsumed_tail or self._buffer[: self._compressed.readinto(self._buffer)]
        try:
            # Bound the output: a few bytes of gzip may expand to gigabytes.
            piece = self._state.decompress(compressed, min(CHUNK, self._size - self._written))
        except zlib.error as error:
            raise FormatError(self._where, "its layer is not gzip, or is damaged") from error
        with local_errors(self._folder):
            self._file.seek(self._written)
            self._file.write(piece)
        self._written += len(piece)
        return bool(compressed)


class _LayerReader:
    """A reader of decompressed bytes, from a position on."""

    def __init__(self, layer: _GzipLayer, offset: int) -> None:
        self._layer, self._position = layer, offset

    def readinto(self, buffer: Any, /) -> int:
        """Read up to `len(buffer)` bytes; return 0 at the end."""
        count = self._layer.read_at(memoryview(buffer), self._position)
        self._position += count
        return count
