"""The forms of the hub's pages in a real browser that runs no script; the pages that answer them are accessible, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.accounts import access_tokens, accounts
from adapterhub.hub.administration import namespace_admins
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving
from tests.support.adapters import write_adapter
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


_CHANGE = """
sign_in(TOKEN)
plain.goto(URL + "/team/sql")
plain.click("text=Settings")
result = {"wrong": wrong()}
plain.fill("#tag", "prod")
plain.select_option("[aria-label='Version of the new tag']", "v1")
plain.click("text=Add >> nth=0")
plain.fill("#message", "too old")
plain.click("#deprecation >> text=Deprecate >> nth=-1")
plain.click("text=Edit the card")
result["wrong"] += wrong()
plain.fill("#text", "# New card\\n")
plain.fill("#title", "Say it anew")
plain.click("text=Commit to main")
result["wrong"] += wrong()
result["commit"] = plain.text_content("main")
plain.click("text=Commits")
result["wrong"] += wrong()
plain.goto(URL + "/-/adapters/team/sql")
plain.set_input_files("#file", FILES)
plain.click("text=Upload")
result["wrong"] += wrong()
result["uploaded"] = plain.text_content("main")
plain.goto(URL + "/-/adapters/team/sql")
plain.fill("#confirm", "team/sql")
plain.click("#removal >> button")
result["wrong"] += wrong()
plain.click("text=Restore it")
result["restored"] = plain.text_content("h1")
"""


def test_an_adapter_is_changed_removed_and_restored_on_its_page(chromium: Browser, hub: Running, tmp_path: Path) -> None:
    with hub.registry() as registry:
        registry.push(write_adapter(tmp_path / "first", 1), Ref("team/sql"))
    files = [str(path) for path in write_adapter(tmp_path / "second", 2).iterdir()]
    result = visit(chromium, hub, f"FILES = {files!r}\n{_CHANGE}")
    assert result["wrong"] == []
    assert "+# New card" in result["commit"]
    assert "team/sql:v3" in result["uploaded"]
    assert result["restored"] == "Settings"
    with hub.registry() as registry:
        assert [entry.op for entry in registry.log(Ref("team/sql"))] == [
            *("restore", "delete", "push", "push", "deprecate", "tag", "push")
        ]


_PROPOSE = """
sign_in(TOKEN)
plain.goto(URL + "/team/sql")
plain.click("text=Propose a version")
result = {"wrong": wrong()}
plain.set_input_files("#file", FILES)
plain.fill("#title", "Trained on more")
plain.click("#propose button")
result["wrong"] += wrong()
plain.click("text=The proposal")
result["wrong"] += wrong()
result["proposal"] = plain.text_content("main")
context.clear_cookies()
sign_in(WRITER)
plain.goto(URL + "/team/sql/discussions/1")
plain.click("text=Accept")
result["wrong"] += wrong()
"""


def test_a_reader_proposes_a_version_on_the_page_and_a_writer_accepts_it(
    chromium: Browser, hub: Running, tmp_path: Path
) -> None:
    with hub.registry() as registry:
        registry.push(write_adapter(tmp_path / "first", 1), Ref("team/sql"))
    files = [str(path) for path in write_adapter(tmp_path / "second", 2).iterdir()]
    reader, writer = hub.make_token("ada", "read"), hub.make_token("bob", "write")
    steps = f"URL, TOKEN, WRITER, FILES = {hub.url!r}, {reader!r}, {writer!r}, {files!r}\n{_WITHOUT_SCRIPTS}{_PROPOSE}"
    result = chromium.visit(hub.url, steps)
    assert result["wrong"] == []
    assert "Trained on more" in result["proposal"]
    with hub.registry() as registry:
        assert registry.row(Ref("team/sql")).number == 2


_EDIT = """
sign_in(TOKEN)
plain.goto(URL + "/team/sql")
plain.click("text=Propose a change of the card")
result = {"wrong": wrong()}
plain.fill("#text", "# Better\\n\\nWrites SQL.\\n")
plain.fill("#title", "Say what it does")
plain.click("text=Propose >> nth=-1")
result["wrong"] += wrong()
result["proposal"] = plain.text_content("main")
context.clear_cookies()
sign_in(WRITER)
plain.goto(URL + "/team/sql/blob/main/README.md")
plain.click("text=Edit the file")
result["wrong"] += wrong()
context.request.post(URL + "/-/adapters/team/sql/accept-proposal", form={
    "csrf": plain.get_attribute("[name=csrf] >> nth=-1", "value"), "proposal": "1"}, headers={"origin": URL})
plain.fill("#text", "# Best\\n")
plain.click("text=Commit to main")
result["wrong"] += wrong()
result["late"] = plain.text_content("#wrong") + plain.input_value("#text") + plain.input_value("#newer")
plain.click("text=Commit to main")
result["commit"] = plain.text_content("main")
"""


def test_a_reader_proposes_a_change_of_the_card_and_a_writer_commits_another(
    chromium: Browser, hub: Running, tmp_path: Path
) -> None:
    with hub.registry() as registry:
        registry.push(write_adapter(tmp_path / "first", 1), Ref("team/sql"))
    reader, writer = hub.make_token("ada", "read"), hub.make_token("bob", "write")
    steps = f"URL, TOKEN, WRITER = {hub.url!r}, {reader!r}, {writer!r}\n{_WITHOUT_SCRIPTS}{_EDIT}"
    result = chromium.visit(hub.url, steps)
    assert result["wrong"] == []
    assert [text in result["proposal"] for text in ("Say what it does", "by ada", "+# Better")] == [True] * 3
    assert [text in result["late"] for text in ("has committed meanwhile", "# Best", "Writes SQL.")] == [True] * 3
    assert [text in result["commit"] for text in ("-# Better", "+# Best")] == [True] * 2
