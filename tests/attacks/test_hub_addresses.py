"""A signed address of the hub is good for what it was made for: who may upload bytes may not read them by it."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from adapterhub.digest import sha256_bytes
from tests.hub.conftest import Running, hub
from tests.support.hub_tenants import Tenant

__all__ = ["hub"]
SECRET = b"the words of another tenant\n"


@pytest.fixture
def red(hub: Running) -> Tenant:
    """A tenant with a private repository that has SECRET."""
    tenant = Tenant(hub, "red")
    tenant.create("secret", private=True)
    tenant.commit("secret", {"words.txt": SECRET})
    return tenant


@pytest.fixture
def blue(hub: Running) -> Tenant:
    """Another tenant, with a repository of its own."""
    tenant = Tenant(hub, "blue")
    tenant.create("open")
    return tenant


def batch(tenant: Tenant, operation: str, data: bytes) -> Any:
    oid = sha256_bytes(data).removeprefix("sha256:")
    document = {"operation": operation, "objects": [{"oid": oid, "size": len(data)}]}
    return tenant.post("/blue/open.git/info/lfs/objects/batch", json=document).json()["objects"][0]


def test_an_address_for_an_upload_reads_nothing(red: Tenant, blue: Tenant) -> None:
    address = batch(blue, "upload", SECRET)["actions"]["upload"]["href"]
    assert requests.get(address, timeout=10).status_code == 403
    assert requests.head(address, timeout=10).status_code == 403


def test_to_verify_an_upload_does_not_tell_what_others_have(red: Tenant, blue: Tenant) -> None:
    existing, absent = (batch(blue, "upload", data)["actions"]["verify"]["href"] for data in (SECRET, b"nowhere"))
    assert [requests.post(address, json={}, timeout=10).status_code for address in (existing, absent)] == [404, 404]
    requests.put(existing, data=SECRET, timeout=10).raise_for_status()
    assert requests.post(existing, json={}, timeout=10).status_code == 200


def test_an_address_for_a_download_takes_nothing(blue: Tenant) -> None:
    requests.put(batch(blue, "upload", b"mine")["actions"]["upload"]["href"], data=b"mine", timeout=10).raise_for_status()
    address = batch(blue, "download", b"mine")["actions"]["download"]["href"]
    assert requests.get(address, timeout=10).content == b"mine"
    assert requests.put(address, data=b"mine", timeout=10).status_code == 403


def test_who_only_reads_is_not_given_what_was_uploaded_and_is_in_no_version(hub: Running, blue: Tenant) -> None:
    requests.put(batch(blue, "upload", b"draft")["actions"]["upload"]["href"], data=b"draft", timeout=10).raise_for_status()
    assert batch(Tenant(hub, "red"), "download", b"draft")["error"]["code"] == 404
