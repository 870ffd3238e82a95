"""Promotions, approvals, rollbacks and withdrawals at a hub: one decider for every way to a tag, and 410 for the withdrawn."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from starlette.routing import Route

from adapterhub.digest import sha256_bytes
from adapterhub.hub import publishing
from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.api import release_changes
from adapterhub.hub.app import api_routes
from adapterhub.hub.hub import Hub
from adapterhub.hub.web import routes as web
from adapterhub.index import queries
from adapterhub.manifest.oci_manifest import MANIFEST_TYPE
from adapterhub.project import settings_file
from adapterhub.ref import Ref
from adapterhub.trust import bundle, keys, release_claims, statement
from tests.conftest import Run
from tests.hub.conftest import Running, serving
from tests.hub.sending import Sending, lines_of
from tests.support.adapters import Make
from tests.support.registry import docker_config

SQL = Ref.parse("team/sql")
NAME = "/api/adapterhub/v1/names/team/sql"
RULES = "[promote.prod.require]\napprovals = 1\nfrom_others = true\n"


@contextmanager
def releasing(folder: Path, make: Make, **places: Any) -> Iterator[Running]:
    """A hub whose operator has requirements on prod, with two versions by alice, the first of which is prod."""
    policy = settings_file.parse(RULES, folder / "adapterhub.toml").policy
    with serving(folder / "hub", policy=policy, **places) as running:
        with running.registry() as registry:
            registry.author = "alice"
            for seed in (1, 2):
                registry.push(make(f"a{seed}", seed), SQL)
            registry.tag(Ref("team/sql", number=1), "prod")
        yield running


@pytest.fixture
def hub(tmp_path: Path, make: Make) -> Iterator[Running]:
    """A hub in a folder."""
    with releasing(tmp_path, make) as running:
        yield running


def ask(hub: Running, method: str, path: str, body: Any = None, *, token: str = "", kind: str = "application/json") -> Any:
    """Send a request; return its status, and its JSON if it has any."""
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=30)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {token or hub.token}", "content-type": kind}
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    raw = response.read()
    connection.close()
    try:
        return response.status, json.loads(raw)
    except ValueError:
        return response.status, raw


def prod(hub: Running) -> int:
    with hub.registry() as registry:
        return queries.tags(registry.index, "team/sql").get("prod", 0)


def digest(hub: Running, number: int) -> str:
    with hub.registry() as registry:
        return str(registry.row(Ref("team/sql", number=number)).digest)


def test_a_version_is_promoted_once_an_other_account_has_approved_it(hub: Running) -> None:
    bob = hub.make_token("bob", "write")
    promotion = {"reference": "v2", "message": "reviewed"}
    status, answer = ask(hub, "GET", f"{NAME}/tags/prod/promotion?reference=v2")
    (requirement,) = answer["requirements"]
    assert (status, answer["ok"], requirement["value"]) == (200, False, "0 of 1")
    status, answer = ask(hub, "POST", f"{NAME}/tags/prod/promotion", promotion)
    assert (status, answer["kind"], answer["code"], prod(hub)) == (400, "refused", "requirements-unmet", 1)
    for token in ("", bob):
        assert ask(hub, "POST", f"{NAME}/versions/v2/approvals", {"tag": "prod", "message": "read it"}, token=token)[0] == 200
    status, answer = ask(hub, "GET", f"{NAME}/tags/prod/promotion?reference=v2", token=bob)
    reasons = "alice (pushed, signed or moves it), bob (pushed, signed or moves it)"
    assert answer["requirements"][0]["value"] == f"0 of 1; not counted: {reasons}"
    status, answer = ask(hub, "POST", f"{NAME}/tags/prod/promotion", promotion)
    assert (status, answer["moved"], answer["current"], prod(hub)) == (200, True, 2, 2)
    with hub.registry() as registry:
        entry = registry.log(Ref.parse("team/sql:prod"))[0]
    assert (entry.author, entry.message) == ("alice", "reviewed")
    status, answer = ask(hub, "POST", f"{NAME}/tags/prod/rollback", {"message": "wrong dates"})
    assert (status, answer["current"]["number"], answer["left"]["number"], prod(hub)) == (200, 1, 2, 1)


def test_who_has_proposed_a_version_does_not_approve_it(hub: Running) -> None:
    """Nor who has added a commit to the proposal; a squash of `main` changes nothing."""
    ada, bob, cy, dora = (Sending(hub.url, hub.make_token(name, "write")) for name in ("ada", "bob", "cy", "dora"))
    for author, revision, text in ((ada, "main", b"# One\n"), (bob, "refs%2Fpr%2F1", b"# Two\n")):
        answer = author.ask("POST", f"/api/models/team/sql/commit/{revision}?create_pr=1", lines_of({"README.md": text}))
        assert answer.status == 200
    assert cy.ask("POST", f"{NAME}/proposals/1/acceptance", {}).json()["version"] == "team/sql:v3"
    for person in (ada, bob):
        assert person.ask("POST", f"{NAME}/versions/v3/approvals", {"tag": "prod", "message": "mine"}).status == 200
    (requirement,) = cy.ask("GET", f"{NAME}/tags/prod/promotion?reference=v3").json()["requirements"]
    assert requirement["value"].startswith("0 of 1")
    assert ada.ask("POST", "/api/models/team/sql/super-squash/main", {}).status == 200
    (requirement,) = cy.ask("GET", f"{NAME}/tags/prod/promotion?reference=v3").json()["requirements"]
    assert "ada (pushed, signed or moves it)" in requirement["value"]
    assert dora.ask("POST", f"{NAME}/versions/v3/approvals", {"tag": "prod", "message": "read it"}).status == 200
    assert cy.ask("POST", f"{NAME}/tags/prod/promotion", {"reference": "v3"}).status == 200


@pytest.mark.parametrize("kind", [access_tokens.DEPLOY, access_tokens.EXCHANGE])
def test_a_program_with_a_token_of_an_account_is_not_a_person_who_approves(kind: str, hub: Running, tmp_path: Path) -> None:
    token = hub.make_token("bob", "write", kind=kind, namespaces=["team"], lifetime=3600)
    status, answer = ask(hub, "POST", "/api/adapterhub/v1/account/tokens", {"name": "more", "role": "write"}, token=token)
    assert status == 201
    path, body = f"{NAME}/versions/v2/approvals", {"tag": "prod", "message": "read it"}
    for program in (token, answer["token"]):
        status, refusal = ask(hub, "POST", path, body, token=program)
        assert (status, "this is a token of a program" in refusal["error"]) == (400, True)
    keys.generate(tmp_path / "cy")
    key = keys.read_private(tmp_path / "cy.key")
    claim = release_claims.sign(release_claims.APPROVAL, "team/sql", digest(hub, 2), key, text="read it", tag="prod")
    assert ask(hub, "POST", path, {**body, "bundle": claim.decode()}, token=token)[0] == 200
    answer = ask(hub, "GET", f"{NAME}/tags/prod/promotion?reference=v2")[1]
    assert answer["requirements"][0]["value"].startswith("0 of 1")  # the key is no approver here
    assert "bob" not in answer["requirements"][0]["value"]


def test_a_page_of_a_log_ends_where_its_messages_are_too_many(hub: Running) -> None:
    body = {"tag": "prod", "message": "x" * 900, "bundle": "{" * 60_000}
    for number in range(30):
        path = f"{NAME}/versions/v2/approvals"
        assert ask(hub, "POST", path, {**body, "tag": f"t{number}"})[0] == 200
    page = ask(hub, "GET", f"{NAME}/log")[1]
    assert len(json.dumps(page)) < 2 << 20
    assert 10 < len(page["entries"]) < 20
    older_entries = ask(hub, "GET", f"{NAME}/log?cursor={page['entries'][-1]['seq']}")[1]["entries"]
    assert older_entries[0]["seq"] == page["entries"][-1]["seq"] - 1


def test_who_may_only_read_releases_nothing(hub: Running) -> None:
    eve = hub.make_token("eve", "read")
    for method, path in (
        ("POST", "tags/prod/promotion"),
        ("POST", "tags/prod/rollback"),
        ("POST", "versions/v2/approvals"),
        ("PUT", "versions/v2/withdrawal"),
        ("DELETE", "versions/v2/withdrawal"),
    ):
        assert ask(hub, method, f"{NAME}/{path}", {"message": "x"}, token=eve)[0] == 403, path


def test_a_network_without_a_token_compares_only_so_many_versions(hub: Running) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=30)
    statuses = []
    for _ in range(22):
        connection.request("GET", f"{NAME}/tags/prod/promotion?reference=v2")
        response = connection.getresponse()
        response.read()
        statuses.append(response.status)
    connection.close()
    assert statuses == [200] * 20 + [429] * 2
    assert ask(hub, "GET", f"{NAME}/tags/prod/promotion?reference=v2")[0] == 200


# ---- no way around


def writing_routes() -> Iterator[tuple[str, str]]:
    """Method and path of every route that may set something."""
    for route in [*api_routes(), *web.routes()]:
        if isinstance(route, Route):
            yield from ((method, route.path) for method in sorted(route.methods or ()) if method in ("PUT", "POST", "PATCH"))


def test_no_route_that_writes_leads_the_tag_to_a_version_that_is_not_approved(hub: Running) -> None:
    """Found by looking: each route is asked with names and bodies that would move the tag, its branch or its manifest."""
    with hub.registry() as registry:
        manifest = registry.oci_manifest(registry.resolve(Ref("team/sql", number=2))).raw
        first_manifest = json.loads(registry.oci_manifest(registry.resolve(Ref("team/sql", number=1))).raw)
    first, second = digest(hub, 1), digest(hub, 2)
    parameters = {
        "namespace": ["team"], "repo": ["sql"], "name": ["team/sql"], "tag": ["prod"], "branch": ["prod"],
        "revision": ["v2", "prod", "main"], "reference": ["prod", "v2", second], "path": ["README.md"],
    }  # fmt: skip
    fields = {
        "reference": "v2", "tag": "prod", "tags": ["prod"], "startingPoint": "v2", "message": "x", "seq": 2, "branch": "prod",
        "manifest": manifest.decode(), "fromRepo": "team/sql", "toRepo": "team/new", "name": "sql", "organization": "team",
    }  # fmt: skip
    lines = [{"key": "header", "value": {"summary": "x"}}]
    lines += [{"key": "file", "value": {"path": "README.md", "content": "eA==", "encoding": "base64"}}]
    commit = b"\n".join(json.dumps(line).encode() for line in lines)
    bodies = [(json.dumps(fields).encode(), "application/json"), (commit, "application/x-ndjson"), (manifest, MANIFEST_TYPE)]
    image = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": {}, "layers": []}).encode()
    bodies.append((image, MANIFEST_TYPE))
    accepted_count = 0
    for method, template in writing_routes():
        paths = set()
        for choice in range(3):
            path = template.replace(":path}", "}")
            for key, values in parameters.items():
                path = path.replace(f"{{{key}}}", quote(values[choice % len(values)], safe="/:"))
            paths |= {path} if "team" in path or "repos" in path else set()
        for path in paths:
            if "{" in path:
                continue  # a session or a file, which leads to no tag
            for body, kind in bodies:
                accepted_count += ask(hub, method, f"{path}?tag=prod", body, kind=kind)[0] < 500
        status, answer = ask(hub, "GET", "/api/models/team/sql/revision/prod")
        assert status in (404, 410) or answer["sha"] == first.removeprefix("sha256:")[:40], (method, template)
        status, answer = ask(hub, "GET", "/v2/team/sql/manifests/prod")
        assert status in (404, 410) or answer == first_manifest, (method, template)
    assert accepted_count > 60


WAYS: dict[str, Callable[[Running, bytes], Any]] = {
    "a tag by the API": lambda hub, _: ask(hub, "PUT", f"{NAME}/tags/prod", {"reference": "v2"}),
    "a push by the API": lambda hub, raw: ask(hub, "POST", f"{NAME}/versions", {"manifest": raw.decode(), "tags": ["prod"]}),
    "an OCI tag": lambda hub, raw: ask(hub, "PUT", "/v2/team/sql/manifests/prod", raw, kind=MANIFEST_TYPE),
    "OCI tags of a digest": lambda hub, raw: ask(
        hub, "PUT", f"/v2/team/sql/manifests/{digest(hub, 2)}?tag=prod", raw, kind=MANIFEST_TYPE
    ),
}
FREE_WAYS: dict[str, Callable[[Running], Any]] = {
    "a branch of hf": lambda hub: ask(hub, "POST", "/api/models/team/sql/branch/prod", {"startingPoint": "main"}),
    "a tag of hf": lambda hub: ask(hub, "POST", "/api/models/team/sql/tag/main", {"tag": "prod"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_known_way_is_refused_by_the_decider(way: str, hub: Running) -> None:
    with hub.registry() as registry:
        raw = registry.oci_manifest(registry.resolve(Ref("team/sql", number=2))).raw
    status, answer = WAYS[way](hub, raw)
    assert status in (400, 403)
    assert "approvals: 0 of 1" in json.dumps(answer)
    assert prod(hub) == 1


@pytest.mark.parametrize("way", ["a push by the API", "an OCI tag"])
def test_a_new_version_that_is_refused_leaves_no_bytes(way: str, hub: Running) -> None:
    with hub.registry() as registry:
        manifest = json.loads(registry.oci_manifest(registry.resolve(Ref("team/sql", number=2))).raw)
        before = {path for path in registry.store.root.rglob("*") if path.is_file()}
    raw = json.dumps({**manifest, "annotations": {"note": "new"}}).encode()
    status, answer = WAYS[way](hub, raw)
    assert (status in (400, 403), "approvals: 0 of 1" in json.dumps(answer)) == (True, True)
    with hub.registry() as registry:
        after = {path for path in registry.store.root.rglob("*") if path.is_file()}
        assert after == before
        assert registry.store.size(sha256_bytes(raw)) is None
    assert prod(hub) == 1


@pytest.mark.parametrize("way", FREE_WAYS)
def test_a_new_branch_or_tag_of_hf_is_decided_too_and_goes_where_the_tag_goes(way: str, hub: Running) -> None:
    with hub.registry() as registry:
        registry.rm(Ref.parse("team/sql:prod"))
    status, answer = FREE_WAYS[way](hub)
    assert (status, "approvals: 0 of 1" in json.dumps(answer), prod(hub)) == (400, True, 0)
    bob = hub.make_token("bob", "write")
    assert ask(hub, "POST", f"{NAME}/versions/v2/approvals", {"tag": "prod", "message": "fine"}, token=bob)[0] == 200
    assert FREE_WAYS[way](hub)[0] == 200
    assert prod(hub) == 2


def test_a_name_whose_tag_has_requirements_is_not_renamed_away_from_its_evidence(hub: Running) -> None:
    body = {"fromRepo": "team/sql", "toRepo": "team/new"}
    status, answer = ask(hub, "POST", "/api/repos/move", body)
    assert (status, "the evidence for its version stays with the old name" in answer["error"]) == (400, True)
    assert ask(hub, "DELETE", f"{NAME}/tags/prod")[0] == 200
    status, answer = ask(hub, "POST", "/api/repos/move", body)
    assert (status, "what it meant stays with the old name" in answer["error"]) == (400, True)
    assert ask(hub, "POST", "/api/repos/move", body, token=hub.make_token("root", "admin"))[0] == 200


# ---- withdrawal


def test_a_withdrawn_version_is_answered_410_with_the_reason_on_every_way_out(hub: Running) -> None:
    first, weights = digest(hub, 1), "adapter_model.safetensors"
    with hub.registry() as registry:
        layers = registry.oci_manifest(registry.resolve(Ref("team/sql", number=1))).layers
    blob = next(layer.digest for layer in layers if layer.path == weights)
    status, answer = ask(hub, "PUT", f"{NAME}/versions/v1/withdrawal", {"message": "a leaked key"})
    assert (status, answer["withdrawn"][0]["tags"], answer["withdrawn"][0]["latest"]) == (200, ["prod"], 2)
    for path in (
        "/v2/team/sql/manifests/prod",
        f"/v2/team/sql/manifests/{first}",
        f"/v2/team/sql/blobs/{blob}",
        f"/team/sql/resolve/prod/{weights}",
        f"/team/sql/resolve/{first.removeprefix('sha256:')[:40]}/{weights}",
        f"{NAME}/tags/prod",
        "/api/models/team/sql/revision/prod",
        "/api/models/team/sql/tree/prod",
    ):
        status, answer = ask(hub, "GET", path)
        assert (status, b"a leaked key" in json.dumps(answer).encode()) == (410, True), path
    assert ask(hub, "GET", f"/team/sql/resolve/main/{weights}")[0] == 200
    assert ask(hub, "GET", f"{NAME}/log")[0] == 200
    status, answer = ask(hub, "POST", f"{NAME}/tags/prod/promotion", {"reference": "v1"})
    assert (status, answer["code"]) == (410, "withdrawn")
    assert ask(hub, "DELETE", f"{NAME}/versions/v1/withdrawal")[0] == 200
    assert ask(hub, "GET", "/v2/team/sql/manifests/prod")[0] == 200


def test_a_manifest_that_is_no_version_lets_out_no_file_that_was_withdrawn(hub: Running) -> None:
    with hub.registry() as registry:
        layers = registry.oci_manifest(registry.resolve(Ref("team/sql", number=1))).layers
    weights = next(layer for layer in layers if layer.path == "adapter_model.safetensors")
    assert ask(hub, "PUT", f"{NAME}/versions/v1/withdrawal", {"message": "a leaked key"})[0] == 200
    blob = {"mediaType": "application/octet-stream", "digest": weights.digest, "size": weights.size}
    image = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": blob, "layers": [blob]}
    status, _ = ask(hub, "PUT", "/v2/team/sql/manifests/image", json.dumps(image).encode(), kind=MANIFEST_TYPE)
    assert status == 201
    assert ask(hub, "GET", f"/v2/team/sql/blobs/{weights.digest}")[0] == 410


def test_the_mended_version_has_files_of_those_that_were_withdrawn(
    hub: Running, run: Run, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients ask whether a file is there before they send it, and gave up at 410."""
    with hub.registry() as registry:
        layers = registry.oci_manifest(registry.resolve(Ref("team/sql", number=1))).layers
    for number in (1, 2):
        assert ask(hub, "PUT", f"{NAME}/versions/v{number}/withdrawal", {"message": "a leaked key"})[0] == 200
    shared = next(layer.digest for layer in layers if layer.path == "adapter_config.json")
    reader = hub.make_token("eve", "read")
    path = f"/v2/team/sql/blobs/{shared}"
    assert [ask(hub, "HEAD", path, token=token)[0] for token in ("", reader)] == [200, 410]
    assert [ask(hub, "GET", path, token=token)[0] for token in ("", reader)] == [410, 410]
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    run("push", make("mended", 3), f"{hub.url.replace('http://', 'hub+http://')}/team/sql")
    assert [ask(hub, "GET", path, token=token)[0] for token in ("", reader)] == [200, 200]


