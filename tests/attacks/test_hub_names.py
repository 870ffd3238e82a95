"""What is private stays private while its name is removed, restored or moved, and nobody's commits are lost by that."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.hub.conftest import Running, adapter, hub
from tests.support.hub_tenants import Tenant

__all__ = ["adapter", "hub"]


@pytest.fixture
def red(hub: Running) -> Tenant:
    return Tenant(hub, "red")


def statuses_of(hub: Running, name: str) -> list[int]:
    """What somebody without a token gets of a repository, by each protocol."""
    paths = (f"/api/models/{name}", f"/{name}", f"/{name}.v1", f"/{name}/resolve/main/README.md", f"/v2/{name}/tags/list")
    return [requests.get(hub.url + path, timeout=10, allow_redirects=False).status_code for path in paths]


HIDDEN = [404, 404, 404, 404, 401]


def remove(red: Tenant, name: str) -> requests.Response:
    document = {"name": name, "organization": red.name, "type": "model"}
    return red.request("DELETE", "/api/repos/delete", json=document)


def move(red: Tenant, old: str, new: str) -> requests.Response:
    return red.post("/api/repos/move", json={"fromRepo": f"red/{old}", "toRepo": f"red/{new}", "type": "model"})


def test_a_private_name_that_is_restored_is_private(hub: Running, red: Tenant, adapter: Callable[..., Path]) -> None:
    red.create("secret", private=True)
    assert red.upload("secret", adapter(1)).ok
    assert remove(red, "secret").ok
    assert red.get("/api/models/red/secret").status_code == 404
    assert remove(red, "secret").status_code == 404
    assert red.post("/api/repos/create", json={"name": "secret", "organization": "red"}).status_code == 400
    with hub.registry() as registry:
        registry.restore("red/secret")
    assert statuses_of(hub, "red/secret") == HIDDEN
    assert red.get("/api/models/red/secret").json()["private"]
    assert red.upload("secret", adapter(2)).ok


def test_a_name_leads_nobody_to_where_they_may_not_look(hub: Running, red: Tenant, adapter: Callable[..., Path]) -> None:
    red.create("open")
    assert red.upload("open", adapter(1)).ok
    assert move(red, "open", "elsewhere").ok
    assert red.request("PUT", "/api/models/red/elsewhere/settings", json={"private": True}).ok
    assert statuses_of(hub, "red/open")[0] == 404
    assert red.get("/api/models/red/open").status_code == 307


def test_versions_that_move_are_hidden_before_they_are_there(
    hub: Running, red: Tenant, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    red.create("secret", private=True)
    assert red.upload("secret", adapter(1)).ok
    looked, admit = [], Registry.push_manifest

    def admitted(*args: object, **options: object) -> object:
        admission = admit(*args, **options)  # type: ignore[arg-type]
        looked.append(statuses_of(hub, "red/hidden"))
        return admission

    monkeypatch.setattr(Registry, "push_manifest", admitted)
    assert move(red, "secret", "hidden").ok
    assert looked == [HIDDEN]


def test_a_commit_beside_a_move_is_kept_or_refused(hub: Running, red: Tenant, adapter: Callable[..., Path]) -> None:
    folders = [adapter(seed) for seed in range(8)]
    red.create("a")
    assert red.upload("a", folders[0]).ok
    start = threading.Barrier(2)

    def push(folder: Path) -> bool:
        return red.upload("a", folder).status_code == 200

    def moved() -> bool:
        start.wait()
        return move(red, "a", "b").ok

    with ThreadPoolExecutor(4) as pool:
        moving = pool.submit(moved)
        start.wait()
        accepted_count = sum(pool.map(push, folders[1:]))
    assert moving.result()
    assert len(red.get("/api/models/red/b/commits/main").json()) == accepted_count + 1


def test_a_move_does_not_take_the_protection_of_a_tag_away(hub: Running, red: Tenant, adapter: Callable[..., Path]) -> None:
    red.create("kept")
    assert red.upload("kept", adapter(1)).ok
    with hub.registry() as registry:
        registry.tag(Ref("red/kept", tag="latest"), "prod")
        registry.protect(Ref("red/kept", tag="prod"))
    answer = move(red, "kept", "loose")
    assert (answer.status_code, answer.json()["error"]) == (400, "red/kept:prod: is protected. Unprotect it first")
    assert red.get("/api/models/red/loose").status_code == 404
    assert red.get("/api/models/red/kept").ok


def test_a_sha512_tells_nobody_what_another_namespace_has(hub: Running, red: Tenant) -> None:
    """Whoever sent bytes under their sha256 gets no answer under their sha512, even once others sent them under that."""
    data = b"what only red has, or so it thinks"
    blue = Tenant(hub, "blue")
    long, short = f"sha512:{hashlib.sha512(data).hexdigest()}", f"sha256:{hashlib.sha256(data).hexdigest()}"
    for tenant, digest in ((blue, short), (red, long)):
        tenant.create("kept", private=True)
        path = f"/v2/{tenant.name}/kept/blobs/uploads/?digest={digest}"
        assert tenant.request("POST", path, data=data).status_code == 201
    assert blue.request("HEAD", f"/v2/blue/kept/blobs/{short}").status_code == 200
    assert blue.request("HEAD", f"/v2/blue/kept/blobs/{long}").status_code == 404
    mounted = blue.request("POST", f"/v2/blue/other/blobs/uploads/?mount={long}&from=red/kept")
    assert mounted.status_code == 202
    assert red.request("HEAD", f"/v2/red/kept/blobs/{long}").status_code == 200
    operator = {"authorization": f"Bearer {hub.make_token('operator', 'admin')}"}
    moving = {"fromRepo": "red/kept", "toRepo": "blue/moved", "type": "model"}
    assert requests.post(f"{hub.url}/api/repos/move", json=moving, headers=operator, timeout=60).ok
    assert requests.head(f"{hub.url}/v2/blue/moved/blobs/{long}", headers=operator, timeout=60).status_code == 200
