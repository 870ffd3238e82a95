"""Downloads go on where they stopped, and only the right bytes count."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.remotes.adapter_folders import download
from adapterhub.remotes.download import NOTE_INTERVAL
from adapterhub_converters.errors import IntegrityError, RemoteError
from tests.cli.test_process import PATH
from tests.remotes.test_oci_repository import BIG, pushed, readme, remote
from tests.support.adapters import write_adapter
from tests.support.proxy import Exchange, Proxy, kill_when_noted

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


def test_an_interrupted_download_resumes_where_it_stopped(proxy: Proxy, host: str, adapter: Path, tmp_path: Path) -> None:
    version = pushed(host, "cut", adapter)
    cuts = iter((100_000, 50_000, 1))

    def after(exchange: Exchange) -> None:
        if readme(version).digest in exchange.path:
            exchange.cut = next(cuts, None)

    proxy.after = after
    with remote(proxy.address, "cut") as source:
        download(source, "latest", tmp_path / "out", pauses=(0.0, 0.0))
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if readme(version).digest in exchange.path]
    assert ranges == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]
    assert (tmp_path / "out/README.md").read_bytes() == (adapter / "README.md").read_bytes()


def test_a_failed_download_is_resumed(proxy: Proxy, host: str, adapter: Path, tmp_path: Path) -> None:
    version, out = pushed(host, "gone-on", adapter), tmp_path / "out"
    proxy.after = lambda exchange: setattr(exchange, "cut", 200_000 if len(exchange.data) > BIG else None)
    with remote(proxy.address, "gone-on", pauses=()) as source:
        with pytest.raises(RemoteError, match="ended") as caught:
            download(source, "latest", out, pauses=(), jobs=1)
        assert caught.value.exit_code == 5
        assert not out.exists()
        proxy.after = lambda _: None
        download(source, "latest", out, pauses=())
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if readme(version).digest in exchange.path]
    assert ranges == [None, "bytes=200000-"]
    fetched = [exchange.path for exchange in proxy.exchanges if "/blobs/" in exchange.path]
    assert len(fetched) == len(version.layers) + 1  # the others were there
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_existing_files_are_trusted_only_by_digest(proxy: Proxy, host: str, adapter: Path, tmp_path: Path) -> None:
    version, out = pushed(host, "damaged", adapter), tmp_path / "out"
    proxy.after = lambda exchange: setattr(exchange, "cut", 200_000 if len(exchange.data) > BIG else None)
    with remote(proxy.address, "damaged", pauses=()) as source:
        with pytest.raises(RemoteError):
            download(source, "latest", out, pauses=())
        (part,) = tmp_path.glob(f".out.pull-*/{readme(version).digest[7:]}.part")
        part.write_bytes(b"X" + part.read_bytes()[1:])
        proxy.after = lambda _: None
        download(source, "latest", out, pauses=())
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if readme(version).digest in exchange.path]
    assert ranges == [None, None]


@pytest.mark.parametrize("target", ["out", "team/sql"], ids=["folder", "registry"])
def test_a_killed_pull_receives_at_most_8_MiB_again(proxy: Proxy, host: str, tmp_path: Path, target: str) -> None:
    folder = write_adapter(tmp_path / "sql")
    (folder / "README.md").write_bytes(b"x" * (3 * NOTE_INTERVAL))
    version, received = pushed(host, f"killed-{target.replace('/', '-')}", folder), 2 * NOTE_INTERVAL + (1 << 20)
    release = threading.Event()

    def after(exchange: Exchange) -> None:
        if readme(version).digest in exchange.path and not release.is_set():
            exchange.cut, exchange.wait = received, release

    proxy.after = after
    address = f"oci://{proxy.address}/faults/killed-{target.replace('/', '-')}"
    command = [sys.executable, "-m", "adapterhub", "copy", address, target if "/" in target else f"./{target}"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": PATH, "ADAPTERHUB_REGISTRY": str(tmp_path / "reg")}
    kill_when_noted(command, tmp_path, environment, 2 * NOTE_INTERVAL)
    assert not (tmp_path / "out").exists()
    release.set()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (_, again) = [exchange for exchange in proxy.exchanges if readme(version).digest in exchange.path]
    assert again.headers["range"] == f"bytes={2 * NOTE_INTERVAL}-"
    assert len(again.data) + received <= readme(version).size + NOTE_INTERVAL


def test_another_length_another_range_and_another_blob_are_refused(
    proxy: Proxy, host: str, adapter: Path, tmp_path: Path
) -> None:
    version = pushed(host, "lies", adapter)
    big = readme(version)

    def longer(exchange: Exchange) -> None:
        if big.digest in exchange.path:
            exchange.data += b"more"
            exchange.answer["content-length"] = str(len(exchange.data))

    def other_blob(exchange: Exchange) -> None:
        if big.digest in exchange.path:
            exchange.data = b"x" * big.size

    for lie in (longer, other_blob):
        proxy.after = lie
        with remote(proxy.address, "lies", pauses=()) as source, pytest.raises(IntegrityError, match=r"README\.md"):
            download(source, "latest", tmp_path / "out", pauses=())
        assert not (tmp_path / "out").exists()
    proxy.after = lambda exchange: exchange.answer.update({"content-range": "bytes 7-9/10"})
    says = "the server sends another range than requested"
    with remote(proxy.address, "lies", pauses=()) as source, pytest.raises(RemoteError, match=says):
        source.open_blob(big, 5).__enter__()


def test_a_registry_without_ranges_is_read_from_the_start(proxy: Proxy, host: str, adapter: Path, tmp_path: Path) -> None:
    version = pushed(host, "no-ranges", adapter)
    first = iter((True,))

    def before(exchange: Exchange) -> None:
        exchange.headers.pop("range", None)

    def after(exchange: Exchange) -> None:
        if readme(version).digest in exchange.path and next(first, False):
            exchange.cut = 100_000

    proxy.before, proxy.after = before, after
    with remote(proxy.address, "no-ranges") as source:
        download(source, "latest", tmp_path / "out", pauses=(0.0,))
    assert (tmp_path / "out/README.md").read_bytes() == (adapter / "README.md").read_bytes()
