"""Who has many addresses has no more tries at tokens and codes, and no more requests, than others have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from adapterhub.http_server import rate_windows
from adapterhub.http_server.rate_windows import Windows
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


def test_the_ports_that_a_proxy_appends_share_their_tries(hub: Running) -> None:
    assert tries(hub, [f"203.0.113.9:{port}" for port in range(4000, 4000 + LIMIT + 1)]) == [401] * LIMIT + [429]
    assert tries(hub, [f"[2001:db8:9::1]:{port}" for port in range(LIMIT + 1)]) == [401] * LIMIT + [429]
    assert tries(hub, ["203.0.113.9", "2001:db8:9::2", "::ffff:203.0.113.10", "[2001:db8:a::1]"]) == [429, 429, 401, 401]


def test_two_addresses_of_ipv4_have_their_own(hub: Running) -> None:
    assert tries(hub, ["203.0.113.1"] * (LIMIT + 1))[-1] == 429
    assert tries(hub, ["203.0.113.2", "::ffff:203.0.113.1"]) == [401, 429]


def test_the_addresses_of_one_network_share_their_requests(tmp_path: Path) -> None:
    """Each of the 2**64 addresses of a client had a window of its own."""
    with serving(tmp_path / "hub", behind_proxy=True, limits={"api": (3, 60)}) as hub:
        statuses = [
            requests.get(f"{hub.url}/api/models", headers={"x-forwarded-for": address}, timeout=10).status_code
            for address in (*(f"2001:db8:1:1::{n:x}" for n in range(4)), "2001:db8:1:2::1")
        ]
    assert statuses == [200, 200, 200, 429, 200]


def test_a_flood_of_addresses_gives_nobody_new_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """All windows began anew when there were too many: for an account that is over its limit, and for who guesses codes."""
    monkeypatch.setattr(rate_windows, "_MAX_WINDOWS", 10)
    windows = Windows(2, 60)
    for _ in range(3):
        windows.count("guesser")
    for number in range(1000):
        windows.count(f"2001:db8:0:{number:x}::/64")
        assert len(windows._counts) <= 10
    assert windows.count("guesser").over
    assert windows.count("looked at", 0) == windows.count("looked at", 0)
    assert "looked at" not in windows._counts
