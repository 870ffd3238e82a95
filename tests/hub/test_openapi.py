"""The OpenAPI document: it has what the hub answers, no more and no less."""

from __future__ import annotations

import re
from typing import Any

import urllib3

from adapterhub.hub import openapi
from adapterhub.hub.app import api_routes
from tests.hub.conftest import Running


def test_the_document_has_every_route_and_no_other() -> None:
    answered = {pair for route in api_routes() for pair in openapi.route_operations(route)}
    assert {(path, method) for path, item in openapi.paths().items() for method in item} == answered


def test_everything_in_it_is_described(hub: Running) -> None:
    answer = urllib3.request("GET", f"{hub.url}/api/openapi.json")
    document: dict[str, Any] = answer.json()
    assert (answer.status, document["openapi"], document["servers"]) == (200, "3.1.0", [{"url": hub.url}])
    for path, item in document["paths"].items():
        for method, operation in item.items():
            named = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"]
            assert named == re.findall(r"\{(\w+)\}", path), (method, path)
            assert operation["summary"], (method, path)
            assert all(response["description"] for response in operation["responses"].values())
            schemes = {name for needed in operation.get("security", []) for name in needed}
            assert schemes <= document["components"]["securitySchemes"].keys()
