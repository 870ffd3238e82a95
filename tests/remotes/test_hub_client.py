"""Requests to a hub: repeated where that helps, without the token elsewhere, and no answer is believed blindly."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.remotes.adapter_folders import download
from adapterhub_converters.errors import (
    AdapterhubError,
    IntegrityError,
    NotFoundError,
    RemoteError,
)
from tests.remotes.test_hub_repository import BIG, pushed, remote
from tests.support.adapters import write_adapter
from tests.support.hub_server import TOKEN, Hub
from tests.support.proxy import Exchange, Proxy


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that keeps large files itself, so that all goes through the proxy."""
    with Hub(storage=False) as server:
        yield server


@pytest.fixture
def proxy(hub: Hub) -> Iterator[Proxy]:
    with Proxy(hub.host) as server:
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = write_adapter(tmp_path / "sql")
    (folder / "notes.txt").write_text(random.Random(0).randbytes(2 * BIG).hex())
    return folder


def test_errors_that_may_pass_are_tried_again_and_others_are_not(proxy: Proxy, hub: Hub, adapter: Path) -> None:
    version = pushed(hub, adapter)
    answers = iter((503, 429))
    proxy.before = lambda exchange: setattr(exchange, "status", next(answers, 0))
    with remote(proxy.address, pauses=(0.0, 0.0)) as source:
        assert source.manifest("main").digest == version.digest
        proxy.before = lambda exchange: setattr(exchange, "status", 400)
        with pytest.raises(RemoteError, match="HTTP 400"):
            source.manifest("main")


def test_other_lengths_ranges_commits_and_endless_bodies_are_refused(
    proxy: Proxy, hub: Hub, adapter: Path, tmp_path: Path
) -> None:
    version = pushed(hub, adapter)

    def longer(exchange: Exchange) -> None:
        exchange.data += b"more"
        exchange.answer["content-length"] = str(len(exchange.data))

    def other_bytes(exchange: Exchange) -> None:
        exchange.data = b"x" * len(exchange.data)

    def endless(exchange: Exchange) -> None:
        exchange.data = b"x" * (64 << 20)
        del exchange.answer["content-length"]
        exchange.answer["content-length"] = str(1 << 40)

    def commit(exchange: Exchange) -> None:
        exchange.answer["x-repo-commit"] = "0" * 40

    for name in ("notes.txt", "adapter.json", "README.md", "adapter_model.safetensors"):
        for lie in (longer, other_bytes, endless, commit):
            proxy.after = lambda exchange, lie=lie, name=name: lie(exchange) if name in exchange.path else None  # type: ignore[misc]
            out = tmp_path / f"{name}-{lie.__name__}"
            with remote(proxy.address) as source, pytest.raises(IntegrityError):
                download(source, "main", out, pauses=())
            assert not out.exists()
    proxy.after = lambda exchange: exchange.answer.update({"content-range": "bytes 7-9/10"})
    blob = next(layer for layer in version.layers if layer.path == "notes.txt")
    with remote(proxy.address) as source:
        source.manifest("main")
        with pytest.raises(RemoteError, match="the server sends another range than requested"):
            source.open_blob(blob, 5).__enter__()


def test_a_token_goes_along_no_redirect(hub: Hub, adapter: Path, tmp_path: Path) -> None:
    pushed(hub, adapter)
    hub.token = TOKEN
    with Proxy(hub.host) as proxy, Hub(storage=False) as elsewhere:

        def before(exchange: Exchange) -> None:
            if "/resolve/" in exchange.path:
                exchange.status, exchange.answer = 302, {"location": f"{elsewhere.url}{exchange.path}"}

        proxy.before = before
        with remote(proxy.address, token=TOKEN) as source, pytest.raises(NotFoundError):
            source.manifest("main")
        assert elsewhere.requests
        assert all("authorization" not in headers for _, _, headers in elsewhere.requests)
        assert all(exchange.headers["authorization"] == f"Bearer {TOKEN}" for exchange in proxy.exchanges)
        proxy.before = lambda exchange: exchange.answer.update(location=exchange.path) or setattr(exchange, "status", 302)  # type: ignore[func-returns-value]
        with remote(proxy.address, token=TOKEN) as source, pytest.raises(RemoteError, match="redirected more than"):
            source.manifest("main")


def test_no_error_repeats_the_token_regardless_of_the_hubs_answer(proxy: Proxy, hub: Hub) -> None:
    def before(exchange: Exchange) -> None:
        exchange.status, exchange.answer = 400, {"x-error-message": f"bad {exchange.headers['authorization']}"}

    proxy.before = before
    with remote(proxy.address, token=TOKEN) as source, pytest.raises(RemoteError) as caught:
        source.manifest("main")
    assert TOKEN not in str(caught.value)


LISTINGS: list[Any] = [
    b"",
    b"[]",
    b"{",
    b"\xff",
    b"[" * 100_000,
    {"sha": "main", "siblings": []},
    {"sha": "0" * 40, "siblings": {}},
    {"sha": "0" * 40, "siblings": [1, None, {"rfilename": 7}, {"rfilename": "adapter.json", "size": -1, "lfs": []}]},
    {"sha": "../../x", "siblings": []},
]


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_malformed_listing_is_one_line(proxy: Proxy, hub: Hub, tmp_path: Path, listing: Any) -> None:
    def before(exchange: Exchange) -> None:
        if "/api/" in exchange.path:
            exchange.status, exchange.data = 200, listing if isinstance(listing, bytes) else json.dumps(listing).encode()

    proxy.before = before
    with remote(proxy.address) as source, pytest.raises(AdapterhubError) as caught:
        download(source, "main", tmp_path / "out", pauses=())
    assert caught.value.exit_code in (3, 4, 5)
    assert len(str(caught.value).splitlines()) == 1
    for call in (
        lambda: remote(proxy.address).tags(),
        lambda: remote(proxy.address).has_blob(oci_manifest.Descriptor("", "x", 1)),
    ):
        with contextlib.suppress(RemoteError, IntegrityError):
            call()
