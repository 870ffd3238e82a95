"""No form of a hub's pages is accepted from another site or session, or in another way than it is sent; none ends in a failure.

The forms are the routes that the application has, so that a new one is held to the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import pytest
import requests
from starlette.routing import Route

from adapterhub.hub import app
from adapterhub.hub.accounts import accounts
from adapterhub.hub.hub_database import HubDatabase
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

SIGN_IN = "/-/sign-in"
# A form without a session, or that ends the one that sends it.
PUBLIC = {SIGN_IN, "/device"}
# What everybody who is signed in may do with a name of others that they see.
OF_READERS = {"/-/adapters/red/open/star", "/-/adapters/red/open/ask-access"}
FORMS = sorted(
    {
        route.path.replace("{namespace}", "red").replace("{repo}", "open").replace("{path:path}", "README.md")
        for route in app.page_routes()
        if isinstance(route, Route) and "POST" in (route.methods or ())
    }
)
FIELDS = (
    "name", "account", "token", "webhook", "publisher", "url", "scope", "issuer", "claims", "days", "files", "gigabytes",
    "reason", "readers", "tag", "version", "reference", "message",
)  # fmt: skip
HOSTILE = {
    "a huge number": "9" * 18, "a number below": "-1", "no number": "1e400", "a fraction": "0." + "0" * 300 + "1",
    "controls": "a\x00b\x1b[2J\r\nX: 1", "half a character": "%ed%a0%80", "a path": "../../etc/passwd", "markup": "<script>",
    "another's name": "blue/secret", "a long one": "x" * 6000, "right to left": "\u202egpj", "other digits": "\u0661\u0662",
}  # fmt: skip


@dataclass
class Visitor:
    """Somebody who is signed in, with the CSRF token of the session."""

    hub: Running
    session: requests.Session
    csrf: str

    @classmethod
    def sign_in(cls, hub: Running, token: str) -> Visitor:
        session = requests.Session()
        answer = session.post(hub.url + SIGN_IN, data={"token": token, "next": "/-/account"}, timeout=20)
        match = re.search(r'name="csrf" value="([^"]+)"', answer.text)
        assert match
        return cls(hub, session, match[1])

    def post(self, path: str, fields: dict[str, str], **headers: str) -> int:
        answer = self.session.post(self.hub.url + path, data=fields, headers=headers, timeout=20, allow_redirects=False)
        return answer.status_code


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("forms") / "hub") as running:
        Tenant(running, "red").create("open")
        yield running


@pytest.fixture(scope="module")
def admin(hub: Running) -> Visitor:
    with closing(HubDatabase(hub.folder)) as database:
        accounts.add(database, "ada")
        accounts.set_member(database, accounts.EVERYWHERE, "ada", "admin")
    return Visitor.sign_in(hub, hub.make_token("ada", "admin", kind="personal"))


@pytest.fixture(scope="module")
def other_visitor(hub: Running) -> Visitor:
    return Visitor.sign_in(hub, hub.make_token("blue", "write", namespaces=("blue",)))


def rows(hub: Running) -> dict[str, list[object]]:
    """All tables but those of sessions and refusals."""
    with closing(HubDatabase(hub.folder)) as database:
        names = [name for (name,) in database.select("SELECT name FROM sqlite_master WHERE type = 'table'")]
        left_out = {"audit", "tokens", "sessions", "sqlite_sequence"}
        return {name: database.select(f"SELECT * FROM {name}") for name in names if name not in left_out}


def test_there_are_forms() -> None:
    assert len(FORMS) > 30


@pytest.mark.parametrize("path", sorted({*FORMS} - PUBLIC))
def test_a_form_of_another_site_session_or_method_changes_nothing(
    hub: Running, admin: Visitor, other_visitor: Visitor, path: str
) -> None:
    before, fields = rows(hub), {"namespace": "red", "name": "x", "role": "read", "account": "blue"}
    for csrf in ("", other_visitor.csrf, admin.csrf[:-1], f"{admin.csrf}\x00", "\udcff"):
        assert admin.post(path, {**fields, "csrf": csrf.encode("utf-8", "replace").decode()}) in (400, 403, 404)
    for origin in ("https://evil.example", "null", f"{hub.url}.evil.example", f"https://x@{hub.url[7:]}.evil"):
        assert admin.post(path, {**fields, "csrf": admin.csrf}, origin=origin) in (403, 404)
    assert admin.post(f"{path}?csrf={admin.csrf}", fields) in (400, 403, 404)
    for method in ("PUT", "PATCH", "DELETE"):
        assert admin.session.request(method, hub.url + path, data={"csrf": admin.csrf}, timeout=20).status_code in (404, 405)
    assert requests.post(hub.url + path, data=fields, timeout=20, allow_redirects=False).status_code in (303, 401, 403, 404)
    assert rows(hub) == before


@pytest.mark.parametrize("path", FORMS)
def test_no_value_of_a_form_ends_in_a_failure(hub: Running, admin: Visitor, path: str) -> None:
    if path == "/-/sign-out":
        return
    for value in HOSTILE.values():
        fields = {**dict.fromkeys(FIELDS, value), "namespace": "red"}
        assert admin.post(path, {**fields, "csrf": admin.csrf}) < 500
    assert admin.post(path, {"csrf": admin.csrf, "x": "y" * (64 << 20 if "upload" in path else 1 << 20)}) in (
        400,
        403,
        404,
        413,
    )
    assert admin.post(path, {f"f{number}": "x" for number in range(400)}) < 500


@pytest.mark.parametrize("path", sorted({*FORMS} - PUBLIC - OF_READERS - {"/-/sign-out"}))
def test_a_form_about_what_is_anothers_is_refused(hub: Running, other_visitor: Visitor, path: str) -> None:
    before = rows(hub)
    fields = {"namespace": "red", "account": "blue", "role": "admin", "readers": "members", "csrf": other_visitor.csrf}
    status = other_visitor.post(path, fields)
    assert status in (400, 403, 404), status
    assert rows(hub) == before
