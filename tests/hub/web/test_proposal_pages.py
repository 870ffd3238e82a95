"""The page of a proposal shows what it changes and its checks, and who may decide has the buttons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.hub.hub_database import HubDatabase
from adapterhub.ref import Ref
from tests.hub.conftest import Running
from tests.hub.sending import Sending, lines_of
from tests.hub.web.conftest import Visitor, person

PAGE = "/team/sql/discussions/1"
FORMS = "/-/adapters/team/sql"


@pytest.fixture
def proposed(hub: Running, adapter: Callable[..., Path]) -> Sending:
    """The account ada, who has proposed a card for team/sql."""
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
    ada = Sending(hub.url, hub.make_token("ada", "read"))
    body = lines_of({"README.md": b"# Better\n"}, summary="Say <b>more</b>")
    assert ada.ask("POST", "/api/models/team/sql/commit/main?create_pr=1", body).status == 200
    return ada


def test_a_page_shows_who_proposes_what_and_has_no_buttons_for_a_stranger(
    proposed: Sending, visitor: Visitor, database: HubDatabase
) -> None:
    page = Sending(proposed.url).ask("GET", PAGE).data.decode()
    for text in ("Say &lt;b&gt;more&lt;/b&gt;", "by ada", "<ins>+# Better</ins>", "the checks of a push", "refs/pr/1"):
        assert text in page
    assert "<form" not in page.partition("<main")[2]
    assert f'href="{PAGE}"' in Sending(proposed.url).ask("GET", "/team/sql/discussions").data.decode()
    assert 'href="/team/sql/discussions"' in Sending(proposed.url).ask("GET", "/team/sql").data.decode()
    reader = person(visitor, database, "eve", team="read")
    assert reader.post(f"{FORMS}/accept-proposal", {"csrf": reader.csrf(), "proposal": "1"}).status == 403
    assert Sending(proposed.url).ask("GET", "/team/sql/discussions/2").status == 404


def test_a_maintainer_accepts_a_proposal_by_a_form(proposed: Sending, visitor: Visitor, database: HubDatabase) -> None:
    writer = person(visitor, database, "bob", team="write")
    fields = {"csrf": writer.csrf(), "proposal": "1", "commit": "0" * 40}
    assert writer.post(f"{FORMS}/accept-proposal", fields).status == 400
    assert writer.post(f"{FORMS}/accept-proposal", {**fields, "csrf": ""}).status == 403
    assert writer.post(f"{FORMS}/accept-proposal", fields, Origin="https://evil.example").status == 403
    answer = writer.post(f"{FORMS}/accept-proposal", {**fields, "commit": ""})
    assert (answer.status, answer.headers["location"]) == (303, PAGE)
    assert "Accepted by bob" in Sending(proposed.url).ask("GET", PAGE).data.decode()
    assert Sending(proposed.url).ask("GET", "/team/sql/resolve/v2/README.md").data == b"# Better\n"


def test_a_maintainer_refuses_a_proposal_only_with_a_reason(proposed: Sending, visitor: Visitor, database: HubDatabase) -> None:
    writer = person(visitor, database, "bob", team="write")
    fields = {"csrf": writer.csrf(), "proposal": "1"}
    assert writer.post(f"{FORMS}/refuse-proposal", {**fields, "message": " "}).status == 400
    assert writer.post(f"{FORMS}/refuse-proposal", {**fields, "message": "no need"}).status == 303
    assert "Refused by bob" in Sending(proposed.url).ask("GET", PAGE).data.decode()
    assert writer.post(f"{FORMS}/withdraw-proposal", fields).status == 400
