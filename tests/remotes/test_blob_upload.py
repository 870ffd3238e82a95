"""Uploads to a registry that loses answers or bytes: resumed where it says, begun anew or given up."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.oci_repository import OciRepository
from adapterhub.remotes.version_copy import copy_version, distinct_blobs
from adapterhub_converters.errors import RemoteError
from tests.remotes.test_oci_repository import BIG, readme, remote
from tests.support.adapters import write_adapter
from tests.support.proxy import Exchange, Proxy
from tests.support.uploads import Uploads

pytestmark = pytest.mark.peer


@pytest.fixture
def proxy(host: str) -> Iterator[Proxy]:
    with Proxy(host) as server:
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "sql")
    (folder / "README.md").write_text("# Long\n" + random.Random(0).randbytes(BIG // 2).hex())
    return folder


LOST = ["half of a piece", "an answer", "the last answer"]


def losing(proxy: Proxy, lost: str) -> None:
    """Have the proxy lose something of the second piece of an upload, or the answer to its end."""
    pieces = 0

    def after(exchange: Exchange) -> None:
        nonlocal pieces
        pieces += exchange.method == "PATCH"
        if pieces == 2 and lost != "the last answer":
            exchange.hang_up = exchange.method == "PATCH"
        if exchange.method == "PUT" and pieces == 5:
            exchange.hang_up, pieces = True, 100

    def before(exchange: Exchange) -> None:
        if exchange.method == "PATCH" and pieces == 1 and lost == "half of a piece":
            start = int(exchange.headers["content-range"].partition("-")[0])
            exchange.body = exchange.body[:1000]
            exchange.headers["content-range"] = f"{start}-{start + 999}"

    proxy.before, proxy.after = before, after


@pytest.mark.parametrize("lost", LOST)
def test_an_upload_whose_answers_got_lost_ends_well(proxy: Proxy, host: str, adapter: Path, lost: str) -> None:
    name = f"up-{lost.replace(' ', '-')}"
    losing(proxy, lost)
    with remote(proxy.address, name) as to:
        manifest = copy_version(AdapterFolder(adapter), "latest", to, "latest").manifest
    with remote(host, name) as repository:
        assert repository.manifest("latest").digest == manifest.digest
        assert all(repository.has_blob(blob) for blob in distinct_blobs(manifest))


@pytest.mark.parametrize("lost", LOST)
def test_an_upload_resumes_at_the_offset_the_registry_reports(adapter: Path, lost: str) -> None:
    source, uploads = AdapterFolder(adapter), Uploads()
    blob = readme(source.manifest("latest"))
    with Proxy() as proxy, remote(proxy.address, "uploads") as to:
        losing(proxy, lost)
        cutting = proxy.before

        def before(exchange: Exchange) -> None:
            cutting(exchange)
            uploads.answer(exchange)

        proxy.before = before
        to.put_blob(blob, source)
        assert to.has_blob(blob)
    assert uploads.blobs == {blob.digest: (adapter / "README.md").read_bytes()}
    assert len(uploads.sessions) == 1
    assert sum(len(exchange.body) for exchange in proxy.exchanges if exchange.status == 202) == blob.size


def test_an_upload_of_which_the_registry_lost_a_part_begins_anew(adapter: Path, tmp_path: Path) -> None:
    source, uploads = AdapterFolder(adapter), Uploads()
    blob = readme(source.manifest("latest"))
    with Proxy() as proxy:
        address = OciAddress.parse(f"oci://{proxy.address}/faults/lost")

        def place() -> OciRepository:
            return OciRepository(address, pauses=(), piece=1 << 16, largest=1 << 16, uploads=tmp_path / "notes")

        def cut(exchange: Exchange) -> None:
            uploads.answer(exchange)
            if exchange.method == "PATCH" and len(proxy.exchanges) > 3:
                exchange.status = 503

        proxy.before = cut
        with place() as to, pytest.raises(RemoteError):
            to.put_blob(blob, source)
        (session,) = uploads.sessions.values()
        del session[100:]
        proxy.before = uploads.answer
        with place() as to:
            to.put_blob(blob, source)
    assert uploads.blobs == {blob.digest: (adapter / "README.md").read_bytes()}
    assert len(uploads.sessions) == 2


def test_a_registry_that_refuses_each_piece_is_given_up(adapter: Path) -> None:
    source, uploads = AdapterFolder(adapter), Uploads()
    blob = readme(source.manifest("latest"))

    def before(exchange: Exchange) -> None:
        uploads.answer(exchange)
        if exchange.method == "PATCH":
            uploads.sessions[exchange.path].clear()
            exchange.status = 416

    with Proxy() as proxy, remote(proxy.address, "never") as to:
        proxy.before = before
        with pytest.raises(RemoteError) as error:
            to.put_blob(blob, source)
    assert error.value.where.startswith(f"oci://{proxy.address}/faults/never")
    assert error.value.what == "the registry refuses the next piece of the upload (HTTP 416) (2 tries)"
    assert error.value.hint == "Try again later"
