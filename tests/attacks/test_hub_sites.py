"""A hub that only this machine can reach answers no page of a site whose name leads here (DNS rebinding)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.hub.conftest import Running, serving


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("sites") / "hub") as running:
        yield running


def status(hub: Running, host: str) -> int:
    return requests.get(f"{hub.url}/api/models", headers={"host": host}, timeout=20).status_code


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8090", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1"]
)
def test_a_site_that_leads_here_is_refused(hub: Running, host: str) -> None:
    assert status(hub, host) == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:99", "[::1]:8090"])
def test_this_machine_is_answered(hub: Running, host: str) -> None:
    assert status(hub, host) == 200


def test_a_hub_with_an_address_of_its_own_is_answered(tmp_path: Path) -> None:
    with serving(tmp_path / "hub", url="https://hub.example") as running:
        assert status(running, "hub.example") == 200
