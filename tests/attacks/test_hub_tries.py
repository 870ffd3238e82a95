"""Who has many addresses has no more tries at tokens and codes than others have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.hub.conftest import Running, serving

LIMIT = 20  # bad tokens a minute


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path / "hub", behind_proxy=True) as running:
        yield running


def tries(hub: Running, addresses: list[str]) -> list[int]:
    found = []
    for address in addresses:
        headers = {"authorization": "Bearer wrong", "x-forwarded-for": address}
        found.append(requests.get(f"{hub.url}/api/whoami-v2", headers=headers, timeout=10).status_code)
    return found


def test_the_addresses_of_one_network_share_their_tries(hub: Running) -> None:
    assert tries(hub, [f"2001:db8:1:1::{n:x}" for n in range(LIMIT + 1)]) == [401] * LIMIT + [429]
    assert tries(hub, ["2001:db8:1:2::1", "203.0.113.7", "::ffff:203.0.113.8", "unknown"]) == [401] * 4


def test_two_addresses_of_ipv4_have_their_own(hub: Running) -> None:
    assert tries(hub, ["203.0.113.1"] * (LIMIT + 1))[-1] == 429
    assert tries(hub, ["203.0.113.2", "::ffff:203.0.113.1"]) == [401, 429]
