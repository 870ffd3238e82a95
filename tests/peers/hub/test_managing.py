"""People manage a hub of several processes over PostgreSQL and a bucket as they do one over a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from adapterhub.hub import access_control
from adapterhub.ref import Ref
from tests.hub.adapter_forms.test_adapter_forms import parent_in
from tests.hub.api.test_account_requests import API, Person
from tests.hub.conftest import Running, serving
from tests.hub.web.conftest import Visitor

pytestmark = pytest.mark.peer


@pytest.fixture
def hubs(tmp_path: Path, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, Running]]:
    """Two processes of a hub, as far as they share nothing but a database and a bucket."""
    monkeypatch.setattr(access_control, "_TTL", 0.0)
    with serving(tmp_path / "one", **places) as first, serving(tmp_path / "other", **places) as second:
        yield first, second


def test_what_one_process_is_told_the_other_knows(hubs: tuple[Running, Running]) -> None:
    first, second = hubs
    root, boss = Person(first, "root", everywhere="admin"), Person(first, "boss", team="admin")
    invited = root.send("/accounts", account="ada", roles={"team": "read"}).json()
    ada = Person(second, "eve")
    ada.token = invited["token"]
    assert ada.show("/account")["roles"] == {"team": "read", "ada": "admin"}
    assert boss.put("/namespaces/team/members/ada", role="write").status_code == 200
    assert ada.show("/account")["roles"]["team"] == "write"
    assert boss.delete("/namespaces/team/members/boss").json()["code"] == "last-admin"
    new_token = ada.send("/account/tokens", name="laptop", role="read", days=1).json()
    assert [token["name"] for token in ada.show("/account/tokens")["tokens"]] == ["invitation", "laptop"]
    assert ada.delete(f"/account/tokens/{new_token['id']}").status_code == 200
    assert boss.put("/namespaces/team/quota-request", max_bytes=10**9).status_code == 200
    assert [quota_request["namespace"] for quota_request in root.show("/storage")["quota_requests"]] == ["team"]
    assert root.put("/namespaces/team/quota", max_bytes=10**9).status_code == 200
    assert boss.send("/namespaces/team/webhooks", url="https://hooks.example/x").status_code == 201
    job: Any = {"issuer": "https://gitlab.com", "claims": {"project_path": "org/x"}}
    assert boss.send("/namespaces/team/publishers", **job).status_code == 201
    assert root.put("/accounts/ada/disabled").status_code == 200
    assert ada.get(f"{API}/account").status_code == 401
    assert root.delete("/accounts/ada/disabled").status_code == 200
    assert [row["action"] for row in boss.show("/audit?name=team&limit=2")["events"]] == [
        "api.add_publisher",
        "api.add_webhook",
    ]


def test_a_name_is_taken_down_kept_and_restored(hubs: tuple[Running, Running], adapter: Callable[..., Path]) -> None:
    first, second = hubs
    with first.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
    boss, elsewhere = Person(first, "boss", team="admin"), Person(second, "eve", team="admin")
    for hub in hubs:
        requests.get(f"{hub.url}/team/sql/resolve/main/adapter_model.safetensors", timeout=60).raise_for_status()
        Person(hub, "ann").show("/names/team/sql/downloads")
    assert [count["count"] for count in elsewhere.show("/names/team/sql/downloads")["counts"]] == [2]
    assert boss.put("/names/team/sql/retention", keep=3).json() == {"name": "team/sql", "keep": 3, "ttl": None}
    page = Visitor(second).signed_in(elsewhere.token)
    assert "the 3 newest and tagged versions" in page.get("/-/adapters/team/sql").text
    assert boss.delete("/names/team/sql").status_code == 200
    assert "was removed" in page.get("/-/adapters/team/sql").text
    assert page.post("/-/adapters/team/sql/restore", {"csrf": page.csrf()}).status == 303
    assert boss.get("/team/sql/resolve/main/adapter_config.json").status_code in (200, 302)


def test_a_text_is_edited_and_proposed_at_either_process(hubs: tuple[Running, Running], adapter: Callable[..., Path]) -> None:
    first, second = hubs
    with first.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
    reader, writer = Person(first, "ann", team="read"), Person(second, "boss", team="write")
    at_one, at_other = Visitor(first).signed_in(reader.token), Visitor(second).signed_in(writer.token)
    forms = "/-/adapters/team/sql"
    parent = parent_in(at_one.get(f"{forms}/edit/README.md"))
    fields = {"csrf": at_one.csrf(), "parent": parent, "text": "# Better\r\n"}
    assert at_one.post(f"{forms}/propose-edit/README.md", fields).headers["location"] == "/team/sql/discussions/1"
    assert at_one.post(f"{forms}/edit/README.md", fields).status == 403
    accepted = at_other.post(f"{forms}/accept-proposal", {"csrf": at_other.csrf(), "proposal": "1"})
    assert accepted.status == 303
    late = at_other.post(f"{forms}/edit/README.md", {**fields, "csrf": at_other.csrf(), "text": "# Best"})
    assert (late.status, "# Best" in late.text, "# Better" in late.text) == (409, True, True)
    again = {"csrf": at_other.csrf(), "parent": parent_in(late), "text": "# Best"}
    committed = at_other.post(f"{forms}/edit/README.md", again)
    assert "+# Best" in at_one.get(committed.headers["location"]).text
