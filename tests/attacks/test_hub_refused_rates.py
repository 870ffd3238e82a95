"""Who is refused without end is told to wait, on every route, before anything is read for them; who has an account goes on.

The routes are those of the application, so that a new one is held to the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from starlette.routing import Route

from adapterhub.hub import app, middleware
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

FEW = 8
ROUTES = [route for route in (*app.api_routes(), *app.page_routes()) if isinstance(route, Route)]
ALWAYS = ("/health", "/ready", "/metrics")
REFUSED = {
    400: "/v2/red/open/blobs/nonsense",
    401: "/api/whoami-v2",
    403: f"/lfs/a/b/{'0' * 64}?signature=1",
    404: "/api/models/red/nothing",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(middleware, "REFUSALS", FEW)
    with serving(tmp_path / "hub", behind_proxy=True) as running:
        yield running


def ask(hub: Running, method: str, path: str, address: str, token: str = "", cookie: str = "") -> requests.Response:
    headers = {"x-forwarded-for": address, **({"authorization": f"Bearer {token}"} if token else {})}
    headers |= {"cookie": cookie} if cookie else {}
    return requests.request(method, hub.url + path, headers=headers, timeout=20, allow_redirects=False)


@pytest.mark.parametrize("status", REFUSED)
def test_each_kind_of_refusal_counts(hub: Running, status: int) -> None:
    method = "PUT" if status == 403 else "GET"
    answers = [ask(hub, method, REFUSED[status], "203.0.113.1").status_code for _ in range(FEW + 1)]
    assert answers == [status] * FEW + [429]


def test_every_route_tells_who_was_refused_too_often_to_wait(hub: Running) -> None:
    red = Tenant(hub, "red")
    red.create("open")
    for number in range(FEW):
        ask(hub, "GET", f"/api/models/red/nothing-{number}", f"2001:db8:0:1::{number:x}")
    for route in ROUTES:
        path = re.sub(r"{\w+(:path)?}", "red", route.path)
        for method in (route.methods or set()) if path not in ALWAYS else ():
            answer = ask(hub, method, path, "2001:db8:0:1::ffff", token="wrong" if len(path) % 2 else "")
            assert answer.status_code == 429, (method, path)
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert ask(hub, "GET", "/health", "2001:db8:0:1::1").status_code == 200
    # Others go on, and so does who has an account there.
    assert ask(hub, "GET", "/api/models/red/open", "2001:db8:0:2::1").status_code == 200
    assert ask(hub, "GET", "/api/models/red/open", "2001:db8:0:1::1", token=hub.token).status_code == 200
    assert ask(hub, "GET", "/api/models/red/open", "2001:db8:0:1::1", cookie="adapterhub_session=wrong").status_code == 429


def test_what_does_not_exist_for_an_account_is_no_refusal_of_its_network(hub: Running) -> None:
    answers = {
        ask(hub, "HEAD", f"/v2/red/open/blobs/sha256:{n:064x}", "203.0.113.1", hub.token).status_code for n in range(2 * FEW)
    }
    assert answers == {404}
    assert ask(hub, "GET", "/api/models/red/nothing", "203.0.113.1").status_code == 404
