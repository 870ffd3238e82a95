"""A stranger does not drown the rows of the audit log, which is never cut, in rows about itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

from adapterhub.hub import middleware
from adapterhub.hub.accounts import audit_log
from adapterhub.hub.hub_database import HubDatabase
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

REFUSED = f"/lfs/a/b/{'0' * 64}?signature=1"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path / "hub", behind_proxy=True) as running:
        yield running


def rows(hub: Running) -> int:
    with closing(HubDatabase(hub.folder)) as database:
        return len(audit_log.events(database, limit=1000))


def test_refusals_of_a_network_and_of_all_strangers_are_a_few_rows_a_minute(
    hub: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 requests without a token were 300 rows of up to 1.5 kB."""
    for number in range(40):
        headers = {"x-forwarded-for": f"2001:db8:0:1::{number:x}"}
        assert requests.put(f"{hub.url}{REFUSED}", headers=headers, timeout=20).status_code == 403
    assert rows(hub) == middleware.STRANGER_ROWS
    for number in range(100):
        headers = {"x-forwarded-for": f"203.0.113.{number}"}
        requests.put(f"{hub.url}{REFUSED}", headers=headers, timeout=20)
    assert rows(hub) == middleware.ALL_STRANGER_ROWS


def test_an_account_does_not_push_rows_out_by_refusals_or_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 refusals, of a millisecond each, left nothing of what an account had done before."""
    for name in ("ACCOUNT_REFUSALS", "ACCOUNT_CHANGES"):
        monkeypatch.setattr(middleware, name, 5)
    with serving(tmp_path / "hub") as hub:
        red, blue = Tenant(hub, "red", "admin"), Tenant(hub, "blue", "admin")
        before = rows(hub)
        statuses = [blue.post("/v2/red/open/blobs/uploads/").status_code for _ in range(20)]
        assert {*statuses} == {403}
        assert rows(hub) == before + 5
        options = {"name": "x", "role": "read"}
        made = [blue.post("/api/adapterhub/v1/account/tokens", json=options) for _ in range(8)]
        assert [answer.status_code for answer in made] == [201] * 5 + [429] * 3
        assert 1 <= int(made[-1].headers["retry-after"]) <= 60
        assert rows(hub) == before + 10
        assert blue.get("/api/models").status_code == 200
        assert red.post("/api/adapterhub/v1/account/tokens", json=options).status_code == 201


def test_each_refusal_of_an_account_is_a_row(hub: Running) -> None:
    red, blue = Tenant(hub, "red"), Tenant(hub, "blue")
    blue.create("open")
    before = rows(hub)
    for _ in range(middleware.STRANGER_ROWS + 5):
        assert red.send("../blue/open", b"").status_code in (403, 404)
        assert red.post("/v2/blue/open/blobs/uploads/").status_code == 403
    assert rows(hub) >= before + middleware.STRANGER_ROWS + 5


@pytest.mark.parametrize("kind", ["namespaces/team/deploy-keys", "account/tokens"])
def test_the_log_tells_who_made_the_token_that_a_row_is_by(hub: Running, kind: str) -> None:
    """The row of its maker had the number of a key, and the rows of the key had its first characters."""
    team = Tenant(hub, "team", "admin")
    made = team.post(f"/api/adapterhub/v1/{kind}", json={"name": "ci", "role": "write"}).json()
    key = Tenant(hub, "team")
    key.token = made["token"]
    key.create("open")
    with closing(HubDatabase(hub.folder)) as database:
        use, making = audit_log.events(database, limit=2)
    assert (use.action, use.token) == ("hf.create", key.token[:8])
    assert f"token={made['id']} prefix={use.token} name=ci" in making.detail
    assert (making.account, making.token) == ("team", team.token[:8])
