"""Whatever path is asked for, the route that answers is the first of all that match it."""

from __future__ import annotations

import subprocess
import sys
from http.client import HTTPConnection

import pytest
from starlette.routing import Match
from starlette.types import Scope

from adapterhub.hub.app import PrefixRouter, api_routes, page_routes
from tests.hub.conftest import Running

PATHS = (
    "/", "/health", "/api", "/api/models", "/api/models/team/sql", "/api/models/team/sql/tree/main/a/b", "/v2", "/v2/",
    "/v2/team/sql/tags/list", "/v2/team/resolve/tags/list", "/v2/team/resolve/main/README.md", "/team/sql", "/team/sql/",
    "/team/sql/resolve/main/a/b", "/lfs/team/sql/abc", "/api/resolve/main/README.md", "/xet/x/team/sql/v1/shards",
    "/v1/telemetry", "/-/admin", "/oauth/token", "//", "/x//y", "/api//x", "/api/models/",
    "/api/whoami-v2", "/api/repos/create",
)  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", PATHS)
def test_the_routes_of_a_prefix_answer_as_all_would(path: str, method: str) -> None:
    routes = [*api_routes(), *page_routes()]
    scope: Scope = {"type": "http", "method": method, "path": path, "headers": []}

    def first(routes: list[object]) -> list[object]:
        matches = [(match, route) for route in routes if (match := route.matches(scope)[0]) is not Match.NONE]  # type: ignore[attr-defined]
        return [route for match, route in matches if match is Match.FULL][:1] or [route for _, route in matches][:1]

    assert first(list(PrefixRouter(routes).router_for(path).routes)) == first(list(routes))


def test_a_path_that_is_none_is_refused(hub: Running) -> None:
    connection = HTTPConnection(hub.url.removeprefix("http://"))
    connection.putrequest("OPTIONS", "*")
    connection.endheaders()
    assert connection.getresponse().status == 405


def test_a_hub_starts_without_what_only_a_push_or_a_page_needs() -> None:
    code = "import sys, adapterhub.hub.server; print({'numpy', 'ml_dtypes', 'obstore', 'psycopg'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == "set()\n"
