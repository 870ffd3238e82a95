"""Nobody gets more by the way in which they log in: a login has the roles of its account, and ends with it."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import requests

from adapterhub.hub.accounts import access_tokens, accounts, device_logins
from adapterhub.hub.accounts.accounts import EVERYWHERE
from adapterhub.hub.storage.from_settings import open_database
from tests.hub.conftest import Running, hub

__all__ = ["hub"]
GRANT = "urn:ietf:params:oauth:grant-type:device_code"


@pytest.fixture
def database(hub: Running) -> Any:
    with closing(open_database(hub.settings)) as opened:
        yield opened


def begin(hub: Running) -> Any:
    return requests.post(f"{hub.url}/oauth/device", data={"client_id": "x"}, timeout=10).json()


def collect(hub: Running, login: Any) -> requests.Response:
    data = {"grant_type": GRANT, "device_code": login["device_code"]}
    return requests.post(f"{hub.url}/oauth/token", data=data, timeout=10)


@pytest.mark.parametrize(("role", "status"), [(None, 403), ("write", 403), ("admin", 200)])
def test_a_login_of_an_account_manages_the_hub_only_if_the_account_does(
    hub: Running, database: Any, role: str | None, status: int
) -> None:
    accounts.add(database, "dave")
    if role:
        accounts.set_member(database, EVERYWHERE, "dave", role)
    login = begin(hub)
    device_logins.approve_as(database, login["user_code"], "dave")
    headers = {"authorization": f"Bearer {collect(hub, login).json()['access_token']}"}
    assert requests.get(f"{hub.url}/-/admin", headers=headers, timeout=10).status_code == status


def test_an_admin_of_one_namespace_does_not_manage_the_hub(hub: Running) -> None:
    headers = {"authorization": f"Bearer {hub.make_token('erin', 'admin', namespaces=('team',))}"}
    assert requests.get(f"{hub.url}/-/admin", headers=headers, timeout=10).status_code == 403


def test_a_login_that_was_approved_gives_nothing_once_its_account_is_removed(hub: Running, database: Any) -> None:
    accounts.add(database, "dave")
    login = begin(hub)
    device_logins.approve_as(database, login["user_code"], "dave")
    accounts.remove(database, "dave")
    answer = collect(hub, login)
    assert answer.status_code == 404 or answer.json()["error"] == "access_denied"
    assert not access_tokens.list_tokens(database) or {token.account for token in access_tokens.list_tokens(database)} == {
        "alice"
    }


def test_a_token_of_a_service_that_expires_approves_nothing_that_outlives_it(hub: Running) -> None:
    login = begin(hub)
    data = {"code": login["user_code"], "token": hub.make_token("ci", "write", lifetime=3600.0), "answer": "approve"}
    assert "expires" in requests.post(f"{hub.url}/device", data=data, timeout=10).text
    assert collect(hub, login).json()["error"] == "authorization_pending"
