"""What one may not see is answered as what is not there: in the same words, after the same lookups."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.hub import access_control
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.api import reading
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.index.index_database import Index
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from tests.hub.conftest import Running, serving
from tests.hub.web.conftest import hide

THERE, ABSENT = "secret", "absent"
RANDOM = "sha256:" + "5" * 64
LFS = "/mine/own.git/info/lfs/objects/batch"


@dataclass
class Statements:
    """The statements that the databases of the hub have run."""

    run: list[str]

    def about(self, ask: Callable[[], Any]) -> tuple[Any, list[str]]:
        """What `ask` returns, and the statements that it led to."""
        self.run.clear()
        return ask(), sorted(self.run)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> Statements:
    """Listen to the databases; what is remembered for seconds is remembered for the whole test."""
    recorded_statements = Statements([])
    monkeypatch.setattr(access_control, "_TTL", 3600.0)
    for kind in (Index, HubDatabase):
        monkeypatch.setattr(kind, "select", _listening(kind.select, recorded_statements))
    return recorded_statements


def _listening(select: Callable[..., Any], statements: Statements) -> Callable[..., Any]:
    def listening(self: Any, sql: str, *values: object, **options: Any) -> Any:
        statements.run.append(sql)
        return select(self, sql, *values, **options)

    return listening


@dataclass(frozen=True)
class Tenants:
    """A hub with the repositories of others: private ones, and those in a namespace for its members. And who asks for them."""

    hub: Running
    token: str
    foreign: str

    def ask(self, method: str, path: str, digest: str = "") -> tuple[int, str]:
        """The status and the body of an answer; `digest` is what a batch of LFS asks for."""
        headers = {"authorization": f"Bearer {self.token}"}
        objects = {"operation": "download", "objects": [{"oid": digest.removeprefix("sha256:"), "size": 1}]}
        body = json.dumps(objects) if digest else None
        url = self.hub.url + path
        answer = urllib3.request(method, url, headers=headers, body=body, redirect=False, retries=False)
        return answer.status, answer.data.decode()


@pytest.fixture
def tenants(statements: Statements, tmp_path: Path, adapter: Callable[..., Path]) -> Iterator[Tenants]:
    with serving(tmp_path / "hub") as running:
        with running.registry() as registry:
            for seed, name in enumerate(("secret/plans", "team/secret", "closed/secret", "mine/own", "open/other")):
                row = registry.push(adapter(seed), Ref(name))
                if name == "team/secret":
                    raw = registry.store.read_document(row.digest)
                    foreign = max(oci_manifest.parse(raw, name).layers, key=lambda layer: layer.size).digest
        hide(running, "secret/plans")
        hide(running, "team/secret")
        with closing(HubDatabase(running.folder)) as database:
            accounts.set_namespace(database, Namespace("closed", "members"))
        yield Tenants(running, running.make_token("mine", "admin", namespaces=["mine"]), foreign)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/models/team/{}"),
        ("GET", "/api/models/closed/{}"),
        ("GET", "/api/models/team/{}.v1"),
        ("GET", "/api/models/team/{}.gguf"),
        ("GET", "/api/models/team/{}.v1.mlx"),
        ("GET", "/api/models/team/{}/tree/main"),
        ("HEAD", "/team/{}/resolve/main/adapter_config.json"),
        ("GET", "/v2/team/{}/manifests/v1"),
        ("GET", "/v2/team/{}/tags/list"),
        ("GET", "/v2/closed/{}.v1/manifests/latest"),
        ("GET", f"/v2/team/{{}}/blobs/{RANDOM}"),
        ("GET", f"/v2/team/{{}}/referrers/{RANDOM}"),
        ("GET", "/team/{}"),
        ("GET", "/team/{}/v1/tensors"),
        ("GET", "/{}"),
        ("GET", "/api/users/{}/overview"),
        ("GET", "/api/models?author={}"),
        ("GET", "/api/models?search={}"),
        ("GET", "/?q={}"),
        ("GET", "/api/adapterhub/v1/versions?prefix=team/{}"),
        ("GET", "/api/adapterhub/v1/versions?prefix={}"),
        ("GET", "/api/adapterhub/v1/search?words={}"),
        ("GET", "/api/adapterhub/v1/search?namespace={}"),
        ("GET", "/api/adapterhub/v1/usage?prefix=team/{}"),
        ("GET", "/api/adapterhub/v1/names/team/{}/log"),
        ("GET", "/api/adapterhub/v1/names/closed/{}/log"),
        ("GET", "/api/adapterhub/v1/names/team/{}/versions/v1"),
        ("GET", "/api/adapterhub/v1/names/team/{}.v1/versions/v1"),
        ("GET", "/api/adapterhub/v1/names/team/{}/versions/v1/lineage"),
        ("GET", "/api/adapterhub/v1/names/team/{}/tags/latest"),
        ("DELETE", "/api/adapterhub/v1/names/team/{}"),
        ("DELETE", "/api/adapterhub/v1/names/team/{}/tags/prod"),
        ("PUT", "/api/adapterhub/v1/names/team/{}/tags/prod"),
        ("PUT", "/api/adapterhub/v1/names/team/{}/deprecation"),
        ("POST", "/api/adapterhub/v1/names/team/{}/restore"),
        ("POST", "/api/adapterhub/v1/names/team/{}/tags/prod/restore"),
    ],
)
def test_a_name_that_one_may_not_see_is_looked_up_as_one_that_is_not_there(
    tenants: Tenants, statements: Statements, method: str, path: str
) -> None:
    def look_up(name: str) -> tuple[Any, list[str]]:
        (status, text), run = statements.about(lambda: tenants.ask(method, path.format(name)))
        return (status, text.replace(name, ABSENT)), run

    _same(lambda: (look_up(THERE), look_up(ABSENT)))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/mine/own/blobs/{}"),
        ("GET", "/v2/mine/new/blobs/{}"),
        ("GET", "/v2/open/other/blobs/{}"),
        ("GET", "/v2/mine/own/manifests/{}"),
        ("POST", "/v2/mine/own/blobs/uploads/?mount={}&from=team/secret"),
        ("POST", "/v2/mine/own/blobs/uploads/?mount={}"),
        ("POST", LFS),
    ],
)
def test_a_blob_of_others_is_looked_up_as_one_that_is_not_there(
    tenants: Tenants, statements: Statements, method: str, path: str
) -> None:
    def look_up(digest: str) -> tuple[Any, list[str]]:
        expected = digest if path == LFS else ""
        (status, text), run = statements.about(lambda: tenants.ask(method, path.format(digest), expected))
        return (status, text.replace(digest.removeprefix("sha256:"), "")), run

    _same(lambda: (look_up(tenants.foreign), look_up(RANDOM)))


@pytest.mark.parametrize(
    "path",
    [
        "/api/models?limit=1",
        "/api/models?limit=1&direction=1&cursor=2000+a/b",
        "/api/users/closed/overview",
        "/api/adapterhub/v1/versions",
        "/api/adapterhub/v1/search?facets=true",
        "/v2/_catalog?n=1",
        "/",
        "/closed",
    ],
)
def test_what_was_pushed_since_names_were_read_is_in_no_list_nor_where_the_next_page_begins(
    tenants: Tenants, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(reading, "_PAGE", 1)
    headers = {"authorization": f"Bearer {tenants.token}"}

    def answer() -> tuple[bytes, str]:
        listed = urllib3.request("GET", tenants.hub.url + path, headers=headers)
        return listed.data, listed.headers.get("link", "")

    before = answer()
    with tenants.hub.registry() as registry:
        for seed, name in enumerate(("closed/a", "closed/zz"), 7):
            registry.push(adapter(seed), Ref(name))
    assert answer() == before


def _same(ask: Callable[[], tuple[Any, Any]]) -> None:
    """Compare two answers; a thread that is new, or awakes now and then, may have run something else meanwhile."""
    turns = [ask() for _ in range(2)]
    while turns[-1][0] != turns[-1][1] and len(turns) < 6:
        turns.append(ask())
    existing, absent = turns[-1]
    assert existing == absent
    assert absent[0][0] in (200, 202, 404)
