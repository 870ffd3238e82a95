"""Images of adapters whose layer somebody compressed: one pass over it, whatever order its files are read in, and an end."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from adapterhub.manifest.oci_manifest import Descriptor, Manifest
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.oci.adapter_image import AdapterImage, UnpackedSource
from adapterhub.remotes.protocol import Reader
from adapterhub_converters.errors import FormatError, NotFoundError
from tests.remotes.test_protocol import read
from tests.support.adapters import Make


class Compressed:
    """An image with its layer in gzip; counts how many bytes of that are read."""

    def __init__(self, image: AdapterImage, packed: bytes, size: int = 0) -> None:
        self.image, self.packed, self.bytes_read = image, packed, 0
        self.layer = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", "sha256:" + "1" * 64, size or len(packed))
        self.location = "here"

    def manifest(self, reference: str) -> Manifest:
        return replace(self.image.manifest(reference), layers=(self.layer,))

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        if blob.digest != self.layer.digest:
            with self.image.open_blob(blob, start) as reader:
                yield reader
            return
        yield _Counting(self, start)

    def tags(self) -> list[str]:
        return []

    def stop(self, *, on: bool = True) -> None:
        pass


class _Counting:
    def __init__(self, source: Compressed, at: int) -> None:
        self._source, self._at = source, at

    def readinto(self, buffer: memoryview, /) -> int:
        piece = self._source.packed[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        self._source.bytes_read += len(piece)
        return len(piece)


@pytest.fixture
def image(make: Make) -> AdapterImage:
    folder = make("sql")
    for n in range(200):
        (folder / f"note-{n}.md").write_text(f"{n}\n" * 100)
    return AdapterImage(AdapterFolder(folder), "latest")


def test_a_compressed_layer_of_many_files_is_read_once_in_whatever_order(image: AdapterImage) -> None:
    source = Compressed(image, gzip.compress(read(image, image.image_manifest.layers[0])))
    inside = UnpackedSource(source)
    layers = inside.manifest("latest").layers
    for blob in (*reversed(layers), *layers):
        assert "sha256:" + hashlib.sha256(read(inside, blob)).hexdigest() == blob.digest
        assert len(read(inside, blob, blob.size // 2)) == blob.size - blob.size // 2
    assert source.bytes_read <= len(source.packed)


def test_a_compressed_layer_that_brings_nothing_ends_with_its_size(image: AdapterImage) -> None:
    empty = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = empty.compress(b"") + empty.flush(zlib.Z_SYNC_FLUSH)
    source = Compressed(image, head + b"\0\0\0\xff\xff" * 1_000_000, size=100_000)
    inside = UnpackedSource(source)
    assert read(inside, inside.manifest("latest").layers[-1]) == b""
    assert source.bytes_read <= 100_000


def test_a_layer_that_is_no_gzip_brings_no_file(image: AdapterImage) -> None:
    inside = UnpackedSource(Compressed(image, b"no gzip at all", size=20))
    with pytest.raises(FormatError, match="its layer is not gzip, or is damaged"):
        read(inside, inside.manifest("latest").layers[0])
    inside = UnpackedSource(Compressed(image, b"", size=20))
    assert read(inside, inside.manifest("latest").layers[0]) == b""


def test_an_image_has_a_layer_and_a_config_and_no_other_blob(image: AdapterImage) -> None:
    other_blob = Descriptor("", f"sha256:{7:064x}", 1)
    with pytest.raises(NotFoundError, match=f"the image has no blob {other_blob.digest}"):
        read(image, other_blob)


def test_what_a_compressed_layer_has_beyond_the_packaged_files_is_not_kept(image: AdapterImage) -> None:
    whole = read(image, image.image_manifest.layers[0])
    source = Compressed(image, gzip.compress(whole + bytes(100 << 20), 1))
    inside = UnpackedSource(source)
    for blob in inside.manifest("latest").layers:
        read(inside, blob)
    assert inside._gzip_layer is not None
    assert inside._gzip_layer._written <= len(whole)
