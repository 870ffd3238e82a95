"""What a network and a hub do wrong: nothing of it is accepted, and what was received is not received again."""

from __future__ import annotations

import base64
import json
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.remotes.adapter_folders import AdapterFolder, download
from adapterhub.remotes.download import NOTE_INTERVAL
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub.remotes.hub.hub_repository import HubRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    NotFoundError,
    RemoteError,
)
from tests.cli.test_process import PATH
from tests.remotes.test_oci_repository import flip
from tests.support.adapters import write_adapter
from tests.support.hub_server import Hub
from tests.support.proxy import Exchange, Proxy, kill_when_noted

BIG = 300_000


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


def remote(host: str, *, token: str | None = None, pauses: tuple[float, ...] = ()) -> HubRepository:
    return HubRepository(HubAddress.parse("hf://org/sql"), f"http://{host}", token, pauses=pauses)


def pushed(hub: Hub, adapter: Path) -> Manifest:
    with remote(hub.host) as to:
        return copy_version(AdapterFolder(adapter), "latest", to, "main").manifest


# ---- flips


def test_none_of_60_flips_on_the_way_here_is_accepted(proxy: Proxy, hub: Hub, tmp_path: Path) -> None:
    version = pushed(hub, write_adapter(tmp_path / "sql"))
    right = {layer.path: layer.digest for layer in version.layers}
    accepted, refused = 0, set()
    for seed in range(60):
        dice, out = random.Random(seed), tmp_path / f"out-{seed}"
        countdown = dice.randrange(1 + len(version.layers))

        def after(exchange: Exchange, dice: random.Random = dice) -> None:
            nonlocal countdown
            if countdown == 0 and exchange.data:
                exchange.data = flip(exchange.data, dice)
            countdown -= 1

        proxy.after = after
        try:
            with remote(proxy.address) as source:
                # One file at a time: which answer is flipped depends on the dice alone.
                manifest = download(source, version.digest if seed % 2 else "main", out, pauses=(), jobs=1)
        except AdapterhubError as error:
            refused.add(error.exit_code)
            assert not out.exists()
        else:  # of a listing, much means nothing to us: who likes it, and since when
            accepted += 1
            assert {layer.path: layer.digest for layer in manifest.layers} == right
            assert oci_manifest.build(out).digest == version.digest
    assert accepted < 60
    assert refused <= {3, 4, 5, 6}


def test_no_flip_of_what_is_stored_is_accepted_on_the_way_there(proxy: Proxy, hub: Hub, tmp_path: Path) -> None:
    source = AdapterFolder(write_adapter(tmp_path / "sql"))
    for seed in range(40):
        dice = random.Random(seed)
        hub.repos.clear()
        hub.large.clear()

        def before(exchange: Exchange, dice: random.Random = dice) -> None:
            if exchange.method == "PUT":
                exchange.body = flip(exchange.body, dice)

        def commit(exchange: Exchange, dice: random.Random = dice) -> None:
            if "/commit/" in exchange.path:
                lines = [json.loads(line) for line in exchange.body.splitlines()]
                line = dice.choice([line for line in lines if line["key"] == "file"])
                line["value"]["content"] = base64.b64encode(flip(base64.b64decode(line["value"]["content"]), dice)).decode()
                exchange.body = b"\n".join(json.dumps(line).encode() for line in lines)

        proxy.before = before if seed % 2 else commit
        with remote(proxy.address) as to, pytest.raises(AdapterhubError) as caught:
            copy_version(source, "latest", to, "main")
        assert caught.value.exit_code in (4, 5)
        if caught.value.exit_code == 4:
            assert re.search(r"the hub has other bytes than were sent: \S+\. Push it again$", str(caught.value))
            assert (caught.value.code, caught.value.hint) == ("integrity", "Push it again")


# ---- cuts


def test_an_interrupted_download_resumes_where_it_stopped(proxy: Proxy, hub: Hub, adapter: Path, tmp_path: Path) -> None:
    pushed(hub, adapter)
    cuts = iter((100_000, 50_000, 1))

    def after(exchange: Exchange) -> None:
        if "notes.txt" in exchange.path:
            exchange.cut = next(cuts, None)

    proxy.after = after
    with remote(proxy.address) as source:
        download(source, "main", tmp_path / "out", pauses=(0.0, 0.0))
    ranges = [exchange.headers.get("range") for exchange in proxy.exchanges if "notes.txt" in exchange.path]
    assert ranges == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]
    assert (tmp_path / "out/notes.txt").read_bytes() == (adapter / "notes.txt").read_bytes()


