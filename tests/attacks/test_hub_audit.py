"""A stranger does not drown the rows of the audit log, which is never cut, in rows about itself."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import requests

from adapterhub.hub import middleware, request_context
from adapterhub.hub.accounts import audit_log, device_logins
from adapterhub.hub.hub_database import HubDatabase
from tests.attacks.test_hub_bodies import ROUTES, bodies_of
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

# What waits for the lock of hub.db for a stranger, each bounded in number: rows of the log, logins that begin, and checks.
BOUNDED = {"audit_log.record", "device_logins.begin", "health._database"}
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


def ask_every_route(hub: Running, headers: dict[str, str]) -> None:
    """Send each route that may change something a body of each kind that one takes."""
    grant, kinds = "urn:ietf:params:oauth:grant-type:device_code", ("application/json", "application/x-www-form-urlencoded")
    forms = (
        {"grant_type": grant, "device_code": "x"},
        {"grant_type": "refresh_token", "refresh_token": "x"},
        {"code": "BCDFGHJK"},
    )
    bodies = [("", ""), (kinds[0], "{}"), *((kinds[1], urlencode(form)) for form in forms)]
    for method, path in bodies_of(ROUTES):
        for kind, body in bodies:
            sent = {**headers, **({"content-type": kind} if kind else {})}
            requests.request(method, hub.url + path, data=body, headers=sent, timeout=20, allow_redirects=False)


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": f"Bearer hf_{'x' * 40}"}, {"cookie": "adapterhub_session=x"}],
    ids=["none", "token", "session"],
)
def test_what_a_stranger_asks_for_is_no_change_and_no_wait_for_the_lock(
    hub: Running, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    """A form without a session was a row that told of the change which it was refused, as many as one liked."""
    Tenant(hub, "red").create("open")
    monkeypatch.setattr(middleware, "REFUSALS", 1_000_000)
    locked_by: set[str] = set()
    transaction = HubDatabase.transaction

    def watched(database: HubDatabase) -> Any:
        frames = [frame for frame in traceback.extract_stack() if "/adapterhub/hub/" in frame.filename]
        if request_context.current().address:
            locked_by.update(f"{Path(frame.filename).stem}.{frame.name}" for frame in frames[-1:])
        return transaction(database)

    monkeypatch.setattr(HubDatabase, "transaction", watched)
    before = rows(hub)
    ask_every_route(hub, headers)
    assert locked_by <= BOUNDED
    with closing(HubDatabase(hub.folder)) as database:
        events = audit_log.events(database, limit=1000)
    assert {event.action for event in events if not event.account} <= {"refused"}
    assert len(events) <= before + middleware.STRANGER_ROWS


def test_a_form_that_leads_to_the_page_to_sign_in_at_is_a_refusal(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "REFUSALS", 20)
    with serving(hub.folder.with_name("other")) as other_hub:
        statuses = [
            requests.post(f"{other_hub.url}/-/account/token", timeout=20, allow_redirects=False).status_code for _ in range(25)
        ]
    assert statuses == [303] * 20 + [429] * 5


def test_nobody_fills_the_room_for_logins_that_wait(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 logins, 30 of a network in five minutes, left no room for anybody else's for a quarter of an hour."""
    monkeypatch.setattr(device_logins, "_MAX_PENDING", 20)

    def begin(address: str) -> str:
        answer = requests.post(f"{hub.url}/oauth/device", headers={"x-forwarded-for": address}, timeout=20)
        assert answer.ok
        return str(answer.json()["device_code"])

    def state(device: str) -> str:
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:device_code", "device_code": device}
        return str(requests.post(f"{hub.url}/oauth/token", data=form, timeout=20).json()["error"])

    ada = begin("203.0.113.7")
    for number in range(50):
        begin(f"2001:db8:1:{number:x}::1")
    assert state(begin("198.51.100.7")) == state(ada) == "authorization_pending"
    with closing(HubDatabase(hub.folder)) as database:
        assert database.select("SELECT count(*) FROM devices") == [(20,)]


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
        answers = [blue.post("/api/adapterhub/v1/account/tokens", json=options) for _ in range(8)]
        assert [answer.status_code for answer in answers] == [201] * 5 + [429] * 3
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
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
    new_token = team.post(f"/api/adapterhub/v1/{kind}", json={"name": "ci", "role": "write"}).json()
    key = Tenant(hub, "team")
    key.token = new_token["token"]
    key.create("open")
    with closing(HubDatabase(hub.folder)) as database:
        use, making = audit_log.events(database, limit=2)
    assert (use.action, use.token) == ("hf.create", key.token[:8])
    assert f"token={new_token['id']} prefix={use.token} name=ci" in making.detail
    assert (making.account, making.token) == ("team", team.token[:8])
