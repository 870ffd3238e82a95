"""Pages of other sites read what programs read, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import urllib3

from adapterhub.hub.app import api_routes
from adapterhub.hub.cross_origin import readable_methods
from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving

SITE, ALLOWED = "https://site.example", "access-control-allow-origin"
READABLE = ("/api/models", "/api/models/team/sql", "/team/sql/resolve/main/README.md", "/team/sql/raw/main/README.md")


@pytest.fixture
def public(tmp_path: Path, adapter: Callable[..., Path]) -> Iterator[Running]:
    """A hub that others can reach, as it knows its address."""
    with serving(tmp_path / "hub", url="https://hub.example") as running:
        with running.registry() as registry:
            registry.push(adapter(1), Ref("team/sql"))
        yield running


def ask(hub: Running, method: str, path: str, origin: str, **headers: str) -> urllib3.BaseHTTPResponse:
    headers = {name.replace("_", "-"): value for name, value in {**headers, "origin": origin}.items()}
    return urllib3.request(method, hub.url + path, headers=headers, redirect=False, retries=False)


@pytest.mark.parametrize("path", READABLE)
def test_a_page_of_another_site_reads(public: Running, path: str) -> None:
    for method in ("GET", "HEAD"):
        answer = ask(public, method, path, SITE, authorization=f"Bearer {public.token}")
        assert (answer.status, answer.headers[ALLOWED]) == (200, "*")
        assert "X-Error-Message" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    preflight_headers = {"access_control_request_method": "GET", "access_control_request_headers": "authorization,range"}
    preflight = ask(public, "OPTIONS", path, SITE, **preflight_headers)
    assert (preflight.status, preflight.headers["access-control-allow-methods"]) == (204, "GET, HEAD")
    assert preflight.headers["access-control-allow-headers"] == "authorization,range"


def test_a_refusal_can_be_read_too(public: Running) -> None:
    answer = ask(public, "GET", "/api/models?sort=trending", SITE)
    assert (answer.status, answer.headers[ALLOWED]) == (400, "*")


PAGES = [("GET", "/"), ("GET", "/team/sql"), ("POST", "/oauth/token"), ("POST", "/-/sign-out")]


@pytest.mark.parametrize(("method", "path"), [*PAGES, ("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete")])
def test_pages_and_changes_are_for_the_hub_s_own_site(public: Running, method: str, path: str) -> None:
    assert ALLOWED not in ask(public, method, path, SITE).headers
    preflight = ask(public, "OPTIONS", path, SITE, access_control_request_method=method)
    assert preflight.headers.get("access-control-allow-methods") == (None if (method, path) in PAGES else "GET, HEAD")


def test_only_what_reads_is_named_for_any_route() -> None:
    """A method besides GET and HEAD is readable for one address only, whose body says which files are asked about."""
    other_routes = {
        (route.path, method)  # type: ignore[attr-defined]
        for route in api_routes()
        for method in readable_methods(route.path)  # type: ignore[attr-defined]
        if method not in ("GET", "HEAD") and method in route.methods  # type: ignore[attr-defined]
    }
    assert other_routes == {
        (f"/api/models/{name}/paths-info/{{revision}}", "POST") for name in ("{namespace}/{repo}", "{repo}")
    }


def test_a_hub_of_this_machine_is_read_by_pages_of_this_machine_only(hub: Running) -> None:
    """Any site could read it otherwise, through the browser of whoever visits it."""
    for origin, allowed in (
        (SITE, None),
        ("null", None),
        ("http://[", None),
        ("http://localhost:3000", "http://localhost:3000"),
    ):
        assert ask(hub, "GET", "/api/models", origin).headers.get(ALLOWED) == allowed
