"""No text of a request with a NUL reaches a hub's database, which SQLite would keep and PostgreSQL would not.

The requests are those of the routes that the application has, so that a new one is held to the same.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import requests
from starlette.routing import Route

from adapterhub.hub import app, openapi, request_texts
from adapterhub.hub.accounts import accounts
from adapterhub.hub.hub_database import HubDatabase
from adapterhub_converters.errors import UsageError
from tests.attacks.test_hub_forms import FIELDS, FORMS, Visitor
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

NUL = "a\x00b"
PARTS = {"namespace": "red", "repo": "open", "name": "red/open", "revision": "main"}
CALLS = sorted((method.upper(), path) for path, item in openapi.paths().items() for method in item)
WITH_BODY = [(method, path) for method, path in CALLS if method in ("POST", "PUT", "DELETE", "PATCH")]
# Those whose body is bytes, or whose refusal needs no look at it.
OTHERWISE = re.compile(r"^/(v2/.*|xet/.*|lfs/.*|health|ready|metrics)")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("nul") / "hub") as running:
        Tenant(running, "red").create("open")
        yield running


@pytest.fixture(scope="module")
def admin(hub: Running) -> str:
    """A token of an admin of the hub."""
    with closing(HubDatabase(hub.folder)) as database:
        accounts.add(database, "ada")
        accounts.set_member(database, accounts.EVERYWHERE, "ada", "admin")
    return hub.make_token("ada", "admin", kind="personal")


def address(path: str) -> str:
    """The path of a route about red/open."""
    return re.sub(r"\{(\w+)(:\w+)?\}", lambda match: PARTS.get(match[1], "1"), path)


def stored_nuls(hub: Running) -> list[tuple[str, Any]]:
    """The rows with a NUL, or with what PostgreSQL has in the place of one."""
    with closing(HubDatabase(hub.folder)) as database:
        tables = [name for (name,) in database.select("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [(table, row) for table in tables for row in database.select(f"SELECT * FROM {table}")]
    return [(table, row) for table, row in rows if any(isinstance(text, str) and {"\0", "\ufffd"} & {*text} for text in row)]


def fields_of(path: str, method: str) -> dict[str, Any]:
    """The fields of the JSON body that the document describes."""
    content = openapi.paths()[path][method.lower()].get("requestBody", {}).get("content", {})
    return dict(content.get("application/json", {}).get("schema", {}).get("properties", {}))


@pytest.mark.parametrize(("method", "path"), CALLS, ids=str)
def test_an_address_with_a_nul_is_refused(hub: Running, admin: str, method: str, path: str) -> None:
    headers = {"authorization": f"Bearer {admin}"}
    for url in (f"{address(path)}%00", f"{address(path)}?x=%00", f"{address(path)}?%00"):
        assert requests.request(method, hub.url + url, headers=headers, timeout=20, allow_redirects=False).status_code == 400


@pytest.mark.parametrize(("method", "path"), WITH_BODY, ids=str)
def test_no_body_with_a_nul_is_taken(hub: Running, admin: str, method: str, path: str) -> None:
    if OTHERWISE.match(path):
        return
    names = [*fields_of(path, method), "another"]
    documents: list[Any] = [{name: NUL} for name in names] + [{NUL: "x"}, {"x": {"y": [NUL]}}]
    for document in documents:
        answer = requests.request(
            method, hub.url + address(path), headers={"authorization": f"Bearer {admin}"}, json=document, timeout=20
        )
        assert answer.status_code < 500 or answer.status_code == 501, (document, answer.text)
        if path.startswith("/api/adapterhub/v1/") and fields_of(path, method):
            assert (answer.status_code, "NUL" in answer.text) in ((400, True), (404, False)), (document, answer.text)
    assert stored_nuls(hub) == []


@pytest.mark.parametrize("path", FORMS)
def test_no_form_with_a_nul_is_taken(hub: Running, admin: str, path: str) -> None:
    visitor = Visitor.sign_in(hub, admin)
    for field in FIELDS:
        assert visitor.post(path, {"namespace": "red", "csrf": visitor.csrf, field: NUL}) in (400, 404)
    files: dict[str, Any] = {"text": (None, NUL), "file": ("a.txt", b"x")}
    answer = visitor.session.post(hub.url + path, data={"csrf": visitor.csrf}, files=files, timeout=20)
    assert answer.status_code < 500
    assert stored_nuls(hub) == []


def test_there_are_routes_with_bodies() -> None:
    forms = [route for route in app.page_routes() if isinstance(route, Route) and "POST" in (route.methods or ())]
    assert (len(WITH_BODY) > 60, len(forms) > 30) == (True, True)


def test_neither_a_commit_nor_a_login_has_a_nul(hub: Running, admin: str) -> None:
    lines = [{"key": "header", "value": {"summary": NUL}}, {"key": "file", "value": {"path": "a.txt", "content": ""}}]
    body, headers = "\n".join(map(json.dumps, lines)), {"authorization": f"Bearer {admin}"}
    answer = requests.post(f"{hub.url}/api/models/red/open/commit/main", data=body, headers=headers, timeout=20)
    assert (answer.status_code, "NUL" in answer.headers["x-error-message"]) == (400, True)
    basic = base64.b64encode(f"ada:{NUL}".encode()).decode()
    assert requests.get(f"{hub.url}/v2/", headers={"authorization": f"Basic {basic}"}, timeout=20).status_code == 401
    assert stored_nuls(hub) == []


def test_a_backslash_before_u0000_is_no_nul() -> None:
    assert request_texts.parse_object(rb'{"a": "\\u0000"}', "body") == {"a": "\\u0000"}
    for raw in (rb'{"a": "\u0000"}', rb'{"\\\u0000": 1}', rb'{"a": [[{"b": ["\u0000"]}]]}'):
        with pytest.raises(UsageError, match="NUL"):
            request_texts.parse_object(raw, "body")
