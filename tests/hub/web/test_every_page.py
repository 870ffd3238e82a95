"""Every page is rendered for whoever may see all of it, with every link to what they may change."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.routing import Route

from adapterhub.hub.app import page_routes
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.ref import Ref
from adapterhub.registry.releases import release_moves
from tests.hub.conftest import Running
from tests.hub.sending import Sending

PARTS = {"namespace": "team", "repo": "sql", "revision": "v1", "number": "1", "path": "README.md"}


def paths() -> Iterator[str]:
    """The path of every page about an adapter, a namespace or the hub, of an adapter also if it has no version yet."""
    for route in page_routes():
        if isinstance(route, Route) and "GET" in (route.methods or ()) and "static" not in route.path:
            for repo in ("sql", "new"):
                path = route.path.replace(":path}", "}")
                for key, value in {**PARTS, "repo": repo}.items():
                    path = path.replace(f"{{{key}}}", value)
                yield path


@pytest.mark.parametrize("role", ["read", "admin", ""])
def test_no_page_fails_for_anybody(role: str, hub: Running, adapter: Callable[..., Path]) -> None:
    with hub.registry() as registry:
        for seed in (1, 2):
            registry.push(adapter(seed), Ref("team/sql"))
        release_moves.withdraw(registry.ledger, Ref("team/sql", number=1), ReleaseStatement("a leaked key"))
    assert Sending(hub.url, hub.token).ask("POST", "/api/repos/create", {"name": "team/new"}).status == 200
    headers = {"authorization": f"Bearer {hub.make_token('root', role)}"} if role else {}
    statuses = {}
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=30)
    for path in dict.fromkeys(paths()):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        response.read()
        statuses[path] = response.status
    connection.close()
    assert {path: status for path, status in statuses.items() if status >= 500} == {}
    assert sum(status == 200 for status in statuses.values()) > 10


def test_no_page_shows_what_is_in_a_withdrawn_version(hub: Running, adapter: Callable[..., Path]) -> None:
    with hub.registry() as registry:
        for seed in (1, 2):
            registry.push(adapter(seed), Ref("team/sql"))
        release_moves.withdraw(registry.ledger, Ref("team/sql", number=1), ReleaseStatement("a leaked key"))
    about_versions = {path for path in paths() if path.startswith("/team/sql/v1")} | {"/team/sql/compare?from=v1&to=v2"}
    about_versions -= {"/team/sql/v1/lineage"}  # it tells what was made from it, which has to be found
    assert len(about_versions) > 4
    for path in about_versions:
        answer = Sending(hub.url, hub.token).ask("GET", path)
        assert (answer.status, "v1 was withdrawn: a leaked key" in answer.data.decode()) == (410, True), path
    assert 'title="a leaked key">withdrawn' in Sending(hub.url, "").ask("GET", "/team/sql/versions").data.decode()
