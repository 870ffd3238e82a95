"""Peers that take minutes to install or to start. `make test-peers` runs the tests here, and `make test` leaves them out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hub_clients, postgres
from tests.support.browser import Browser
from tests.support.hub_clients import HubClient, JavaScriptClient

_LONG = ("vllm", "outages", "killed", "crowd", "storm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the longest, so that other workers run the rest meanwhile."""
    items.sort(key=lambda item: not any(word in item.path.stem for word in _LONG))


@pytest.fixture(params=hub_clients.CLIENTS, ids=hub_clients.name)
def hf_client(request: pytest.FixtureRequest, tmp_path: Path) -> HubClient:
    """Each huggingface_hub that is supported; of some only by `parametrize("hf_client", [("2.4.0", None)], indirect=True)`."""
    version, xet = request.param
    return HubClient.create(version, xet, tmp_path / "hf-home")


@pytest.fixture
def js_client() -> JavaScriptClient:
    """@huggingface/hub."""
    return JavaScriptClient.create()


@pytest.fixture(scope="session", name="postgres")
def running_postgres() -> Iterator[postgres.Postgres]:
    """A PostgreSQL; a test takes a database of its own from it."""
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Browser:
    """A browser."""
    return Browser.installed()