def test_no_manifest_of_another_card_brings_back_weights_that_were_withdrawn(
    hub: Running, run: Run, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As no commit does."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    address = f"{hub.url.replace('http://', 'hub+http://')}/team/sql"
    with hub.registry() as registry:
        layers = registry.oci_manifest(registry.resolve(Ref("team/sql", number=1))).layers
    weights = next(layer.digest for layer in layers if layer.path == "adapter_model.safetensors")
    assert ask(hub, "PUT", f"{NAME}/versions/v1/withdrawal", {"message": "a leaked key"})[0] == 200
    folder = make("again", 1)
    (folder / "README.md").write_text("# Another card\n")
    error = run("push", folder, address, code=6).stderr
    assert "v1 was withdrawn: a leaked key. Use other weights, or ask an admin of the namespace to push these" in error
    path = f"/v2/team/sql/blobs/{weights}"
    assert [ask(hub, method, path, token=hub.make_token("eve", "read"))[0] for method in ("GET", "HEAD")] == [410, 410]


@pytest.mark.parametrize("protocol", ["hub", "oci"])
def test_an_admin_publishes_withdrawn_weights_again_with_another_card(
    protocol: str, hub: Running, run: Run, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was withdrawn may have been a secret in the card."""
    address, token = f"{hub.url.replace('http', f'{protocol}+http')}/team/sql", hub.make_token("root", "admin")
    config = docker_config(tmp_path / "docker", urlsplit(hub.url).netloc, token)
    environment = {"HF_TOKEN": token, "HF_ENDPOINT": hub.url, "DOCKER_CONFIG": str(config.parent)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ask(hub, "PUT", f"{NAME}/versions/v1/withdrawal", {"message": "a password in the card"})[0] == 200
    folder = make("again", 1)
    run("push", folder, address, code=6)
    (folder / "README.md").write_text("# Another card\n")
    run("push", folder, address)
    assert ask(hub, "GET", "/team/sql/resolve/main/README.md")[0] == 200
    assert ask(hub, "GET", "/v2/team/sql/manifests/v1")[0] == 410


def test_no_commit_brings_back_weights_that_were_withdrawn_by_another_name(hub: Running) -> None:
    with hub.registry() as registry:
        layers = registry.oci_manifest(registry.resolve(Ref("team/sql", number=1))).layers
    weights = next(layer for layer in layers if layer.path == "adapter_model.safetensors")
    assert ask(hub, "PUT", f"{NAME}/versions/v1/withdrawal", {"message": "a leaked key"})[0] == 200
    writer, reader = (Sending(hub.url, hub.make_token(*role)) for role in (("bob", "write"), ("eve", "read")))
    lines = lines_of({}, {"notes.txt": (weights.digest.removeprefix("sha256:"), weights.size)})
    for sender, query in ((writer, ""), (reader, "?create_pr=1")):
        assert sender.ask("POST", f"/api/models/team/sql/commit/main{query}", lines).status == 410
    assert reader.ask("GET", f"/v2/team/sql/blobs/{weights.digest}").status == 410


def test_an_address_that_was_signed_before_leads_nowhere_once_the_version_is_withdrawn_or_hidden(hub: Running) -> None:
    with hub.registry() as registry:
        files = {
            number: next(
                layer
                for layer in registry.oci_manifest(registry.resolve(Ref("team/sql", number=number))).layers
                if layer.path == "adapter_model.safetensors"
            )
            for number in (1, 2)
        }
    objects = [{"oid": file.digest.removeprefix("sha256:"), "size": file.size} for file in files.values()]
    eve = hub.make_token("eve", "read", namespaces=["others"])
    answer = ask(hub, "POST", "/team/sql.git/info/lfs/objects/batch", {"operation": "download", "objects": objects}, token=eve)
    first, second = (item["actions"]["download"]["href"].removeprefix(hub.url) for item in answer[1]["objects"])
    assert [ask(hub, "GET", address)[0] for address in (first, second)] == [200, 200]
    assert ask(hub, "PUT", f"{NAME}/versions/v1/withdrawal", {"message": "a leaked key"})[0] == 200
    assert [ask(hub, "GET", address)[0] for address in (first, second)] == [410, 200]
    assert ask(hub, "PUT", "/api/models/team/sql/settings", {"private": True})[0] == 200
    assert [ask(hub, "GET", address)[0] for address in (first, second)] == [404, 404]


def test_a_signed_version_is_withdrawn_by_its_signer_or_an_admin(hub: Running, tmp_path: Path) -> None:
    for name in ("release", "other"):
        keys.generate(tmp_path / name)
    private, other_key = (keys.read_private(tmp_path / f"{name}.key") for name in ("release", "other"))
    with hub.registry() as registry:
        manifest = registry.oci_manifest(registry.resolve(Ref("team/sql", number=2)))
        files = {layer.path: layer.digest for layer in manifest.layers}
        registry.store.signatures.add(manifest.digest, bundle.sign(statement.Statement("team/sql", files), private), 10)

    def claimed(key: keys.PrivateKey) -> dict[str, str]:
        claim = release_claims.sign(release_claims.WITHDRAWAL, "team/sql", manifest.digest, key, text="x")
        return {"message": "x", "bundle": claim.decode(), "key": key.public.pem.decode()}

    path, admin = f"{NAME}/versions/v2/withdrawal", hub.make_token("root", "admin")
    for body in ({"message": "x"}, claimed(other_key)):
        status, answer = ask(hub, "PUT", path, body)
        assert (status, answer["code"]) == (400, "signed-version")
    assert ask(hub, "PUT", path, claimed(private))[0] == 200
    assert ask(hub, "DELETE", path)[1]["code"] == "signed-version"
    assert ask(hub, "DELETE", path, token=admin)[0] == 200
    assert ask(hub, "PUT", path, {"message": "x"}, token=admin)[0] == 200


def test_everywhere_is_every_name_that_the_account_may_change(hub: Running, make: Make, tmp_path: Path) -> None:
    with hub.registry() as registry:
        for name in ("team/copy", "others/copy", "a/signed"):
            manifest = registry.oci_manifest(registry.push(make("a1", 1), Ref.parse(name)))
    keys.generate(tmp_path / "release")
    files = {layer.path: layer.digest for layer in manifest.layers}
    signature = bundle.sign(statement.Statement("signed", files), keys.read_private(tmp_path / "release.key"))
    with closing(Hub(hub.settings)) as opened:
        publishing.attach_signature(opened.workers.worker(), "a/signed", manifest, signature)
    status, answer = ask(hub, "PUT", f"{NAME}/versions/v1/withdrawal", {"message": "x", "everywhere": True})
    # Not the copy that somebody has signed, who would else decide about all of them.
    assert (status, answer["withdrawn"][0]["name"]) == (200, "team/sql")
    assert {item["name"] for item in answer["withdrawn"]} == {"team/sql", "team/copy", "others/copy"}


def test_a_writer_records_what_was_measured_of_a_version_and_so_often(hub: Running) -> None:
    path = f"{NAME}/versions/v2/evaluations"
    evaluation = {"name": "golden", "metrics": {"pass": 0.9}, "data": [], "base": {"tool": "promptfoo"}, "cases": {"a": 1.0}}
    assert ask(hub, "POST", path, evaluation, token=hub.make_token("rita", "read"))[0] == 403
    malformed: list[dict[str, object]] = [{}, {"name": "golden"}, {**evaluation, "metrics": {"a b": 1}}, {**evaluation, "x": 1}]
    malformed += [{**evaluation, "metrics": {"pass": "0.9"}}, {**evaluation, "name": "A"}, {**evaluation, "cases": {"a": None}}]
    malformed += [{**evaluation, "account": "bob"}, {**evaluation, "account": "alice"}]
    for document in malformed:
        assert ask(hub, "POST", path, document)[0] == 400, document
    assert ask(hub, "POST", path, {**evaluation, "base": {"tool": "x" * 200_000}})[0] == 413
    for _ in range(2):  # the same results are recorded once
        assert ask(hub, "POST", path, evaluation)[0] == 200
    _, version = ask(hub, "GET", f"{NAME}/versions/v2")
    assert version["evaluations"] == [{**evaluation, "account": "alice"}]
    for number in range(2, release_changes._MAX_EVALUATIONS + 1):
        assert ask(hub, "POST", path, {**evaluation, "metrics": {"pass": 1 / number}})[0] == 200
    status, answer = ask(hub, "POST", path, {**evaluation, "metrics": {"pass": 1.0}})
    assert (status, "100 times, which is the limit" in json.dumps(answer)) == (400, True)
    assert ask(hub, "PUT", f"{NAME}/versions/v2/withdrawal", {"message": "a leaked key"})[0] == 200
    assert ask(hub, "POST", path, evaluation)[0] == 410


# ---- the commands


def test_the_commands_work_at_a_hub(hub: Running, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    address = hub.url.replace("http://", "hub+http://")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    result = run("promote", f"{address}/team/sql@v2", "prod", code=6)
    assert "MISSING" in result.stdout
    ask(hub, "POST", f"{NAME}/versions/v2/approvals", {"tag": "prod", "message": "x"}, token=hub.make_token("bob", "write"))
    assert run("approve", f"{address}/team/sql@v2", "--for", "prod", "-m", "read it").stdout.endswith("is approved for prod\n")
    assert run("promote", f"{address}/team/sql@v2", "prod").stdout.endswith("team/sql:prod is team/sql:v2\n")
    back = run("rollback", f"{address}/team/sql@prod", "-m", "wrong")
    assert back.stdout == "team/sql:prod is team/sql:v1 again, and was v2\n"
    run("lock", f"{address}/team/sql@v2")
    assert "team/sql:v2 is withdrawn: leaked" in run("withdraw", f"{address}/team/sql@v2", "-m", "leaked").stdout
    listed = json.loads(run("list", f"{address.replace('hub+', 'oci+')}/team/sql", "--json").stdout)["adapters"]
    assert {row["tags"][0]: row["kind"] for row in listed}["v2"] == "withdrawn"
    failed = run("pull", f"{address}/team/sql@v2", "-o", "out", code=6)
    assert "was withdrawn" in failed.stderr
    assert "[withdrawn]" in failed.stderr
    for words in (["lock", "--check"], ["pull", "--locked"]):
        assert "[withdrawn]" in run(*words, code=6).stderr
    assert run("withdraw", f"{address}/team/sql@v2", "--undo").stdout == "team/sql:v2 can be used again\n"


def card_commit(hub: Running) -> tuple[int, Any]:
    lines = [
        {"key": "header", "value": {"summary": "another card"}},
        {"key": "file", "value": {"path": "README.md", "encoding": "base64", "content": "IyBDYXJkCg=="}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    answer: tuple[int, Any] = ask(hub, "POST", "/api/models/team/sql/commit/main", body, kind="application/x-ndjson")
    return answer


def test_a_commit_gives_out_no_weights_that_are_only_in_withdrawn_versions(hub: Running) -> None:
    for number in (2, 1):
        assert ask(hub, "PUT", f"{NAME}/versions/v{number}/withdrawal", {"message": "a leaked key"})[0] == 200
    status, answer = card_commit(hub)
    assert (status, b"a leaked key" in json.dumps(answer).encode()) == (410, True)
    with hub.registry() as registry:
        assert queries.tags(registry.index, "team/sql")["latest"] == 1
    assert ask(hub, "DELETE", f"{NAME}/versions/v1/withdrawal")[0] == 200
    assert card_commit(hub)[0] == 200


def test_only_who_withdrew_a_version_or_an_admin_undoes_it(hub: Running) -> None:
    path, admin, bob = f"{NAME}/versions/v2/withdrawal", hub.make_token("root", "admin"), hub.make_token("bob", "write")
    for withdraws, refused, undoes in ((admin, bob, admin), (bob, "", bob), (bob, "", admin)):
        assert ask(hub, "PUT", path, {"message": "a leaked key"}, token=withdraws)[0] == 200
        status, answer = ask(hub, "DELETE", path, token=refused)
        assert (status, answer["code"]) == (400, "withdrawn-by-another")
        assert ask(hub, "GET", "/v2/team/sql/manifests/v2")[0] == 410
        assert ask(hub, "DELETE", path, token=undoes)[0] == 200


@pytest.mark.parametrize("kind", [access_tokens.DEPLOY, access_tokens.EXCHANGE])
def test_a_program_that_moves_a_tag_may_be_used_by_one_of_those_who_approved(kind: str, hub: Running) -> None:
    program = hub.make_token("dora", "write", kind=kind, namespaces=["team"], lifetime=3600)
    approve = {"tag": "prod", "message": "read it"}
    for account, count in (("bob", "0 of 1"), ("cy", "1 of 1")):
        token = hub.make_token(account, "write")
        assert ask(hub, "POST", f"{NAME}/versions/v2/approvals", approve, token=token)[0] == 200
        answer = ask(hub, "GET", f"{NAME}/tags/prod/promotion?reference=v2", token=program)[1]
        assert answer["requirements"][0]["value"].startswith(count)
        assert "one of them, as a program moves the tag" in answer["requirements"][0]["value"]
        status = ask(hub, "POST", f"{NAME}/tags/prod/promotion", {"reference": "v2"}, token=program)[0]
        assert (status, prod(hub)) == ((400, 1) if account == "bob" else (200, 2))
