"""With `dry_run`, a hub answers a change as if it were made, and makes none: every change of a name can be rehearsed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from adapterhub.hub import access_control, openapi
from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.api import reading, routes
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.index import queries
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.project.policy import Policy
from adapterhub.project.tag_rules import TagRules
from adapterhub.ref import Ref
from adapterhub.registry import version_facts
from adapterhub.registry.releases import tag_requirements
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.download import read_blob
from adapterhub.store.store import Store
from tests.cli.test_options import flags, leaves
from tests.conftest import Run
from tests.hub.conftest import Running, serving
from tests.hub.oci.conftest import Registry as OciRegistry
from tests.hub.sending import Sending
from tests.support.hub_tenants import Tenant

API = "/api/adapterhub/v1"
NAME = f"{API}/names/{{namespace}}/{{repo}}"
# Each is rehearsed and then made: a route, what stands for its parameters, and its body.
STEPS: list[tuple[str, str, dict[str, str], Any]] = [
    ("PUT", "tags/{tag}", {"tag": "new"}, {"reference": "v1"}),
    ("PUT", "tags/{tag}", {"tag": "next"}, {"reference": "v1"}),  # a branch, which follows its tag
    ("PUT", "tags/{tag}", {"tag": "latest"}, {"reference": "v1"}),  # refused
    ("PUT", "tags/{tag}/protection", {"tag": "new"}, None),
    ("DELETE", "tags/{tag}", {"tag": "new"}, None),  # refused: it is protected
    ("DELETE", "tags/{tag}/protection", {"tag": "new"}, None),
    ("DELETE", "tags/{tag}", {"tag": "new"}, None),
    ("POST", "tags/{tag}/restore", {"tag": "new"}, {}),
    ("POST", "tags/{tag}/promotion", {"tag": "prod"}, {"reference": "v2"}),
    ("POST", "tags/{tag}/rollback", {"tag": "prod"}, {"message": "wrong"}),
    ("POST", "versions/{reference}/evaluations", {"reference": "v1"}, {"name": "a", "metrics": {}, "data": [], "base": {}}),
    ("POST", "versions/{reference}/approvals", {"reference": "v1"}, {"tag": "prod", "message": "read it"}),
    ("PUT", "versions/{reference}/withdrawal", {"reference": "v2"}, {"message": "leaked"}),
    ("DELETE", "versions/{reference}/withdrawal", {"reference": "v2"}, None),
    ("PUT", "deprecation", {}, {"message": "old"}),
    ("DELETE", "deprecation", {}, None),
    ("PUT", "versions/{reference}/deprecation", {"reference": "v1"}, {"message": "old"}),
    ("DELETE", "versions/{reference}/deprecation", {"reference": "v1"}, None),
    ("PUT", "retention", {}, {"keep": 0, "ttl": 86400}),
    ("DELETE", "retention", {}, None),
    ("DELETE", "", {}, None),
    ("POST", "restore", {}, None),
    ("POST", "move", {}, {"to": "other/sql"}),
]


@pytest.fixture(autouse=True)
def _settings_are_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_control, "_TTL", 0.0)


@pytest.fixture
def team(hub: Running, adapter: Callable[..., Path]) -> Running:
    """A hub with two versions of an adapter, a tag, a branch and a commit; its namespaces have limits."""
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql", tag="prod"))
        registry.push(adapter(2), Ref("team/sql"))
    with closing(open_database(hub.settings)) as database:
        for namespace in ("team", "other"):
            accounts.set_namespace(database, Namespace(namespace, max_bytes=1 << 30))
    return hub


@pytest.fixture
def admin(team: Running) -> Tenant:
    tenant = Tenant(team, "root")
    tenant.token = team.make_token("root", "admin")
    assert tenant.post("/api/models/team/sql/branch/next", json={}).status_code == 200
    return tenant


@pytest.fixture
def state(team: Running) -> Callable[[], Any]:
    """Return everything that the hub keeps: its files, its index and its tables."""

    def state() -> Any:
        files = {
            path.relative_to(team.folder).as_posix(): path.read_bytes()
            for path in team.folder.rglob("*")
            if path.is_file() and ".db" not in path.name and "leases" not in path.parts
        }
        return files, [line for file in sorted(team.folder.glob("*.db")) for line in rows(file)]

    return state


def rows(file: Path) -> list[str]:
    """The rows of all tables of a database, but when a token was used and which requests have a turn."""
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        return [line for line in connection.iterdump() if not line.startswith(('INSERT INTO "tokens"', 'INSERT INTO "jobs"'))]


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in ("time", "created")}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_every_change_of_a_name_is_rehearsed_with_the_answer_of_the_change(admin: Tenant, state: Callable[[], Any]) -> None:
    statuses = []
    for method, path, values, body in STEPS:
        url = f"{API}/names/team/sql/{path.format(**values)}".rstrip("/")
        before = state()
        rehearsed = admin.request(method, f"{url}?dry_run=true", json=body)
        assert state() == before, (method, path)
        answer = admin.request(method, url, json=body)
        assert (rehearsed.status_code, timeless(rehearsed.json())) == (answer.status_code, timeless(answer.json())), (
            method,
            path,
        )
        assert (state() == before) == (answer.status_code >= 400), (method, path)
        statuses.append(answer.status_code)
    assert statuses.count(400) == 2
    assert set(statuses) == {200, 400}


def test_every_route_that_rehearses_is_tried_and_every_other_change_refuses_to(admin: Tenant, state: Callable[[], Any]) -> None:
    changing = [
        route for route in routes.routes() if isinstance(route, Route) and not {"GET", "HEAD"} & (route.methods or set())
    ]
    tried = {("POST", f"{NAME}/versions"), *((method, f"{NAME}/{path}".rstrip("/")) for method, path, *_ in STEPS)}
    values = {"namespace": "team", "repo": "sql", "account": "root", "ident": "1"}
    before = state()
    for route in changing:
        (method,) = route.methods or ()
        if (method, route.path) not in tried:
            answer = admin.request(method, f"{route.path.format(**values)}?dry_run=1", json={})
            assert (answer.status_code, answer.json()["where"]) == (400, "dry_run"), route.path
    assert state() == before
    assert tried <= {(method, route.path) for route in changing for method in route.methods or ()}


def test_a_version_is_rehearsed_before_its_files_are_there(
    team: Running, admin: Tenant, adapter: Callable[..., Path], state: Callable[[], Any]
) -> None:
    folder = AdapterFolder(adapter(3))
    manifest, target = folder.manifest("latest"), OciRegistry(team.url, admin.token, "team/sql")
    with team.registry() as registry:
        stored = registry.oci_manifest(registry.resolve(Ref("team/sql", number=1)))
    bodies = [{"manifest": version.raw.decode(), "tags": ["new"]} for version in (manifest, stored)]
    url, before = f"{API}/names/team/sql/versions", state()
    rehearsed = [admin.post(f"{url}?dry_run=true", json=body) for body in bodies]
    unknown = admin.post(f"{url}?dry_run=true", json={"tags": ["new"]})
    assert (unknown.status_code, unknown.json()["number"], unknown.json()["new"]) == (201, 3, True)
    assert admin.post(url, json=bodies[0]).json()["where"] == "team/sql"  # no blob was sent
    assert state() == before
    for layer in (*manifest.layers, manifest.config):
        target.put_blob(read_blob(folder, layer, pauses=()))
    made = [admin.post(url, json=body) for body in bodies]
    for rehearsal, change in zip(rehearsed, made, strict=True):
        assert (rehearsal.status_code, timeless(rehearsal.json())) == (change.status_code, timeless(change.json()))
    assert [version.status_code for version in made] == [201, 200]


def test_the_document_says_which_changes_can_be_rehearsed() -> None:
    operations = openapi.paths()
    for method, path, handler in routes._ROUTES:
        parameters = {parameter["name"] for parameter in operations[path][method.lower()]["parameters"]}
        assert ("dry_run" in parameters) == (method != "GET" and routes.rehearses(handler)), f"{method} {path}"


def test_what_a_client_may_not_do_it_may_not_rehearse(team: Running) -> None:
    reader = Tenant(team, "reader")
    assert reader.request("PUT", f"{API}/names/team/sql/tags/new?dry_run=true", json={"reference": "v1"}).status_code == 403


def test_a_rehearsal_counts_nothing_for_the_limits_of_a_namespace(
    team: Running, admin: Tenant, adapter: Callable[..., Path]
) -> None:
    with team.registry() as registry:
        count = len(queries.files(registry.index, "team"))
    with closing(open_database(team.settings)) as database:
        accounts.set_namespace(database, Namespace("other", max_files=count))
    assert admin.post(f"{API}/names/team/sql/move?dry_run=true", json={"to": "other/sql"}).status_code == 200
    admin.name = "other"
    admin.create("new")
    assert admin.upload("new", adapter(3)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("POST", "tags/prod/promotion", {"reference": "v2"}), ("PUT", "tags/prod", {"reference": "v2"})],
)
def test_a_rehearsal_scans_files_without_a_lock(
    method: str, path: str, body: Any, tmp_path: Path, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other client waited until a version of many gigabytes was scanned."""
    policy = Policy("the hub", promotions=(TagRules("prod", "the hub", scan="clean"),))
    scan, locked = version_facts.first_stored_problem, list[str]()

    with serving(tmp_path / "hub", policy=policy) as strict:
        with strict.registry() as registry:
            for seed in (1, 2):
                registry.push(adapter(seed), Ref("team/sql"))

        def watched_scan(store: Store, manifest: Manifest) -> str:
            for file in strict.folder.glob("*.db"):
                with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as connection:
                    try:
                        connection.execute("BEGIN IMMEDIATE")
                    except sqlite3.OperationalError:
                        locked.append(file.name)
            return scan(store, manifest)

        monkeypatch.setattr(tag_requirements, "first_stored_problem", watched_scan)
        writer = Sending(strict.url, strict.token)
        answer = writer.ask(method, f"{API}/names/team/sql/{path}?dry_run=true", body)
        assert (answer.status, locked) == (200, [])


