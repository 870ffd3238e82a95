"""Hubs that share a PostgreSQL and a bucket: one process, and two behind one address that take turns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.storage.from_settings import open_database, open_storage
from adapterhub.hub.storage.shared_storage import SharedStorage
from tests.hub.conftest import Running, adapter, hf, serving
from tests.hub.xet.test_receiving import large
from tests.support.balancer import balancing
from tests.support.object_stores import Server
from tests.support.postgres import Postgres

__all__ = ["adapter", "hf", "large"]


@pytest.fixture
def places(postgres: Postgres, moto: Server) -> dict[str, Any]:
    """The settings of all hubs that share an empty database and an empty bucket."""
    return {"database": postgres.database(), "blobs": f"s3://{moto.bucket()}/hub", "environ": moto.environ}


@pytest.fixture
def opened(tmp_path: Path, places: dict[str, Any]) -> Iterator[Callable[..., SharedStorage]]:
    """Open the storage of another process, in a folder of its own."""
    with ExitStack() as stack:

        def opened(name: str = "one", **changed_settings: Any) -> SharedStorage:
            settings = HubSettings(registry=tmp_path / name, **{**places, **changed_settings})
            return stack.enter_context(closing(open_storage(settings)))  # type: ignore[return-value]

        yield opened


@contextmanager
def process(folder: Path, places: dict[str, Any], *words: str) -> Iterator[str]:
    """The address of a hub in a process of its own, killed in the end."""
    command = [sys.executable, "-m", "adapterhub", "--registry", str(folder), "hub", "start", "--port", "0", *words]
    env = {
        **os.environ,
        **places["environ"],
        "ADAPTERHUB_DATABASE": places["database"],
        "ADAPTERHUB_BLOBS": places["blobs"],
    }
    log = folder.with_suffix(".log")
    with open(log, "wb") as err:
        started = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=err, text=True)
    try:
        assert started.stdout
        line = started.stdout.readline()
        assert line.startswith("http"), log.read_text()
        yield line.split()[0]
    finally:
        started.kill()
        started.wait()


@pytest.fixture(params=["one", "two"])
def hub(request: pytest.FixtureRequest, tmp_path: Path, places: dict[str, Any]) -> Iterator[Running]:
    """An empty hub over PostgreSQL and a bucket: of one process, and of two with a folder each."""
    if request.param == "one":
        with serving(tmp_path / "hub", **places) as running:
            yield running
        return
    with ExitStack() as stack:
        urls = [stack.enter_context(process(tmp_path / f"hub-{number}", places)) for number in range(2)]
        url = stack.enter_context(balancing(urls))
        settings = HubSettings(registry=tmp_path / "beside", **places)
        with closing(open_database(settings)) as database:
            token = access_tokens.create(database, "alice", "write")
        yield Running(url, settings, token)
