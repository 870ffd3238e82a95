"""A gated name is seen by all who may see it, and read only by members and by accounts with access, through every protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from starlette.routing import Route

from adapterhub.hub import gates, middleware, read_log, renames, webhooks
from adapterhub.hub.access_control import NOBODY
from adapterhub.hub.accounts import accounts, audit_log
from adapterhub.hub.app import api_routes, page_routes
from adapterhub.hub.gates import Gate
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.project.policy import Policy
from adapterhub.ref import Ref
from adapterhub_converters.errors import RefusedError, UsageError
from tests.hub.conftest import Running, client, serving
from tests.hub.web.conftest import Visitor, hide, person, visitor
from tests.support.hub_tenants import Tenant

__all__ = ["visitor"]

SECRET = b"swordfish-" * 4
NEWER = SECRET + b"\nand more\n"
API = "/api/adapterhub/v1/names/team/sql"
MODEL = "/api/models/team/sql"
REQUESTS = f"{MODEL}/user-access-request"


@pytest.fixture
def team(hub: Running, adapter: Callable[..., Path]) -> Running:
    """A hub with an adapter that is gated, and has a secret in a text file that no page shows."""
    folder = adapter(1)
    (folder / "training.txt").write_bytes(SECRET)
    with hub.registry() as registry:
        registry.push(folder, Ref("team/sql", tag="prod"))
        (folder / "training.txt").write_bytes(NEWER)
        registry.push(folder, Ref("team/sql"))
    with closing(open_database(hub.settings)) as database:
        gates.set_gate(database, "team/sql", Gate(gates.MANUAL, "Use it for good."))
    return hub


@pytest.fixture
def database(team: Running) -> Iterator[HubDatabase]:
    with closing(HubDatabase(team.folder)) as tables:
        yield tables


@pytest.fixture
def owner(team: Running) -> Tenant:
    return Tenant(team, "team", "admin")


@pytest.fixture
def reader(team: Running) -> Tenant:
    """An account without a role in the namespace, whose token is not limited."""
    tenant = Tenant(team, "ada")
    tenant.token = team.make_token("ada", "read", kind="personal")
    return tenant


@pytest.fixture
def stranger(team: Running) -> Tenant:
    """A client without an account."""
    tenant = Tenant(team, "nobody")
    tenant.token = NOBODY
    return tenant


def give(hub: Running) -> None:
    """Give the reader access to the adapter."""
    with closing(open_database(hub.settings)) as database:
        gates.decide(database, "team/sql", "ada", gates.ACCEPTED, decider="team", unasked=True)


# ---- every route

SHA, SHA_NEW = (hashlib.sha256(text).hexdigest() for text in (SECRET, NEWER))
# What each parameter of a path is, for the repository above.
VALUES = {
    "namespace": ["team"], "repo": ["sql"], "name": ["team/sql"], "revision": ["main"], "path": ["training.txt"],
    "digest": [f"sha256:{SHA}"], "oid": [SHA], "number": ["2"], "reference": ["latest"], "tag": ["prod"], "branch": ["main"],
    "status": ["pending"], "account": ["ada"], "ident": ["1"], "session": ["x"], "hash": [SHA], "epoch": ["x"],
    "paper": ["1.5"],
}  # fmt: skip
BODIES: dict[str, Any] = {
    "objects/batch": {"operation": "download", "objects": [{"oid": SHA, "size": len(SECRET)}]},
    "paths-info": {"paths": ["training.txt"]},
}
# Those that change something.
LEFT_OUT = ("/ask-access", "/user-access-request/", "/move", "/delete", "/-/adapters/", "/sign-out")


def requests_of_all_routes() -> list[tuple[str, str]]:
    """Method and path of every route about a name or a digest; a parameter that VALUES does not know fails."""
    listed = []
    for route in (*api_routes(), *page_routes()):
        assert isinstance(route, Route)
        paths = [re.sub(r":[a-z]+}", "}", route.path)]
        for key in re.findall(r"{(\w+)}", paths[0]):
            paths = [path.replace(f"{{{key}}}", value) for path in paths for value in VALUES[key]]
        if "{" in route.path:
            methods = [method for method in route.methods or () if method in ("GET", "POST")]
            listed += [(method, path) for path in paths for method in methods]
    return [(method, path) for method, path in listed if method == "GET" or not any(part in path for part in LEFT_OUT)]


def routes_to_the_secret(tenant: Tenant) -> set[str]:
    """The requests whose answer has the secret, or an address of it."""
    routes = set()
    with requests.Session() as session:
        session.headers = {"authorization": f"Bearer {tenant.token}"}
        for method, path in requests_of_all_routes():
            body = next((body for part, body in BODIES.items() if part in path), None)
            answer = session.request(method, tenant.hub.url + path, json=body, allow_redirects=False, timeout=60)
            assert answer.status_code != 429, path
            if SECRET in answer.content or '"href"' in answer.text:
                routes.add(f"{method} {path}")
    return routes


@pytest.fixture(autouse=True)
def _many_refusals_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "REFUSALS", 100_000)


def test_no_route_hands_out_a_file_before_access_is_given(
    team: Running, reader: Tenant, stranger: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert routes_to_the_secret(reader) == set()
    assert routes_to_the_secret(stranger) == set()
    give(team)
    # The secret would have been seen: it is now.
    routes = routes_to_the_secret(reader)
    assert routes == {
        "GET /team/sql/resolve/main/training.txt",
        "GET /team/sql/raw/main/training.txt",
        f"GET /v2/team/sql/blobs/sha256:{SHA}",
        "GET /team/sql/commit/main",
        "GET /team/sql/blob/main/training.txt",
        "GET /-/adapters/team/sql/edit/training.txt",
        "POST /team/sql.git/info/lfs/objects/batch",
    }
    # Each of them is a row of the log of reads, but for the one that only leads to the file.
    for route in routes - {"POST /team/sql.git/info/lfs/objects/batch"}:
        with closing(open_database(team.settings)) as database:
            monkeypatch.setattr(read_log, "_FRESH", 0.0)
            database.execute("DELETE FROM reads")
            reader.get(route.partition(" ")[2])
            assert {(row.account, row.name) for row in read_log.reads(database)} == {("ada", "team/sql")}, route


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/team/sql/resolve/main/training.txt", 403, "ask for access"),
        ("/team/sql.v1/resolve/main/training.txt", 403, "ask for access"),
        ("/TEAM/SQL/raw/main/training.txt", 403, "ask for access"),
        ("/team/sql.mlx/resolve/main/adapters.safetensors", 403, "ask for access"),
        ("/team/sql.v1.mlx/resolve/main/adapters.safetensors", 403, "ask for access"),
        (f"{MODEL}/safetensors-metadata/adapter_model.safetensors", 403, "ask for access"),
        (f"{MODEL}/auth-check", 403, "ask for access"),
        (f"/v2/team/sql/blobs/sha256:{SHA}", 403, "DENIED"),
        (f"/v2/team/sql.v1/blobs/sha256:{SHA}", 403, "DENIED"),
        ("/v2/team/sql/manifests/prod", 403, "DENIED"),
        ("/v2/team/sql.v1.mlx/manifests/latest", 403, "DENIED"),
        (MODEL, 200, '"gated":"manual"'),
        (f"{MODEL}/tree/main", 200, "training.txt"),
        ("/v2/team/sql/tags/list", 200, "prod"),
        ("/team/sql", 200, "Use it for good."),
        (f"{API}/versions/v1", 200, "sha256"),
    ],
)
def test_what_is_refused_is_refused_in_words_and_the_rest_is_shown(reader: Tenant, path: str, status: int, words: str) -> None:
    answer = reader.get(path)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text
    if status == 403 and not path.startswith("/v2"):
        assert answer.headers["x-error-code"] == "GatedRepo"


def test_a_client_of_a_registry_without_a_token_is_asked_for_one(stranger: Tenant) -> None:
    answer = stranger.get("/v2/team/sql/manifests/prod")
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (401, "UNAUTHORIZED")
    assert "is gated" in answer.text
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert stranger.get("/team/sql/resolve/main/training.txt").status_code == 403


def test_a_blob_is_neither_mounted_nor_named_from_a_gated_name(team: Running, reader: Tenant) -> None:
    writer = Tenant(team, "mine")
    answer = writer.post(f"/v2/mine/copy/blobs/uploads/?mount=sha256:{SHA}&from=team/sql")
    assert answer.status_code == 202  # an upload has begun, and nothing was mounted
    writer.create("copy")
    batch = {"operation": "upload", "objects": [{"oid": SHA, "size": len(SECRET)}]}
    upload = writer.post("/mine/copy.git/info/lfs/objects/batch", json=batch)
    assert "upload" in upload.json()["objects"][0]["actions"]  # its bytes are to be sent
    line = {"key": "lfsFile", "value": {"path": "training.txt", "algo": "sha256", "oid": SHA, "size": len(SECRET)}}
    assert writer.send("copy", json.dumps(line).encode()).status_code == 400
    assert reader.get("/mine/copy/resolve/main/training.txt").status_code == 404


# ---- asking and deciding


def test_access_is_asked_for_given_and_taken_away(team: Running, owner: Tenant, reader: Tenant) -> None:
    file = "/team/sql/resolve/main/training.txt"
    assert [reader.post(f"{path}/ask-access").json() for path in (MODEL, "/team/sql")] == [{"status": "pending"}] * 2
    assert "waits for its owners" in reader.get(file).text
    (pending,) = owner.get(f"{REQUESTS}/pending").json()
    assert (pending["user"]["user"], pending["status"]) == ("ada", "pending")
    for status, code in (("accepted", 200), ("pending", 403), ("accepted", 200), ("rejected", 403)):
        by = {"user": "ada"} if code == 200 else {"requestId": pending["requestId"]}
        owner.post(f"{REQUESTS}/handle", json={**by, "status": status, "rejectionReason": "No"}).raise_for_status()
        assert reader.get(file).status_code == code, status
    assert "rejected" in reader.get(file).text
    reader.post(f"{MODEL}/ask-access")
    assert reader.get(file).status_code == 403  # who was rejected does not get in by asking again
    assert [len(owner.get(f"{REQUESTS}/{status}").json()) for status in gates.STATUSES] == [0, 0, 1]
    with closing(open_database(team.settings)) as database:
        actions = [event for event in audit_log.events(database) if event.action != "refused"]
    newest = actions[1]
    assert (newest.action, newest.account, newest.name) == ("hf.handle", "team", "team/sql")
    assert newest.detail == "account=ada status=rejected reason=No"


def test_a_gate_that_is_automatic_opens_for_who_accepts_the_terms(owner: Tenant, reader: Tenant, stranger: Tenant) -> None:
    owner.request("PUT", f"{MODEL}/settings", json={"gated": "auto"}).raise_for_status()
    gate = reader.get(f"{API}/gate").json()
    assert (gate["mode"], gate["terms"], gate["request"], gate["may_read"]) == ("auto", "Use it for good.", None, False)
    assert stranger.post(f"{MODEL}/ask-access").status_code == 401
    assert reader.post(f"{MODEL}/ask-access").json() == {"status": "accepted"}
    assert reader.get("/team/sql/resolve/main/training.txt").content == NEWER
    owner.request("DELETE", f"{API}/gate").raise_for_status()
    assert stranger.get("/team/sql/resolve/main/training.txt").content == NEWER
    assert reader.post(f"{MODEL}/ask-access").status_code == 400
    assert owner.get(f"{REQUESTS}/pending").status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", f"{API}/gate", {"mode": "auto", "terms": ""}),
        ("DELETE", f"{API}/gate", None),
        ("PUT", f"{MODEL}/settings", {"gated": False}),
        ("GET", f"{REQUESTS}/pending", None),
        ("POST", f"{REQUESTS}/handle", {"user": "ada", "status": "accepted"}),
        ("POST", f"{REQUESTS}/grant", {"user": "ada"}),
    ],
)
def test_only_admins_of_the_namespace_decide(
    team: Running, reader: Tenant, stranger: Tenant, method: str, path: str, body: Any
) -> None:
    reader.post(f"{MODEL}/ask-access")
    writer = Tenant(team, "team", "write")
    assert [tenant.request(method, path, json=body).status_code for tenant in (reader, writer, stranger)] == [403, 403, 401]
    assert reader.get("/team/sql/resolve/main/training.txt").status_code == 403


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("handle", {"user": "ada", "status": "open"}, 400),
        ("handle", {"status": "accepted"}, 400),
        ("handle", {"requestId": "f" * 24, "status": "accepted"}, 400),
        ("handle", {"requestId": "0" * 24, "status": "accepted"}, 404),
        ("handle", {"requestId": "٣" * 24, "status": "accepted"}, 400),
        ("handle", {"user": "bob", "status": "accepted"}, 404),
        ("grant", {"user": "bob"}, 404),
        ("grant", {}, 404),
    ],
)
def test_hostile_decisions_are_refused(owner: Tenant, path: str, body: Any, status: int) -> None:
    answer = owner.post(f"{REQUESTS}/{path}", json=body)
    assert (answer.status_code, bool(answer.headers["x-error-message"])) == (status, True)
    assert owner.get(f"{REQUESTS}/opened").status_code == 400
    assert owner.get(f"{REQUESTS}/pending?cursor={'9' * 40}").json() == []


def test_a_token_that_is_limited_to_other_names_reads_nothing(team: Running, reader: Tenant) -> None:
    give(team)
    assert reader.get("/team/sql/resolve/main/training.txt").status_code == 200
    reader.token = team.make_token("ada", "read", kind="personal", namespaces=("ada",))
    refused = reader.get("/team/sql/resolve/main/training.txt")
    assert (refused.status_code, "limited to other names" in refused.text) == (403, True)
    reader.token = team.make_token("ada", "read", kind="personal", namespaces=("team",))
    assert reader.get("/team/sql/resolve/main/training.txt").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/models/team/sql/ask-access", {}),
        ("/api/models/team/open/discussions", {"title": "Better", "pullRequest": True}),
    ],
)
def test_a_token_that_is_limited_to_other_names_accepts_no_terms_and_proposes_nothing(
    team: Running, database: HubDatabase, adapter: Callable[..., Path], path: str, body: Any
) -> None:
    """A deploy key accepted the terms of any gated name for the account of its maker."""
    with team.registry() as registry:
        registry.push(adapter(7), Ref("team/open"))
    limited = Tenant(team, "ada")
    limited.token = team.make_token("ada", "write", kind="deploy", namespaces=("ada",))
    refused = limited.post(path, json=body)
    assert (refused.status_code, "limited to other names" in refused.text) == (403, True)
    limited.token = team.make_token("ada", "read", kind="personal")
    assert limited.post(path, json=body).status_code == 200


def test_results_that_a_proposal_declares_are_shown_to_who_may_read_it(team: Running, owner: Tenant, reader: Tenant) -> None:
    """The page of a proposal had the adapter.json of a gated name for everybody."""
    with team.registry() as registry:
        files = {file.path: file.digest for file in registry.files(registry.resolve(Ref("team/sql")))}
        document = json.loads(registry.store.read_document(files["adapter.json"]))
    document["evaluations"] = [{"metric": "told", "value": 0.1234}]
    lines = [{"key": "header", "value": {"summary": "Better"}}]
    for path_in_commit, data in {"adapter.json": json.dumps(document), "README.md": "# Better"}.items():
        content = base64.b64encode(data.encode()).decode()
        lines.append({"key": "file", "value": {"path": path_in_commit, "content": content}})
    owner.post("/api/models/team/sql/commit/main?create_pr=1", data="\n".join(map(json.dumps, lines))).raise_for_status()
    assert "0.1234" in owner.get("/team/sql/discussions/1").text
    assert "0.1234" not in reader.get("/team/sql/discussions/1").text


def test_an_alias_has_the_gate_of_its_repository_and_no_other(owner: Tenant, reader: Tenant) -> None:
    alias = "/api/models/team/sql.v1"
    gate = reader.get(f"{API}.v1/gate").json()
    assert (gate["mode"], gate["may_read"]) == ("manual", False)
    assert reader.post(f"{alias}/ask-access").json() == {"status": "pending"}
    assert [entry["user"]["user"] for entry in owner.get(f"{REQUESTS}/pending").json()] == ["ada"]
    for path in (f"{alias}/settings", f"{API}.v1/gate"):
        refused = owner.request("PUT", path, json={"gated": "auto", "mode": "auto"})
        assert (refused.status_code in (400, 403, 409), "is an alias" in refused.text) == (True, True), path
    reader.post(f"{alias}/like").raise_for_status()
    assert reader.get(MODEL).json()["likes"] == 1
    reader.request("DELETE", f"{alias}/like").raise_for_status()
    assert reader.get(MODEL).json()["likes"] == 0


def test_requests_are_bounded(database: HubDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "MAX_WAITING", 2)
    monkeypatch.setattr(gates, "MAX_REQUESTS", 2)
    for name in ("team/a", "team/b", "team/c"):
        gates.set_gate(database, name, Gate(gates.AUTO))
    for account in ("ada", "bob", "eve"):
        accounts.add(database, account)
    for account in ("ada", "bob"):
        gates.ask(database, "team/sql", account)
    with pytest.raises(RefusedError, match="2 accounts wait"):
        gates.ask(database, "team/sql", "eve")
    gates.ask(database, "team/a", "ada")
    with pytest.raises(RefusedError, match="ada has asked for 2 names"):
        gates.ask(database, "team/b", "ada")
    with pytest.raises(UsageError, match="characters"):
        gates.set_gate(database, "team/sql", Gate(gates.AUTO, "x" * (gates.MAX_TERMS + 1)))


# ---- what becomes of it


def test_access_that_is_given_unasked_is_bounded_and_no_burden_of_the_account(
    database: HubDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An admin of any namespace used up what an account may ask for, and their rows had no bound."""
    for limit, limit_value in (("MAX_UNASKED", 3), ("MAX_REQUESTS", 1)):
        monkeypatch.setattr(gates, limit, limit_value)
    for account in ("ada", "ben"):
        accounts.add(database, account)
    names = [f"spam/n{number}" for number in range(3)]
    for name in (*names, "spam/more", "other/x"):
        gates.set_gate(database, name, Gate(gates.AUTO))
    for name in names:
        gates.decide(database, name, "ada", gates.ACCEPTED, decider="eve", unasked=True)
    with pytest.raises(RefusedError, match="spam has given access unasked 3 times"):
        gates.decide(database, "spam/more", "ben", gates.ACCEPTED, decider="eve", unasked=True)
    gates.decide(database, "other/x", "ben", gates.ACCEPTED, decider="ada", unasked=True)
    assert gates.ask(database, "team/sql", "ada").status == gates.PENDING


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("name", ["team/sql", "team/new"])
def test_an_access_that_is_revoked_while_a_name_is_renamed_stays_revoked(
    team: Running, database: HubDatabase, owner: Tenant, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Another process, which knew the old name still, revoked it between two copies of the gate."""
    give(team)
    copy = gates.copy

    def copy_and_revoke(tables: HubDatabase, old: str, new: str) -> None:
        copy(tables, old, new)
        revoke = "UPDATE access_requests SET status = 'rejected', decided = ? WHERE name = ? AND status = 'accepted'"
        if tables.execute(revoke, time.time(), name):
            gates.set_gate(tables, name, Gate(gates.MANUAL, "stricter"))

    gates.set_gate(database, "team/sql", Gate(gates.AUTO))
    monkeypatch.setattr(gates, "copy", copy_and_revoke)
    owner.post("/api/repos/move", json={"fromRepo": "team/sql", "toRepo": "team/new"}).raise_for_status()
    request = gates.find_request(database, "team/new", "ada")
    assert request
    assert request.status == gates.REJECTED
    assert gates.find_gate(database, "team/new") == Gate(gates.MANUAL, "stricter")


def test_a_renamed_name_is_gated_at_every_moment(
    team: Running, owner: Tenant, reader: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(team)
    gate_states = []
    finish = renames._finish_rename

    def look(worker: Any, old: str, new: str) -> None:
        gate_states.extend((gates.find_gate(worker.database, new), gates.access_status(worker.database, new, "ada")))
        finish(worker, old, new)

    monkeypatch.setattr(renames, "_finish_rename", look)
    owner.post("/api/repos/move", json={"fromRepo": "team/sql", "toRepo": "team/new"}).raise_for_status()
    assert gate_states == [Gate("manual", "Use it for good."), gates.ACCEPTED]
    assert reader.get("/team/new/resolve/main/training.txt").status_code == 200
    with closing(open_database(team.settings)) as database:
        assert gates.gated_names(database) == ("team/new",)
        assert gates.find_request(database, "team/sql", "ada") is None


def test_a_restored_name_is_gated_as_it_was(owner: Tenant, reader: Tenant) -> None:
    owner.request("DELETE", API).raise_for_status()
    owner.post(f"{API}/restore").raise_for_status()
    assert reader.get("/team/sql/resolve/main/training.txt").status_code == 403


def test_a_removed_repository_without_a_version_leaves_no_gate_to_the_next_of_its_name(owner: Tenant, reader: Tenant) -> None:
    for _ in range(2):
        owner.create("empty")
        assert reader.get("/api/models/team/empty").json()["likes"] == 0
        assert owner.get("/api/adapterhub/v1/names/team/empty/gate").json()["mode"] is None
        owner.request("PUT", "/api/models/team/empty/settings", json={"gated": "auto"}).raise_for_status()
        reader.post("/api/models/team/empty/ask-access").raise_for_status()
        reader.post("/api/models/team/empty/like").raise_for_status()
        body = {"name": "empty", "organization": "team"}
        owner.request("DELETE", "/api/repos/delete", json=body).raise_for_status()


def test_an_account_that_is_removed_has_no_access(team: Running, database: HubDatabase, reader: Tenant) -> None:
    give(team)
    accounts.remove(database, "ada")
    assert gates.find_request(database, "team/sql", "ada") is None


def test_lists_say_what_is_gated_and_filter_by_it(team: Running, reader: Tenant, adapter: Callable[..., Path]) -> None:
    with team.registry() as registry:
        registry.push(adapter(2), Ref("team/open"))
        registry.push(adapter(3), Ref("secret/plans"))
    hide(team, "secret/plans")
    with closing(open_database(team.settings)) as database:
        gates.set_gate(database, "secret/plans", Gate(gates.MANUAL))

    def listed(query: str) -> dict[str, Any]:
        return {model["id"]: model["gated"] for model in reader.get(f"/api/models{query}").json()}

    assert listed("") == {"team/sql": "manual", "team/open": False}
    assert listed("?gated=true") == {"team/sql": "manual"}
    assert listed("?gated=false") == {"team/open": False}


def test_an_event_is_sent_for_a_request_and_for_a_decision(database: HubDatabase, owner: Tenant, reader: Tenant) -> None:
    webhooks.add(database, "team", "https://site.example/hook")
    reader.post(f"{MODEL}/ask-access")
    owner.post(f"{REQUESTS}/handle", json={"user": "ada", "status": "accepted"})
    bodies = [json.loads(body) for (body,) in database.select("SELECT body FROM deliveries ORDER BY id")]
    assert [(body["event"], body["name"], body["account"], body["status"]) for body in bodies] == [
        ("access.requested", "team/sql", "ada", "pending"),
        ("access.decided", "team/sql", "ada", "accepted"),
    ]


def test_a_hub_that_ends_before_an_event_is_queued_has_made_no_change(
    database: HubDatabase, owner: Tenant, reader: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhooks.add(database, "team", "https://site.example/hook")
    with monkeypatch.context() as patched:
        patched.setattr(webhooks.Webhooks, "queue_event", lambda *_: os.fstat(-1))
        assert reader.post(f"{MODEL}/ask-access").status_code == 500
        assert gates.find_request(database, "team/sql", "ada") is None
    reader.post(f"{MODEL}/ask-access").raise_for_status()
    monkeypatch.setattr(webhooks.Webhooks, "queue_event", lambda *_: os.fstat(-1))
    assert owner.post(f"{REQUESTS}/handle", json={"user": "ada", "status": "accepted"}).status_code == 500
    request = gates.find_request(database, "team/sql", "ada")
    assert request
    assert request.status == gates.PENDING


# ---- its pages, and clients


def test_people_ask_and_decide_on_pages(visitor: Visitor, database: HubDatabase, team: Running) -> None:
    assert "Sign in to ask for access" in visitor.get("/team/sql").text
    admin, ada = person(visitor, database, "root", team="admin"), person(visitor, database, "ada")
    page = ada.get("/team/sql")
    assert "Use it for good." in page.text
    settings = "/-/adapters/team/sql"
    assert ada.post(f"{settings}/ask-access", {"csrf": "x"}).status == 403
    assert ada.post(f"{settings}/ask-access", {"csrf": ada.csrf("/team/sql")}).status == 303
    assert "Your request for access waits" in ada.get("/team/sql").text
    assert ada.post(f"{settings}/decide-access", {"csrf": ada.csrf(), "account": "ada", "status": "accepted"}).status == 403
    csrf = admin.csrf(settings)
    assert "ada" in admin.get(settings).text
    admin.post(f"{settings}/decide-access", {"csrf": csrf, "account": "ada", "status": "accepted"})
    assert "You may read the files" in ada.get("/team/sql").text
    admin.post(f"{settings}/gate", {"csrf": csrf, "mode": "auto", "terms": "é" * gates.MAX_TERMS})
    assert gates.find_gate(database, "team/sql") == Gate("auto", "é" * gates.MAX_TERMS)
    admin.post(f"{settings}/gate", {"csrf": csrf, "mode": "", "terms": ""})
    assert "Gated" not in visitor.get("/team/sql").text


def test_huggingface_hub_asks_decides_and_raises_its_own_error(
    team: Running, owner: Tenant, reader: Tenant, tmp_path: Path
) -> None:
    api = client(team, tmp_path)
    from huggingface_hub.errors import GatedRepoError

    def download() -> Any:
        return api.hf_hub_download("team/sql", "training.txt", token=reader.token, cache_dir=tmp_path / "cache")

    with pytest.raises(GatedRepoError, match="is gated"):
        download()
    assert api.model_info("team/sql", token=reader.token).gated == "manual"
    reader.post("/team/sql/ask-access")
    with closing(HubDatabase(team.folder)) as opened:
        opened.execute("UPDATE accounts SET full_name = 'Ada Lovelace' WHERE name = 'ada'")
    (request,) = api.list_pending_access_requests("team/sql", token=owner.token)
    assert (request.username, request.fullname, request.status) == ("ada", "Ada Lovelace", "pending")
    assert request.timestamp.year > 2000
    api.accept_access_request("team/sql", "ada", token=owner.token)
    assert Path(download()).read_bytes() == NEWER
    api.reject_access_request("team/sql", "ada", rejection_reason="No", token=owner.token)
    assert [entry.username for entry in api.list_rejected_access_requests("team/sql", token=owner.token)] == ["ada"]
    api.grant_access("team/sql", "ada", token=owner.token)
    api.update_repo_settings("team/sql", gated=False, token=owner.token)
    assert api.model_info("team/sql").gated is False


def test_a_gated_name_is_no_other_way_to_what_the_policy_forbids(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    folder = adapter(1)
    with serving(tmp_path, policy=Policy("policy.toml", licenses=("mit",))) as strict:
        with strict.registry() as registry:
            registry.push(folder, Ref("other/sql"))
            (folder / "README.md").write_text("---\nlicense: mit\n---\n")
            registry.push(folder, Ref("team/sql"))
        eve = Tenant(strict, "eve")
        path = f"/v2/other/sql/blobs/sha256:{hashlib.sha256((folder / 'adapter_model.safetensors').read_bytes()).hexdigest()}"
        assert eve.get(path).status_code == 200
        with closing(open_database(strict.settings)) as database:
            gates.set_gate(database, "team/sql", Gate(gates.MANUAL))
        refused = eve.get(path)
        assert (refused.status_code, "against the policy" in refused.text) == (400, True)