def test_a_client_does_not_ask_a_hub_to_rehearse_that_would_make_the_change(
    team: Running, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "DRY_RUN", "nothing")  # what it says of itself, as an older hub
    address = f"{team.url.replace('http', 'hub+http', 1)}/team/sql"
    error = run("rm", address, "--dry-run", env={"HF_TOKEN": team.token, "HF_ENDPOINT": team.url}, code=6).stderr
    assert "cannot try a change without making it" in error
    assert json.loads(run("list", address, "--json").stdout)["adapters"]


COMMANDS = """
tag team/sql:v1 stable
tag team/sql:stable --protect
deprecate team/sql:v1 old
rollback team/sql:prod
rollback team/sql:prod => 3
approve team/sql:v1 --for prod -m read
withdraw team/sql:v2 -m leaked
withdraw team/sql:v2 --undo
tag team/sql:stable --unprotect
rm team/sql:stable
keep team/sql --tagged
rm team/sql
restore team/sql
mv team/sql team/new
"""
PLANS = {"promote", "pull", "push"}  # say what would be moved, and which requirements are met, in their own words


def test_every_command_with_a_remote_that_changes_something_can_be_tried_there() -> None:
    tried = {line.split()[0] for line in COMMANDS.strip().splitlines()}
    assert {name for name, command in leaves().items() if {"--dry-run", "--remote"} <= flags(command)} == tried | PLANS


