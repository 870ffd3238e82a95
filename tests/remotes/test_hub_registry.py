"""A name in a hub of ours: found by its API alone, and a denial has the hub's own reason."""

from __future__ import annotations

from contextlib import closing

import pytest

from adapterhub.http.http_errors import DeniedError
from adapterhub.manifest.oci_manifest import Descriptor
from adapterhub.remotes.hub.hub_client import HubAddress, HubClient
from adapterhub.remotes.hub.hub_registry import HubRegistry
from tests.support.hub_answers import answering

BLOB = Descriptor("application/x", "sha256:" + "a" * 64, 3)


def registry_at(address: HubAddress, below: str = "") -> HubRegistry | None:
    client = HubClient(f"{address.endpoint}{below}", address.name, address.repository)
    with closing(client.wire):
        return HubRegistry.find(address, client)


def test_only_a_hub_with_our_api_at_the_root_of_its_host_has_one() -> None:
    with answering({}) as address:
        registry = registry_at(address)
        assert registry is not None
        with closing(registry):
            assert (registry.name, registry.oci.location) == ("team/sql", address.repository)
        assert registry_at(address, "/below") is None
    with answering({}, status=404, about=None) as address:
        assert registry_at(address) is None


def test_a_denial_to_a_head_is_told_with_the_reason_that_the_hub_gives_elsewhere() -> None:
    denied = {"kind": "denied", "what": "ada may only read team"}
    with answering(denied, status=403) as address:
        registry = registry_at(address)
        assert registry is not None
        with closing(registry), pytest.raises(DeniedError, match="ada may only read team"):
            registry.has_blob(BLOB)
