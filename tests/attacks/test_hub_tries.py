"""Who has many addresses has no more tries at tokens and codes, and no more requests, than others have."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.routing import Route

from adapterhub.http_server import rate_windows
from adapterhub.http_server.rate_windows import Windows
from adapterhub.hub.hub_database import HubDatabase
from tests.attacks.test_hub_bodies import ROUTES
from tests.attacks.test_hub_memory import PARAMETERS
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

LIMIT = 20  # bad tokens a minute


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path / "hub", behind_proxy=True) as running:
        yield running


def tries(hub: Running, addresses: list[str]) -> list[int]:
    statuses = []
    for address in addresses:
        headers = {"authorization": "Bearer wrong", "x-forwarded-for": address}
        statuses.append(requests.get(f"{hub.url}/api/whoami-v2", headers=headers, timeout=10).status_code)
    return statuses


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


@pytest.mark.parametrize("secret", ["token", "password", "session"])
def test_what_nobody_has_made_is_looked_up_in_a_thread(hub: Running, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """Each wrong token made the event loop wait for the database, once for the limits and once for the route."""
    Tenant(hub, "red").create("open")
    places: list[str] = []
    lookup_count = 0

    def watched(method: Any) -> Any:
        def ask(*values: Any) -> Any:
            nonlocal lookup_count
            lookup_count += 1
            if asyncio._get_running_loop() is not None:
                places.append("".join(traceback.format_stack(limit=6)))
            return method(*values)

        return ask

    for name in ("select", "execute", "execute_many"):
        monkeypatch.setattr(HubDatabase, name, watched(getattr(HubDatabase, name)))
    for route in [route for route in ROUTES if isinstance(route, Route)]:
        for number, method in enumerate(sorted(route.methods or ())):
            path = route.path.replace(":path", "")
            for name in route.param_convertors:
                path = path.replace(f"{{{name}}}", PARAMETERS.get(name, "x"))
            unknown = f"hf_{number}{len(path):039}"
            headers = {"authorization": f"Bearer {unknown}"} if secret == "token" else {}
            cookies = {"adapterhub_session": unknown} if secret == "session" else {}
            login = ("red", unknown) if secret == "password" else None
            requests.request(
                method, hub.url + path, headers=headers, cookies=cookies, auth=login, timeout=20, allow_redirects=False
            )
    assert lookup_count > len(ROUTES)
    assert not places, places[0]
