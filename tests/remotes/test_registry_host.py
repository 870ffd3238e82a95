"""Names in a registry below an address."""

from __future__ import annotations

import json

from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.registry_host import RegistryHost
from tests.conftest import Run
from tests.support.proxy import Exchange, Proxy


def test_a_registry_that_does_not_tell_its_names_is_one_line(run: Run, host: str) -> None:
    with Proxy(host) as server:

        def closed(found: Exchange) -> None:
            if "_catalog" in found.path:
                found.status = 404

        server.before = closed
        run("remote", "add", "team", f"oci://{server.address}")
        assert "does not list its names. Name one" in run("list", "--remote", "team", code=5).stderr


def test_names_come_page_by_page_and_only_below_the_url(host: str) -> None:
    with Proxy() as server:

        def pages(found: Exchange) -> None:
            last = found.path.rpartition("last=")[2] if "last=" in found.path else ""
            names = {"": ["a/x", "a/y"], "a/y": ["b/z"]}[last]
            found.status, found.data = 200, json.dumps({"repositories": names}).encode()
            if not last:
                found.answer = {"link": '</v2/_catalog?n=2&last=a/y>; rel="next"'}

        server.before = pages
        with RegistryHost(OciAddress.parse(f"oci://{server.address}/x"), lambda: None) as found:
            assert found.names() == ["a/x", "a/y", "b/z"]
