"""The API shows what its client may see, changes what it may write to, and refuses the rest as the other protocols do."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import access_control, quotas
from adapterhub.hub.accounts import accounts, audit_log
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.api import reading
from adapterhub.hub.api.routes import routes
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.index import queries
from adapterhub.maintenance.gc import gc
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.ref import Ref
from adapterhub.registry import moves
from adapterhub.registry.repository_documents import OtherManifest, Repository, with_manifest
from adapterhub.registry.repository_records import Repositories
from adapterhub.store.ref_log import RefLog
from tests.conftest import Run
from tests.hub.conftest import Running, serving
from tests.hub.web.conftest import hide
from tests.support.hub_tenants import Tenant

API = "/api/adapterhub/v1"


@pytest.fixture
def team(hub: Running, adapter: Callable[..., Path]) -> Running:
    """A hub with two versions of a public adapter, and a private adapter of others."""
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql", tag="prod"))
        registry.push(adapter(2), Ref("team/sql"))
        registry.push(adapter(3), Ref("secret/plans"))
    hide(hub, "secret/plans")
    return hub


@pytest.fixture(autouse=True)
def _settings_are_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_control, "_TTL", 0.0)


@pytest.fixture
def writer(team: Running) -> Tenant:
    return Tenant(team, "team")


@pytest.fixture
def reader(team: Running) -> Tenant:
    """An account with a role in a namespace of its own alone."""
    return Tenant(team, "other")


CHANGES: list[tuple[str, str, Any]] = [
    ("PUT", "tags/new", {"reference": "v1"}),
    ("DELETE", "tags/prod", None),
    ("POST", "tags/prod/restore", {}),
    ("PUT", "tags/prod/protection", None),
    ("DELETE", "tags/prod/protection", None),
    ("POST", "tags/prod/promotion", {"reference": "v1"}),
    ("POST", "tags/prod/rollback", {"message": "wrong"}),
    ("POST", "versions/v1/approvals", {"tag": "prod", "message": "read it"}),
    ("POST", "versions/v1/evaluations", {"name": "sql", "metrics": {"pass": 1.0}, "data": [], "base": {}}),
    ("PUT", "versions/v1/withdrawal", {"message": "leaked"}),
    ("DELETE", "versions/v1/withdrawal", None),
    ("PUT", "gate", {"mode": "auto"}),
    ("DELETE", "gate", None),
    ("PUT", "deprecation", {"message": "old"}),
    ("DELETE", "deprecation", None),
    ("PUT", "versions/v1/deprecation", {"message": "old"}),
    ("POST", "versions/v1/approvals", {"tag": "prod", "message": "fine"}),
    ("PUT", "versions/v1/withdrawal", {"message": "leaked"}),
    ("DELETE", "versions/v1/withdrawal", None),
    ("POST", "tags/prod/promotion", {"reference": "v2"}),
    ("POST", "tags/prod/rollback", {}),
    ("POST", "proposals/1/acceptance", {}),
    ("POST", "proposals/1/refusal", {"reason": "no"}),
    ("DELETE", "proposals/1", None),
    ("POST", "move", {"to": "team/moved"}),
    ("PUT", "retention", {"keep": 1}),
    ("DELETE", "retention", None),
    ("POST", "versions", {"manifest": "{}"}),
    ("POST", "restore", None),
    ("DELETE", "", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_only_who_may_write_changes_anything(team: Running, reader: Tenant, method: str, path: str, body: Any) -> None:
    url = f"{API}/names/team/sql/{path}".rstrip("/")
    assert reader.request(method, url, json=body).status_code == 403
    stranger = reader.request(method, url, json=body, headers={"authorization": ""})
    assert stranger.status_code == 401
    with team.registry() as registry:
        assert [entry.op for entry in registry.log(Ref("team/sql"))] == ["push", "push"]


def _tail(path: str) -> str:
    """The part of a route after the name, as the paths of `CHANGES` are compared with it."""
    tail = path.rsplit("{repo}", maxsplit=1)[-1].strip("/")
    return tail.replace("{tag}", "T").replace("{reference}", "R").replace("{ident}", "1")


def test_every_route_that_changes_something_is_tried() -> None:
    changing = {
        (method, _tail(route.path))  # type: ignore[attr-defined]
        for route in routes()
        for method in route.methods - {"GET", "HEAD"}  # type: ignore[attr-defined]
        if "{repo}" in route.path  # type: ignore[attr-defined]
    }
    tried = {
        (method, path.replace("tags/new", "tags/T").replace("tags/prod", "tags/T").replace("/v1/", "/R/"))
        for method, path, _ in CHANGES
    }
    assert changing - tried == {("DELETE", "versions/R/deprecation")}


def test_a_change_is_a_row_of_the_audit_log_with_its_account(team: Running, writer: Tenant) -> None:
    assert writer.request("PUT", f"{API}/names/team/sql/tags/beta", json={"reference": "v1"}).status_code == 200
    with closing(open_database(team.settings)) as database:
        event = audit_log.events(database, limit=1)[0]
    assert (event.action, event.name, event.account) == ("api.put_tag", "team/sql", "team")
    with team.registry() as registry:
        entry = registry.log(Ref("team/sql"))[0]
    assert (entry.op, entry.tags, entry.author) == ("tag", ("beta",), "team")


def test_a_tag_moves_only_from_where_the_client_saw_it(writer: Tenant) -> None:
    url = f"{API}/names/team/sql/tags/prod"
    etag = writer.get(url).headers["etag"]
    moved = writer.request("PUT", url, json={"reference": "v2"}, headers={"if-match": etag})
    assert (moved.status_code, moved.json()["ref"]) == (200, "team/sql:v2")
    stale = writer.request("PUT", url, json={"reference": "v1"}, headers={"if-match": etag})
    assert (stale.status_code, stale.json()["kind"], stale.json()["code"]) == (412, "conflict", "conflict")
    absent = writer.request("PUT", url, json={"reference": "v1"}, headers={"if-none-match": "*"})
    assert absent.status_code == 409
    assert writer.request("DELETE", url, headers={"if-match": etag}).status_code == 412
    assert writer.get(url).headers["etag"] == moved.headers["etag"]


@pytest.mark.parametrize("headers", [{"if-match": "*"}, {"if-none-match": '"a"'}, {"if-match": "a", "if-none-match": "*"}])
def test_a_condition_that_cannot_be_kept_is_refused(writer: Tenant, headers: dict[str, str]) -> None:
    url = f"{API}/names/team/sql/tags/new"
    answer = writer.request("PUT", url, json={"reference": "v1"}, headers=headers)
    assert (answer.status_code, answer.json()["what"]) == (400, "is not one that can be kept")
    assert writer.get(url).status_code == 404


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_no_change_ignores_a_condition(team: Running, writer: Tenant, method: str, path: str, body: Any) -> None:
    url = f"{API}/names/team/sql/{path}".rstrip("/")
    answer = writer.request(method, url, json=body, headers={"if-match": f'"sha256:{"0" * 64}"'})
    assert answer.status_code in (400, 412)
    with team.registry() as registry:
        assert [entry.op for entry in registry.log(Ref("team/sql"))] == ["push", "push"]


def test_private_names_are_in_no_answer(team: Running, reader: Tenant) -> None:
    owner = Tenant(team, "secret")
    with team.registry() as registry:
        plans = registry.resolve(Ref("secret/plans")).digest
    paths = (
        "versions",
        f"versions?digest={plans}",
        "search?facets=true",
        "search?words=plans",
        "usage",
        "usage?prefix=secret",
        "names/secret/plans/log",
        "names/secret/plans/versions/latest",
    )
    for path in paths:
        assert "plans" in owner.get(f"{API}/{path}").text.replace("secret/plans: no such adapter", ""), path
        text = reader.get(f"{API}/{path}").text.replace("secret/plans: no such adapter", "").replace('"secret/plans"', "")
        assert "plans" not in text, path
    for query in ({"digest": plans}, {"version": plans, "files": [plans], "tensors": []}):
        assert "plans" in owner.post(f"{API}/find", json=query).text
        assert "plans" not in reader.post(f"{API}/find", json=query).text


def test_the_removal_of_a_parent_does_not_name_a_child_that_is_hidden(team: Running, writer: Tenant, run: Run) -> None:
    run("push", "team/sql:v1", "secret/child", "--to", "peft", env=team.environ)
    hide(team, "secret/child")
    for path in ("/api/repos/delete", f"{API}/names/team/sql"):
        refused = writer.request("DELETE", path, json={"name": "team/sql"})
        assert refused.status_code == 400
        assert "made from it" in refused.json()["error"]
        assert "secret" not in refused.text
    assert "secret" not in writer.get(f"{API}/names/team/sql/versions/v1/lineage").text
    assert writer.request("DELETE", f"{API}/names/team/sql?force=true").status_code == 200


def test_a_list_comes_in_pages_that_lead_to_each_other(team: Running, writer: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PAGE", 1)
    for path, key, count in (("versions", "adapters", 2), ("names/team/sql/log", "entries", 2)):
        items, url = list[Any](), f"{API}/{path}"
        while url:
            answer = writer.get(url)
            items += answer.json()[key]
            url = answer.headers.get("link", "").partition(">")[0].removeprefix(f"<{team.url}")
        assert len(items) == count, path


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("versions?cursor=team/sql:v1", 200),
        ("versions?cursor=team/sql", 400),
        ("versions?cursor=' OR 1=1 --", 400),
        ("versions?cursor=%00", 400),
        ("versions?cursor=" + "x" * 5000, 400),
        ("versions?cursor=team/sql:v99999999999999999999999", 400),
        ("names/team/sql/log?cursor=-1", 200),
        ("names/team/sql/log?cursor=99999999999999999999", 200),
        ("names/team/sql/log?reference=" + "9" * 5000, 400),
        ("names/team/sql/versions/..%2F..%2Fetc", 400),
        ("names/team/sql/versions/sha256:zz", 400),
        ("names/TEAM/sql/versions/v1", 404),
        ("names/team/%00/log", 400),
        ("names/con/aux/log", 404),
        ("search?rank=x", 400),
        ("search?metric=" + "9" * 400, 400),
        ("search?" + "&".join(["tag=a"] * 51), 400),
        ("search?limit=99999999999", 200),
        ('search?words="*', 200),
    ],
)
def test_hostile_queries_are_refused_or_find_nothing(writer: Tenant, path: str, status: int) -> None:
    assert writer.get(f"{API}/{path}").status_code == status


@pytest.mark.parametrize(
    "tag", ["main", "HEAD", "v3", "latest", "^1.2", "-x", "a" * 200, "..%2Fx", "%00", "é", "a:b", "sha256:" + "a" * 64]
)
def test_names_that_no_tag_can_have_are_refused(writer: Tenant, tag: str) -> None:
    answer = writer.request("PUT", f"{API}/names/team/sql/tags/{tag}", json={"reference": "v1"})
    assert answer.status_code == 400, answer.text


def test_a_body_is_bounded_and_of_its_form(writer: Tenant) -> None:
    url = f"{API}/names/team/sql/tags/x"
    assert writer.request("PUT", url, data=b"x" * 70_000).status_code == 413
    for body in (b"[]", b"{", b'{"reference": 1}', b'{"reference": null}', b"{}", b"\xff"):
        assert writer.request("PUT", url, data=body).status_code == 400
    digest = "sha256:" + "a" * 64
    for malformed in ({"files": [1], "tensors": []}, {"files": ["x"], "tensors": []}, {"files": [], "tensors": [[digest]]}):
        assert writer.post(f"{API}/find", json=malformed).status_code == 400
    oversized = {"version": None, "files": [], "tensors": [[digest, 1]] * 50_001}
    assert writer.post(f"{API}/find", json=oversized).status_code == 400
    assert writer.post(f"{API}/names/team/sql/versions", json={"manifest": json.dumps({"layers": []})}).status_code == 400


def test_what_would_exceed_a_quota_is_not_restored(team: Running, writer: Tenant, adapter: Callable[..., Path]) -> None:
    assert writer.request("DELETE", f"{API}/names/team/sql").status_code == 200
    with team.registry() as registry:
        registry.push(adapter(4), Ref("team/new"))
        size = sum(queries.files(registry.index, "team").values())
    with closing(open_database(team.settings)) as database:
        accounts.set_namespace(database, Namespace("team", max_bytes=size + 500))
    answer = writer.post(f"{API}/names/team/sql/restore")
    assert answer.status_code == 400
    assert "team" in answer.json()["error"]
    with team.registry() as registry:
        assert not registry.list("team/sql")


def test_a_restored_name_is_as_private_as_it_was(team: Running, reader: Tenant) -> None:
    owner = Tenant(team, "secret")
    url = f"{API}/names/secret/plans"
    assert owner.request("DELETE", url).status_code == 200
    assert "removed" in owner.get(f"{url}/versions/v1").json()["code"]
    assert owner.get(f"{url}/log").json()["entries"][0]["op"] == "delete"
    assert [reader.get(f"{url}/{path}").json()["code"] for path in ("versions/v1", "log")] == ["no-such-adapter"] * 2
    assert reader.post(f"{url}/restore").status_code == 404
    assert owner.post(f"{url}/restore").json() == {"restored": "secret/plans", "versions": [1], "lost": []}
    assert reader.get(f"{url}/versions/v1").status_code == 404


def test_a_name_is_as_private_after_a_removal_that_was_cut_off_and_asked_for_again(
    team: Running, reader: Tenant, adapter: Callable[..., Path]
) -> None:
    owner = Tenant(team, "secret")
    owner.create("draft", private=True)
    owner.upload("draft", adapter(5)).raise_for_status()
    with team.registry() as registry:
        registry.rm(Ref("secret/draft"))  # as by a process that was killed before it changed the record
    owner.request("DELETE", "/api/repos/delete", json={"name": "secret/draft"}).raise_for_status()
    owner.post(f"{API}/names/secret/draft/restore").raise_for_status()
    assert owner.get(f"{API}/names/secret/draft/versions/v1").status_code == 200
    assert reader.get(f"{API}/names/secret/draft/versions/v1").status_code == 404


def test_what_is_removed_needs_no_room(team: Running, writer: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "_FREE_RECORDS", 0)
    with closing(open_database(team.settings)) as database:
        accounts.set_namespace(database, Namespace("team", max_bytes=1))
    url = f"{API}/names/team/sql"
    assert writer.request("PUT", f"{url}/tags/new", json={"reference": "v1"}).json()["code"] == "quota"
    assert [writer.request("DELETE", f"{url}{path}").status_code for path in ("/tags/prod", "")] == [200, 200]


def test_a_manifest_that_is_no_adapter_is_refused_before_anything_moves(team: Running, writer: Tenant) -> None:
    with team.registry() as registry:
        config = registry.row(Ref("team/sql")).digest
        size = registry.store.size(config)
    descriptor = {"mediaType": "application/json", "digest": config, "size": size}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": descriptor, "layers": []}
    before = writer.get(f"{API}/names/team/sql/tags/prod").json()
    answer = writer.post(f"{API}/names/team/sql/versions", json={"manifest": json.dumps(manifest), "tags": ["prod"]})
    assert (answer.status_code, answer.json()["what"]) == (400, "the manifest is not that of an adapter")
    assert writer.get(f"{API}/names/team/sql/tags/prod").json() == before
    assert record_of(team, "team/sql") is None


def test_a_renamed_name_leads_to_the_new_one(writer: Tenant) -> None:
    writer.post("/api/repos/move", json={"fromRepo": "team/sql", "toRepo": "team/new"}).raise_for_status()
    answer = writer.get(f"{API}/names/team/sql/versions/v1")
    assert (answer.status_code, answer.headers["location"]) == (307, f"{API}/names/team/new/versions/v1")
    # However the old name is spelled, and wherever else in the path something is spelled like it.
    for url in ("/{}/resolve/main/team/sql", "/api/models/{}/tree/main/team/sql?recursive=1"):
        moved = writer.get(url.format("Team/SQL"))
        assert (moved.status_code, moved.headers.get("location")) == (307, url.format("team/new"))
    refused = writer.request("PUT", f"{API}/names/team/sql/tags/x", json={"reference": "v1"})
    assert (refused.status_code, refused.json()["what"]) == (400, "was moved to team/new")


def test_a_login_is_required_where_the_hub_requires_one(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    with serving(tmp_path / "closed", require_login=True) as hub:
        with hub.registry() as registry:
            registry.push(adapter(1), Ref("team/sql"))
        tenant = Tenant(hub, "team")
        for path in ("versions", "search", "usage", "names/team/sql/log", "names/team/sql/versions/v1"):
            assert tenant.get(f"{API}/{path}").status_code == 200
            assert tenant.get(f"{API}/{path}", headers={"authorization": ""}).status_code in (401, 404)
        assert tenant.get("/api/adapterhub", headers={"authorization": ""}).json()["program"] == "adapterhub"


def attach(hub: Running, name: str) -> None:
    """Attach a manifest with a file to the version `latest`."""
    with hub.registry() as registry:
        row, store = registry.row(Ref(name)), registry.store
        blob, _ = store.put_bytes(b"notes")
        raw = json.dumps({"schemaVersion": 2, "artifactType": "text/x", "subject": {"digest": row.digest}}).encode()
        manifest = OtherManifest(MANIFEST_TYPE, len(raw), "text/x", row.digest, blobs=(blob,))
        digest = store.put_bytes(raw)[0]
        Repositories(registry).change(name, lambda state: with_manifest(state, digest, manifest, {"notes": digest}))


def record_of(hub: Running, name: str) -> Repository | None:
    with hub.registry() as registry:
        return Repositories(registry).get(name)


@pytest.mark.parametrize("private", [True, False])
def test_a_restored_name_has_its_branches_commits_and_other_manifests(
    team: Running, writer: Tenant, adapter: Callable[..., Path], private: bool
) -> None:
    writer.create("draft", private=private)
    writer.upload("draft", adapter(5)).raise_for_status()
    writer.post("/api/models/team/draft/branch/next", json={}).raise_for_status()
    attach(team, "team/draft")
    record = record_of(team, "team/draft")
    assert record is not None
    assert (len(record.commits), next(iter(record.manifests.values())).artifact_type) == (1, "text/x")
    url = f"{API}/names/team/draft"
    for _ in range(2):
        assert writer.request("DELETE", url).status_code == 200
        assert (record_of(team, "team/draft") is not None) == private
        assert writer.post(f"{url}/restore").status_code == 200
        assert record_of(team, "team/draft") == record


def test_a_restored_name_has_branches_at_its_versions(team: Running, writer: Tenant) -> None:
    writer.post("/api/models/team/sql/branch/next", json={"startingPoint": "v1"}).raise_for_status()
    refs = writer.get("/api/models/team/sql/refs").json()
    assert [branch["name"] for branch in refs["branches"]] == ["main", "next"]
    writer.request("DELETE", f"{API}/names/team/sql").raise_for_status()
    writer.post(f"{API}/names/team/sql/restore").raise_for_status()
    assert writer.get("/api/models/team/sql/refs").json() == refs


def test_a_restored_name_is_without_what_a_gc_has_removed(team: Running, writer: Tenant, adapter: Callable[..., Path]) -> None:
    writer.create("draft")
    writer.upload("draft", adapter(5)).raise_for_status()
    writer.request("DELETE", f"{API}/names/team/draft").raise_for_status()
    with team.registry() as registry:
        gc(registry, grace=0)
    assert writer.post(f"{API}/names/team/draft/restore").json()["lost"] == [1]
    assert record_of(team, "team/draft") is None


def test_a_restore_that_is_refused_leaves_no_branches(
    team: Running, writer: Tenant, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.create("draft")
    writer.upload("draft", adapter(5)).raise_for_status()
    writer.request("DELETE", f"{API}/names/team/draft").raise_for_status()
    monkeypatch.setattr(moves, "MAX_RESTORES", 0)
    assert "restored 0 times" in writer.post(f"{API}/names/team/draft/restore").json()["what"]
    assert record_of(team, "team/draft") is None


def test_a_page_of_a_log_reads_no_more_than_its_part(team: Running, writer: Tenant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each page read the whole log, without a token."""
    path = f"{API}/names/team/sql/log"
    complete = writer.get(path).json()["entries"]
    seqs, read = list[int](), RefLog.entry

    def entry(logs: RefLog, name: str, seq: int, **options: Any) -> Any:
        seqs.append(seq)
        return read(logs, name, seq, **options)

    monkeypatch.setattr(RefLog, "entry", entry)
    monkeypatch.setattr(reading, "_MAX_READ", 1)
    entries, pages = list[Any](), 0
    while path:
        seqs.clear()
        answer = writer.get(path)
        entries, pages = entries + answer.json()["entries"], pages + 1
        assert len(seqs) <= 2  # one of them to follow the log
        path = answer.headers.get("link", "").partition(">")[0].removeprefix(f"<{team.url}")
    assert (entries, pages) == (complete, len(complete))
