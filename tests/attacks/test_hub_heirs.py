"""What a token made ends with it, and with its account: logins, addresses for uploads, and tokens for Xet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

from adapterhub.hub import access_control
from adapterhub.hub.accounts import access_tokens, accounts, device_logins
from adapterhub.hub.hub_database import HubDatabase
from tests.hub.conftest import Running, serving
from tests.hub.xet.test_receiving import Sender, chunk
from tests.support.hub_tenants import Tenant

XORB = "ab" * 32


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A hub that looks each token up anew; others do so after five seconds."""
    monkeypatch.setattr(access_control, "_TTL", 0.0)
    with serving(tmp_path / "hub") as running:
        yield running


def revoke(database: HubDatabase, token: str) -> None:
    identity = access_tokens.identify(database, token)
    assert identity
    access_tokens.revoke(database, identity.token)


def remove(database: HubDatabase, token: str) -> None:
    identity = access_tokens.identify(database, token)
    assert identity
    accounts.remove(database, identity.account)


def logged_in(database: HubDatabase, token: str) -> device_logins.TokenGrant:
    """A login that the owner of a token approves."""
    device, code = device_logins.begin(database, "127.0.0.1")
    identity = access_tokens.identify(database, token)
    assert identity
    device_logins.approve(database, code, identity)
    return device_logins.collect(database, device)


def status(hub: Running, token: str) -> int:
    headers = {"authorization": f"Bearer {token}"}
    return requests.get(f"{hub.url}/api/whoami-v2", headers=headers, timeout=20).status_code


@pytest.mark.parametrize("end", [revoke, remove])
def test_a_login_ends_with_the_token_that_approved_it(hub: Running, end: Callable[[HubDatabase, str], None]) -> None:
    parent_token = hub.make_token("carol", "write", kind=access_tokens.PERSONAL)
    with closing(HubDatabase(hub.folder)) as database:
        first = logged_in(database, parent_token)
        second = logged_in(database, first.token)
        renewed = device_logins.renew(database, first.refresh)
        tokens = (renewed.token, second.token)
        assert [status(hub, token) for token in tokens] == [200, 200]
        end(database, parent_token)
        assert [status(hub, token) for token in tokens] == [401, 401]
        for grant in (renewed, second):
            with pytest.raises(device_logins.DeviceError):
                device_logins.renew(database, grant.refresh)


@pytest.mark.parametrize("end", [revoke, remove])
def test_addresses_end_with_the_token_that_asked_for_them(hub: Running, end: Callable[[HubDatabase, str], None]) -> None:
    red, data = Tenant(hub, "red"), b"x" * 100
    red.create("open")
    batch = {"operation": "upload", "objects": [{"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}]}
    href = red.post("/red/open.git/info/lfs/objects/batch", json=batch).json()["objects"][0]["actions"]["upload"]["href"]
    sender = Sender(hub, "red/open", red.token)
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(data))[0] == 200
    with closing(HubDatabase(hub.folder)) as database:
        end(database, red.token)
    assert requests.put(href, data=data, timeout=20).status_code == 403
    assert sender.post(f"/v1/xorbs/default/{XORB}", chunk(data))[0] == 401
