"""Notes of unfinished uploads: for one user, one file and one registry."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.oci.upload_notes import UploadNotes, UploadProgress
from adapterhub.remotes.protocol import Reader
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import RemoteError
from tests.remotes.test_parallel_transfer import MIB, remote, write_large
from tests.remotes.test_protocol import Bytes, blob_of
from tests.support import uploads
from tests.support.proxy import Proxy

pytestmark = pytest.mark.peer


@pytest.fixture
def fixed() -> Iterator[tuple[Proxy, uploads.Uploads]]:
    upload_registry = uploads.Uploads()
    with Proxy() as proxy:
        proxy.before = upload_registry.answer
        yield proxy, upload_registry


class Failing(Bytes):
    """Bytes whose source fails after some of them."""

    def __init__(self, data: bytes, upto: int) -> None:
        super().__init__(data)
        self._upto = upto

    @contextlib.contextmanager
    def open_blob(self, blob: Descriptor, start: int = 0) -> Iterator[Reader]:
        with super().open_blob(blob, start) as reader:
            at = start

            class Stops:
                def readinto(inner, buffer: memoryview) -> int:
                    nonlocal at
                    if at >= self._upto:
                        raise RemoteError("bytes", "stopped")
                    n = int(reader.readinto(buffer[: self._upto - at]) or 0)
                    at += n
                    return n

            yield Stops()


def test_an_upload_is_resumed_only_if_its_bytes_are_the_same(fixed: tuple[Proxy, uploads.Uploads], tmp_path: Path) -> None:
    proxy, upload_registry = fixed
    data = random.Random(3).randbytes(6 * MIB)
    with remote(proxy.address, "on", tmp_path / "kept") as to, pytest.raises(RemoteError):
        to.put_blob(blob_of(data), Failing(data, 3 * MIB))
    assert upload_registry.sent == 3 * MIB
    with remote(proxy.address, "on", tmp_path / "kept") as to:
        assert to.put_blob(blob_of(data), Bytes(data)) == 3 * MIB
        assert to.has_blob(blob_of(data))
    assert upload_registry.sent == 6 * MIB

    # One that nobody knew the digest of, and then another file of the same size.
    other_data = b"x" + data[1:]
    with remote(proxy.address, "two", tmp_path / "kept") as to:
        with pytest.raises(RemoteError):
            to.put_unnamed(6 * MIB, "README.md", Failing(data, 3 * MIB))
        assert to.put_blob(blob_of(other_data), Bytes(other_data)) == 6 * MIB
        assert to.put_blob(blob_of(data), Bytes(data)) == 3 * MIB
    assert upload_registry.blobs[blob_of(other_data).digest] == other_data


@pytest.mark.parametrize("note", ["", "{", "[]", '{"url": 3}', '{"url": "ftp://x/", "size": 6291456, "digest": "", "sent": 1}'])
def test_an_invalid_note_is_skipped(fixed: tuple[Proxy, uploads.Uploads], tmp_path: Path, note: str) -> None:
    proxy, _ = fixed
    data = bytes(6 * MIB)
    notes = UploadNotes(tmp_path, f"oci://{proxy.address}/moving/on")
    with notes.new_note() as new_note:
        new_note.write(UploadProgress("http://127.0.0.1:1/", 6 * MIB, "", MIB, "sha256:0"))
    (path,) = tmp_path.rglob("*.json")
    path.write_text(note)
    with remote(proxy.address, "on", tmp_path) as to:
        assert to.put_blob(blob_of(data), Bytes(data)) == 6 * MIB


def test_notes_are_for_this_user_s_eyes_and_go_with_the_manifest(host: str, tmp_path: Path) -> None:
    folder = write_large(tmp_path / "sql", 6 * MIB)
    with remote(host, "eyes", tmp_path / "kept") as to:
        source = AdapterFolder(folder)
        big = max(source.manifest("latest").layers, key=lambda layer: layer.size)
        to.put_blob(big, source)
        (note,) = (tmp_path / "kept").rglob("*.json")
        assert [path.stat().st_mode & 0o077 for path in (note, note.parent)] == [0, 0]
        assert not to.is_new()
        copy_version(source, "latest", to, "latest")
    assert list((tmp_path / "kept").iterdir()) == []