def test_a_killed_pull_receives_at_most_8_MiB_again(proxy: Proxy, hub: Hub, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "sql")
    (folder / "notes.txt").write_bytes(b"x" * (3 * NOTE_INTERVAL))
    pushed(hub, folder)
    release, received = threading.Event(), 2 * NOTE_INTERVAL + (1 << 20)

    def after(exchange: Exchange) -> None:
        if "notes.txt" in exchange.path and not release.is_set():
            exchange.cut, exchange.wait = received, release

    proxy.after = after
    command = [sys.executable, "-m", "adapterhub", "pull", "hf://org/sql", "-o", "out"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": PATH, "HF_ENDPOINT": f"http://{proxy.address}", "HF_HOME": "."}
    kill_when_noted(command, tmp_path, environment, 2 * NOTE_INTERVAL)
    assert not (tmp_path / "out").exists()
    release.set()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (_, again) = [exchange for exchange in proxy.exchanges if "notes.txt" in exchange.path]
    assert again.headers["range"] == f"bytes={2 * NOTE_INTERVAL}-"
    assert (tmp_path / "out/notes.txt").read_bytes() == b"x" * (3 * NOTE_INTERVAL)


@pytest.mark.parametrize("branch", ["main", "prod"])
def test_a_push_whose_answers_got_lost_is_one_commit(proxy: Proxy, hub: Hub, adapter: Path, branch: str) -> None:
    lost = {"commit": 1, "PUT": 1, "preupload": 1, "create": 1} | ({"/branch/": 1} if branch == "prod" else {})

    def after(exchange: Exchange) -> None:
        for part, losses_left in lost.items():
            if (part in exchange.path or part == exchange.method) and losses_left:
                lost[part] -= 1
                exchange.hang_up = True

    proxy.after = after
    with remote(proxy.address, pauses=(0.0, 0.0)) as to:
        manifest = copy_version(AdapterFolder(adapter), "latest", to, branch).manifest
        assert to.commit_id == hub.repos["org/sql"].branches[branch].oid
    assert not any(lost.values())
    assert len(hub.repos["org/sql"].commits) == 2  # the hub's first, and ours
    assert remote(hub.host).manifest(branch).digest == manifest.digest


# ---- lies


@pytest.mark.parametrize(
    "actions",
    [
        {"upload": {"href": 3}}, {"upload": {"href": "ftp://x"}}, {"upload": 7},
        {"upload": {"href": "/storage/x", "header": 7}},
        {"upload": {"href": "http://127.0.0.1/", "header": {"a": "b\r\nc: d"}}},
        {"upload": {"href": "http://127.0.0.1/", "header": {"chunk_size": "0", "1": "x"}}},
        {"upload": {"href": "http://127.0.0.1/", "header": {"chunk_size": "1", "1": "x", "3": "y"}}},
        {"upload": {"href": "http://127.0.0.1/", "header": {"chunk_size": "9" * 400, "1": "x"}}},
    ],
)  # fmt: skip
def test_a_hub_without_a_usable_upload_method_is_one_line(
    proxy: Proxy, hub: Hub, adapter: Path, actions: dict[str, Any]
) -> None:
    def after(exchange: Exchange) -> None:
        if "/batch" in exchange.path:
            oid = json.loads(exchange.body)["objects"][0]["oid"]
            exchange.data = json.dumps({"objects": [{"oid": oid, "size": 1, "actions": actions}]}).encode()
            exchange.answer["content-length"] = str(len(exchange.data))

    proxy.after = after
    with remote(proxy.address) as to, pytest.raises(RemoteError):
        copy_version(AdapterFolder(adapter), "latest", to, "main")
    assert list(hub.repos["org/sql"].branches["main"].files) == [".gitattributes"]


def test_a_hub_that_claims_a_large_file_it_lacks_gets_no_commit(proxy: Proxy, hub: Hub, adapter: Path) -> None:
    def after(exchange: Exchange) -> None:
        if "/batch" in exchange.path:
            entry = json.loads(exchange.body)["objects"][0]
            exchange.data = json.dumps({"objects": [entry]}).encode()
            exchange.answer["content-length"] = str(len(exchange.data))

    proxy.after = after
    with remote(proxy.address) as to, pytest.raises(RemoteError, match="does not exist"):
        copy_version(AdapterFolder(adapter), "latest", to, "main")
    with remote(hub.host) as repository, pytest.raises(NotFoundError):
        repository.manifest("main")


def test_two_that_push_at_once_are_one_version_and_one_conflict(hub: Hub, tmp_path: Path) -> None:
    pushed(hub, write_adapter(tmp_path / "first"))
    results: list[object] = []
    barrier = threading.Barrier(2)

    def push(seed: int) -> None:
        source = AdapterFolder(write_adapter(tmp_path / f"n{seed}", seed))
        with remote(hub.host) as to:
            commit = to._writer.create_commit

            def together(*args: Any) -> str:
                barrier.wait(20)
                return commit(*args)

            to._writer.create_commit = together  # type: ignore[method-assign]
            try:
                results.append(copy_version(source, "latest", to, "main").manifest.digest)
            except ConflictError as error:
                results.append(error)

    threads = [threading.Thread(target=push, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(result).__name__ for result in results) == ["ConflictError", "str"]
    assert remote(hub.host).manifest("main").digest in results
