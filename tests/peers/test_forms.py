"""The forms of the hub's pages in a real browser that runs no script; the pages that answer them are accessible, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from adapterhub.hub.administration import namespace_admins
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.people import access_tokens, accounts
from tests.hub.conftest import Running, serving
from tests.support.browser import Browser

pytestmark = pytest.mark.peer
# Signs in with scripts switched off, runs the steps, and says what axe, for which scripts are on again, has against the result.
_WITHOUT_SCRIPTS = """
context = page.context.browser.new_context(java_script_enabled=False)
plain = context.new_page()
plain.set_default_timeout(30_000)
def sign_in(token):
    plain.goto(URL + "/-/sign-in")
    plain.fill("#token", token)
    plain.click("main button")
    plain.wait_for_url(URL + "/")
def wrong():
    page.set_content(plain.content().replace("/-/static/", URL + "/-/static/"))
    return [f"{rule['id']}: {node['html']}" for rule in axe.run(page).response["violations"] for node in rule["nodes"]]
"""
_MANAGE = """
sign_in(TOKEN)
plain.goto(URL + "/-/admin")
plain.fill("#account", "ada")
plain.fill("#namespace", "team")
plain.select_option("#role", "admin")
plain.click("text=Invite >> nth=-1")
result = {"wrong": wrong(), "invitation": plain.text_content("main pre code")}
context.clear_cookies()
sign_in(result["invitation"])
plain.goto(URL + "/-/account")
plain.fill("#name", "laptop")
plain.click("text=Make the token")
result["wrong"] += wrong()
result["token"] = plain.text_content("main pre code")
plain.click("text=I have saved it")
plain.click("[aria-label='Revoke the token " + result["token"][:8] + "']")
result["revoked"] = "laptop" not in plain.text_content("main")
plain.goto(URL + "/-/namespaces/team")
plain.fill("#account", "bob")
plain.select_option("#member-role", "read")
plain.click("text=Add >> nth=0")
plain.select_option("select[aria-label='Role of bob']", "write")
plain.click("[aria-label='Change the role of bob']")
plain.click("[aria-label='Remove ada']")
result["told"] = plain.text_content("main")
plain.go_back()
plain.fill("#gigabytes", "50")
plain.click("text=Ask the admins of the hub")
result["asked"] = plain.text_content("#quota")
"""


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("forms") / "hub") as running:
        yield running


def visit(chromium: Browser, hub: Running, steps: str) -> Any:
    token = hub.make_token("root", "admin")
    return chromium.visit(hub.url, f"URL, TOKEN = {hub.url!r}, {token!r}\n{_WITHOUT_SCRIPTS}{steps}")


def test_people_are_invited_make_tokens_and_manage_their_namespace(chromium: Browser, hub: Running) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        accounts.add(database, "bob")
        result = visit(chromium, hub, _MANAGE)
        assert result["wrong"] == []
        assert access_tokens.identify(database, result["invitation"])
        assert access_tokens.identify(database, result["token"]) is None
        assert result["revoked"]
        assert {member.account: member.role for member in accounts.members(database, "team")} == {
            "ada": "admin",
            "bob": "write",
        }
        assert "is the last admin of team" in result["told"]
        assert "has asked for 50.0 GB" in result["asked"]
        assert [request.account for request in namespace_admins.quota_requests(database)] == ["ada"]