def test_a_command_that_is_tried_at_a_hub_answers_as_the_real_one_and_changes_nothing(
    team: Running, admin: Tenant, run: Run, state: Callable[[], Any]
) -> None:
    with team.registry() as registry:
        registry.tag(Ref("team/sql", number=2), "prod")
    env = {"HF_ENDPOINT": team.url, "HF_TOKEN": admin.token}
    run("remote", "add", "hub", team.url.replace("http", "hub+http", 1), "--default")
    for line in COMMANDS.strip().splitlines():
        words, _, code = line.partition(" => ")
        before = state()
        tried = run(*words.split(), "--dry-run", "--json", "--remote", env=env, code=int(code or 0)).stdout
        assert state() == before, line
        real = json.loads(run(*words.split(), "--json", "--remote", env=env, code=int(code or 0)).stdout)
        assert timeless(json.loads(tried)) == timeless(real if code else {**real, "dry_run": True}), line


def test_the_command_that_undoes_a_rename_at_a_hub_is_named_and_undoes_it(team: Running, run: Run) -> None:
    env = {"HF_ENDPOINT": team.url, "HF_TOKEN": team.token}
    place = team.url.replace("http", "hub+http", 1)
    run("remote", "add", "hub", place)
    run("remote", "add", "team", f"{place}/team")
    before = run("list", "--json", "--remote", "hub", env=env).stdout
    for words in (
        ("team/sql", "team/new", "--remote", "hub"),
        ("sql", "team/new", "--remote", "team"),
        (f"{place}/team/sql", "team/new"),
    ):
        text = run("mv", *words, env=env).stdout
        assert "team/sql is now team/new, with 2 versions; team/sql leads there; `adapterhub mv" in text
        run(*text.split("`")[1].split()[1:], env=env)
        assert timeless(json.loads(run("list", "--json", "--remote", "hub", env=env).stdout)) == timeless(json.loads(before))
