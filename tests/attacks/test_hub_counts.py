"""No list and no count of the hub has what somebody may not see; asking for it costs nothing that stays."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import requests

from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.hf import reading
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.registry.repository_records import Repositories
from tests.hub.conftest import Running, adapter, hub, serving
from tests.support.hub_tenants import Tenant

__all__ = ["adapter", "hub"]
LISTS = ("/", "/-/bases", "/?license=quiet", "/api/models", "/api/models-tags-by-type", "/?q=quiet", "/red")


def text(hub: Running, path: str, token: str = "") -> str:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return requests.get(hub.url + path, headers=headers, timeout=10).text


@pytest.mark.parametrize("readers", ["members", "accounts", "private"])
def test_what_may_not_be_seen_is_in_no_list_and_no_count(hub: Running, adapter: Callable[..., Path], readers: str) -> None:
    red, blue = Tenant(hub, "red"), Tenant(hub, "blue")
    blue.create("open")
    assert blue.upload("open", adapter(2, base_model_name_or_path="shown/base")).ok
    before = {path: text(hub, path) for path in LISTS}
    red.create("quiet", private=readers == "private")
    with closing(open_database(hub.settings)) as database:
        if readers != "private":
            accounts.set_namespace(database, Namespace("red", readers))
    folder = adapter(1, base_model_name_or_path="hushed/base")
    (folder / "README.md").write_text("---\nlicense: quiet\ntags: [hushed]\n---\n# Hushed\n")
    assert red.upload("quiet", folder).ok
    with serving(hub.folder) as fresh:  # what was remembered of before is forgotten
        assert {path: text(fresh, path) for path in LISTS} == before
        assert "hushed/base" in text(fresh, "/-/bases", red.token)
        assert ("hushed/base" in text(fresh, "/-/bases", blue.token)) == (readers == "accounts")


@pytest.mark.parametrize("visitor_kind", ["stranger", "member"])
def test_metrics_do_not_tell_what_others_have(hub: Running, adapter: Callable[..., Path], visitor_kind: str) -> None:
    """The bytes of all distinct files told whether bytes that one pushed were here already, in private."""
    red, blue = Tenant(hub, "red"), Tenant(hub, "blue", "admin")
    token = "" if visitor_kind == "stranger" else blue.token

    def numbers() -> list[str]:
        own_prefixes = ("#", "process_", "hub_requests", "hub_request_seconds", "hub_received_bytes", "hub_sent_bytes")
        return [line for line in text(hub, "/metrics", token).splitlines() if not line.startswith(own_prefixes)]

    before = numbers()
    red.create("quiet", private=True)
    assert red.upload("quiet", adapter(1)).ok
    assert numbers() == before == []
    assert "hub_stored_bytes" in text(hub, "/metrics", hub.make_token("prometheus", "read"))


def test_a_name_that_is_moved_leads_no_page_to_where_they_may_not_look(hub: Running, adapter: Callable[..., Path]) -> None:
    red = Tenant(hub, "red")
    red.create("open")
    assert red.upload("open", adapter(1)).ok
    assert red.post("/api/repos/move", json={"fromRepo": "red/open", "toRepo": "red/new"}).ok
    assert red.request("PUT", "/api/models/red/new/settings", json={"private": True}).ok
    assert requests.get(f"{hub.url}/red/open", timeout=10, allow_redirects=False).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/red/open/v99999999999999999999", "/v2/\u20ac/manifests/x", "/v2/a%0D/tags/list", "/api/models?filter=" + "a," * 300]
    + [f"/{kind}v99999999999999999999" for kind in ("v2/red/open/manifests/", "api/models/red/open/revision/")],
)
def test_what_cannot_be_is_refused_in_words(hub: Running, adapter: Callable[..., Path], path: str) -> None:
    red = Tenant(hub, "red")
    red.create("open")
    assert red.upload("open", adapter(1)).ok
    for token in (red.token, "wrong"):
        answer = requests.get(hub.url + path, headers={"authorization": f"Bearer {token}"}, timeout=10)
        assert answer.status_code in (400, 401, 404)
        assert str(hub.folder) not in answer.text


def test_names_that_are_not_there_are_not_remembered(hub: Running) -> None:
    with hub.registry() as registry:
        repositories = Repositories(registry)
        for number in range(100):
            assert repositories.get(f"red/{number}") is None
        assert not repositories._states


def test_a_list_with_files_has_only_so_many_of_them_on_a_page(
    hub: Running, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 repositories of 10,000 files each would be a page of five million."""
    monkeypatch.setattr(reading, "_MAX_SIBLINGS", 8)
    red = Tenant(hub, "red")
    for seed in range(4):
        red.create(f"r{seed}")
        assert red.upload(f"r{seed}", adapter(seed)).ok
    pages, path = [], "/api/models?full=true"
    while path:
        answer = red.get(path)
        pages.append([model["id"] for model in answer.json()])
        path = answer.links.get("next", {}).get("url", "").removeprefix(hub.url)
    assert sorted(name for page in pages for name in page) == [f"red/r{seed}" for seed in range(4)]
    assert len(pages) > 1
    assert len(red.get("/api/models").json()) == 4
