"""A hub that is killed in the middle of an upload and started again."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub_converters.errors import RemoteError
from tests.hub.killing import Killable, killable_hub
from tests.hub.oci.conftest import Registry, digest_of
from tests.support.registry import docker_config

DATA = hashlib.sha256(b"seed").digest() * (1 << 18)  # 8 MiB


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Killable, str]]:
    """A hub in a process of its own, and a token."""
    with killable_hub(tmp_path / "hub") as process:
        yield process, process.running().token


def test_an_upload_goes_on_where_the_killed_hub_had_got_to(hub: tuple[Killable, str]) -> None:
    process, token = hub
    registry, half = Registry(process.url, token), len(DATA) // 2
    place = registry.ask("POST", "blobs/uploads/", b"").headers["location"]
    assert registry.ask("PATCH", place, DATA[:half], Content_Range=f"0-{half - 1}").status == 202
    connection = http.client.HTTPConnection(urlsplit(process.url).netloc, timeout=60)
    connection.putrequest("PATCH", place)
    for key, value in {"Authorization": f"Bearer {token}", "Content-Length": str(len(DATA) - half)}.items():
        connection.putheader(key, value)
    connection.endheaders(DATA[half : half + (3 << 20)])
    process.kill()
    connection.close()
    process.start()
    progress = registry.ask("GET", place)
    at = int(progress.headers["range"].partition("-")[2]) + 1
    assert progress.status == 204
    assert half <= at <= half + (3 << 20)
    assert registry.ask("PATCH", place, DATA[at:], Content_Range=f"{at}-{len(DATA) - 1}").status == 202
    completed = registry.ask("PUT", f"{place}?digest={digest_of(DATA)}", b"")
    assert completed.status == 201
    assert registry.ask("GET", completed.headers["location"]).body == DATA


class Deadly:
    """A source of one blob; the hub is killed when three quarters of it have been read."""

    where = "source"

    def __init__(self, process: Killable) -> None:
        self._process, self._bytes_left = process, 3 * len(DATA) // 4

    @contextmanager
    def open_blob(self, _blob: Descriptor, start: int = 0) -> Iterator[Any]:
        """The bytes from `start` on."""
        file = io.BytesIO(DATA[start:])

        class Reader:
            def readinto(_, buffer: Any) -> int:
                count = file.readinto(buffer)
                if self._bytes_left > 0 >= self._bytes_left - count:
                    self._process.kill()
                self._bytes_left -= count
                return count

        yield Reader()

    def stop(self, *, on: bool = True) -> None:
        """Do nothing."""


def test_our_own_client_goes_on_in_the_next_run(hub: tuple[Killable, str], tmp_path: Path) -> None:
    process, token = hub
    config = docker_config(tmp_path / "docker", urlsplit(process.url).netloc, token)
    blob = Descriptor("", digest_of(DATA), len(DATA))
    source: Any = Deadly(process)
    with contextlib.ExitStack() as stack:

        def remote() -> OciRepository:
            address = OciAddress.parse(process.url.replace("http", "oci+http") + "/team/other")
            return stack.enter_context(
                OciRepository(address, config, pauses=(), piece=1 << 20, largest=1 << 20, uploads=tmp_path / "uploads")
            )

        with pytest.raises(RemoteError):
            remote().put_blob(blob, source)
        process.start()
        assert 0 < remote().put_blob(blob, source) <= len(DATA) // 2
        assert remote().has_blob(blob)
    assert Registry(process.url, token).ask("GET", f"blobs/{blob.digest}").body == DATA
