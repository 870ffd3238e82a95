"""Names in a registry below an address."""

from __future__ import annotations

import json

from adapterhub.remotes.oci.oci_address import OciAddress
from adapterhub.remotes.oci.registry_host import RegistryHost
from tests.conftest import Run
from tests.support.proxy import Exchange, Proxy


def test_a_registry_that_does_not_tell_its_names_is_one_line(run: Run, host: str) -> None:
    with Proxy(host) as server:

        def closed(exchange: Exchange) -> None:
            if "_catalog" in exchange.path:
                exchange.status = 404

        server.before = closed
        run("remote", "add", "team", f"oci://{server.address}")
        assert "does not list its names. Name one" in run("list", "--remote", "team", code=5).stderr


def test_names_come_page_by_page_and_only_below_the_url(host: str) -> None:
    with Proxy() as server:

        def pages(exchange: Exchange) -> None:
            last = exchange.path.rpartition("last=")[2] if "last=" in exchange.path else ""
            names = {"": ["a/x", "a/y"], "a/y": ["b/z"]}[last]
            exchange.status, exchange.data = 200, json.dumps({"repositories": names}).encode()
            if not last:
                exchange.answer = {"link": '</v2/_catalog?n=2&last=a/y>; rel="next"'}

        server.before = pages
        with RegistryHost(OciAddress.parse(f"oci://{server.address}/x"), lambda: None) as registry_host:
            assert registry_host.names() == ["a/x", "a/y", "b/z"]
