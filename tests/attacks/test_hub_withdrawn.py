"""No route hands out a file that is in withdrawn versions only, under whatever name, number, id or digest somebody asks for it.

The routes are those of the application, so that a new one is held to the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.routing import Route

from adapterhub.hub import middleware
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import commit_id
from tests.attacks.test_hub_bodies import ROUTES
from tests.hub.conftest import Running, serving
from tests.support.adapters import write_adapter
from tests.support.hub_tenants import Tenant

SECRET = b"what was leaked, and is taken back\n"
SHA = hashlib.sha256(SECRET).hexdigest()
SHA512 = hashlib.sha512(SECRET).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A hub with a version that has the secret, and a newer one without it."""
    monkeypatch.setattr(middleware, "REFUSALS", 1_000_000)
    folder = write_adapter(tmp_path / "adapter", 1)
    with serving(tmp_path / "hub") as running:
        with running.registry() as registry:
            (folder / "training.txt").write_bytes(SECRET)
            registry.push(folder, Ref("team/sql", tag="prod"))
            (folder / "training.txt").write_bytes(b"mended\n")
            registry.push(folder, Ref("team/sql"))
        yield running


def values(hub: Running) -> dict[str, list[str]]:
    """What each parameter of a path may be, by which somebody could ask for the secret."""
    with hub.registry() as registry:
        digest = registry.row(Ref("team/sql", number=1)).digest
    ident = commit_id(digest)
    revisions = ["v1", ident, digest]
    return {
        "namespace": ["team"], "repo": ["sql", "sql.v1"], "name": ["team/sql", "team/sql.v1"],
        "revision": [*revisions, "main"], "rev": revisions, "path": ["training.txt"], "reference": [*revisions, "latest"],
        "digest": [digest, f"sha256:{SHA}", f"sha512:{SHA512}"], "oid": [SHA], "hash": [SHA], "number": ["1"], "tag": ["prod"],
        "branch": ["v1"], "ident": ["1"], "status": ["pending"], "account": ["team"], "session": ["x"], "epoch": ["x"],
        "paper": ["1.5"],
    }  # fmt: skip


def paths(hub: Running) -> set[str]:
    """The paths of all routes that are read, with every such value."""
    expanded: set[str] = set()
    values_by_name = values(hub)
    for route in ROUTES:
        if isinstance(route, Route) and "GET" in (route.methods or ()) and "{" in route.path:
            variants = [re.sub(r":[a-z]+}", "}", route.path)]
            for key in route.param_convertors:
                variants = [variant.replace(f"{{{key}}}", value) for variant in variants for value in values_by_name[key]]
            expanded.update(variants)
    return expanded


def routes_to_the_secret(hub: Running, token: str) -> set[str]:
    """The requests whose answers have the secret, or an address of it."""
    leaking_routes: set[str] = set()
    batch: dict[str, Any] = {"operation": "download", "objects": [{"oid": SHA, "size": len(SECRET)}]}
    with requests.Session() as session:
        session.headers = {"authorization": f"Bearer {token}"} if token else {}
        for path in sorted(paths(hub)):
            answer = session.get(hub.url + path, allow_redirects=False, timeout=60)
            assert answer.status_code < 500 or answer.status_code == 501, path
            if SECRET in answer.content or SECRET.decode().strip() in answer.text:
                leaking_routes.add(path)
        for name in ("sql", "sql.v1"):
            answer = session.post(f"{hub.url}/team/{name}.git/info/lfs/objects/batch", json=batch, timeout=60)
            if '"href"' in answer.text:
                leaking_routes.add(f"batch of {name}")
        if token:
            mount = f"{hub.url}/v2/other/new/blobs/uploads/?mount=sha256:{SHA}&from=team/sql"
            if session.post(mount, timeout=60).status_code == 201:
                leaking_routes.add("mount")
    return leaking_routes


def test_a_withdrawn_file_is_handed_out_by_no_route(hub: Running) -> None:
    owner = Tenant(hub, "team", "admin")
    everybody = {"": "", "reader": hub.make_token("ada", "read"), "writer": hub.make_token("bob", "write")}
    before = routes_to_the_secret(hub, everybody["writer"])
    assert len(before) > 10, before
    answer = owner.request("PUT", "/api/adapterhub/v1/names/team/sql/versions/v1/withdrawal", json={"message": "leaked"})
    assert answer.status_code == 200, answer.text
    assert {account: routes_to_the_secret(hub, token) for account, token in everybody.items()} == {
        account: set() for account in everybody
    }
