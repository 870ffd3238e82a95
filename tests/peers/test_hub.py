"""Every client of the Hugging Face Hub works with our hub, unmodified: pushes, pulls, names, removes, and is told why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.repository_documents import commit_id
from tests.hub.conftest import Running, serving
from tests.support.adapters import write_adapter, write_large_adapter
from tests.support.hub_clients import HubClient, JavaScriptClient
from tests.support.proxy import Exchange, Proxy

pytestmark = pytest.mark.peer
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Running]:
    """Our hub, empty."""
    with serving(tmp_path / "served") as running:
        yield running


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose weights are too large for a commit."""
    return write_large_adapter(tmp_path_factory.mktemp("large") / "sql")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A tiny adapter."""
    return write_adapter(tmp_path / "small", 1)


def sends_xet(client: HubClient) -> bool:
    """Whether a client uploads by Xet where the hub does not choose: since 1.20, with hf-xet."""
    return client.xet is not None and client.version not in ("0.36.2", "1.16.4")


def as_user(hub: Running, **variables: str) -> dict[str, str]:
    return {"HF_TOKEN": hub.token, **variables}


@contextmanager
def through(hub: Running) -> Iterator[tuple[Proxy, str]]:
    """A proxy in front of the hub, and its address."""
    with Proxy(hub.url.removeprefix("http://")) as proxy:
        yield proxy, f"http://{proxy.address}"


def assert_same_files(theirs: Path, ours: Path) -> None:
    """Assert that a client has every file of an adapter, byte for byte."""
    for path in ours.iterdir():
        assert (theirs / path.name).read_bytes() == path.read_bytes(), path.name


def api(client: HubClient, hub: Running, text: str, *words: object, url: str = "", code: int = 0) -> Any:
    """The value that a script leaves in `result`; it has an `api` and the `words`."""
    start = "import json, sys\nfrom huggingface_hub import *\nfrom huggingface_hub.errors import *\n"
    start += "api, words, result = HfApi(), sys.argv[1:], None\n"
    result = client.script(url or hub.url, f"{start}{text}\nprint(json.dumps(result))", *words, env=as_user(hub), code=code)
    return json.loads(result.stdout.splitlines()[-1])


def test_a_large_upload_is_the_version_that_a_push_of_it_would_be_and_comes_back(
    hf_client: HubClient, served: Running, large: Path, tmp_path: Path
) -> None:
    hf_client.hf(served.url, "upload", "team/sql", large, ".", env=as_user(served))
    digest = oci_manifest.build(large).digest
    with served.registry() as registry:
        assert registry.resolve(Ref("team/sql")).digest == digest
    xorbs = list((served.folder / ".adapterhub" / "tmp").glob("*.xorb"))
    assert bool(xorbs) == sends_xet(hf_client)
    hf_client.hf(served.url, "download", "team/sql", "--local-dir", tmp_path / "down", env=as_user(served))
    assert_same_files(tmp_path / "down", large)


def test_a_download_that_is_cut_goes_on_where_it_was(
    hf_client: HubClient, served: Running, large: Path, tmp_path: Path
) -> None:
    with served.registry() as registry:
        registry.push(large, Ref("team/sql"))
    cut = 10 << 20

    def fault(exchange: Exchange) -> None:
        if exchange.method == "GET" and exchange.path.endswith(WEIGHTS) and len(exchange.data) > cut:
            exchange.cut = cut

    with through(served) as (proxy, url):
        proxy.after = fault
        # 0.36 gives up, and goes on when it is run again; the others go on by themselves.
        hf_client.hf(url, "download", "team/sql", "--local-dir", tmp_path / "down", env=as_user(served), code=None)
        hf_client.hf(url, "download", "team/sql", "--local-dir", tmp_path / "down", env=as_user(served))
        gets = [exchange for exchange in proxy.exchanges if exchange.method == "GET" and exchange.path.endswith(WEIGHTS)]
    assert_same_files(tmp_path / "down", large)
    assert [(exchange.status, len(exchange.data)) for exchange in gets][1:] == [(206, (large / WEIGHTS).stat().st_size - cut)]


REPOSITORIES = """
name = api.create_repo("team/sql", exist_ok=True).repo_id
name = api.create_repo("team/sql", exist_ok=True).repo_id
first = api.upload_folder(folder_path=words[0], repo_id=name).oid
api.create_tag(name, tag="stable")
api.create_branch(name, branch="try")
refused = []
for again in (lambda: api.create_tag(name, tag="stable"), lambda: api.create_branch(name, branch="try")):
    try:
        again()
    except HfHubHTTPError as error:
        refused.append(error.response.status_code)
tried = api.upload_file(path_or_fileobj=b"# Try", path_in_repo="README.md", repo_id=name, revision="try").oid
refs = api.list_repo_refs(name)
found = {ref.name: ref.target_commit for ref in [*refs.branches, *refs.tags]}
api.delete_tag(name, tag="stable")
api.delete_branch(name, branch="try")
left = [ref.name for ref in api.list_repo_refs(name).branches]
api.delete_file("README.md", repo_id=name)
files = api.list_repo_files(name)
commits = [commit.commit_id for commit in api.list_repo_commits(name)]
api.move_repo(name, "team/text2sql")
moved = api.model_info(name).id
api.delete_repo("team/text2sql")
gone = not api.repo_exists("team/text2sql")
me = api.whoami()["name"]
result = {"first": first, "tried": tried, "refused": refused, "refs": found, "left": left, "files": files, "commits": commits,
          "moved": moved, "gone": gone, "me": me}
"""


def test_repositories_branches_and_tags_are_made_moved_and_removed(hf_client: HubClient, served: Running, small: Path) -> None:
    outcome = api(hf_client, served, REPOSITORIES, small)
    first, tried = outcome["first"], outcome["tried"]
    assert outcome["me"] == "alice"
    assert outcome["refused"] == [409, 409]
    assert outcome["refs"] == {"main": first, "try": tried, "stable": first, "v1": first, "v2": tried}
    assert outcome["left"] == ["main"]
    assert outcome["files"] == ["adapter.json", "adapter_config.json", WEIGHTS]
    assert outcome["commits"][-1] == first
    assert (outcome["moved"], outcome["gone"]) == ("team/text2sql", True)


def test_a_readme_alone_then_a_folder_in_place_of_everything(
    hf_client: HubClient, served: Running, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("# Soon\n")
    hf_client.hf(served.url, "upload", "team/sql", tmp_path / "README.md", "README.md", env=as_user(served))
    assert api(hf_client, served, "result = api.list_repo_files('team/sql')") == ["README.md"]
    (small / "README.md").unlink()
    (small / "notes.json").write_text("{}")
    hf_client.hf(served.url, "upload", "team/sql", small, ".", "--delete", "*", env=as_user(served))
    (small / "notes.json").unlink()
    hf_client.hf(served.url, "upload", "team/sql", small, ".", "--delete", "*", env=as_user(served))
    listed_files = api(hf_client, served, "result = api.list_repo_files('team/sql')")
    assert listed_files == ["adapter.json", "adapter_config.json", WEIGHTS]
    with served.registry() as registry:
        assert registry.resolve(Ref("team/sql")).digest == oci_manifest.build(small).digest


def test_a_private_repository_is_there_for_its_own_people_alone(
    hf_client: HubClient, served: Running, small: Path, tmp_path: Path
) -> None:
    hf_client.hf(served.url, "upload", "alice/secret", small, ".", "--private", env=as_user(served))
    assert api(hf_client, served, "result = api.model_info('alice/secret').private")
    for token in ("", served.make_token("eve", "read", namespaces=["eve"])):
        env = {"HF_TOKEN": token} if token else {}
        answer = hf_client.hf(served.url, "download", "alice/secret", "--local-dir", tmp_path / "no", env=env, code=1)
        assert "not found" in answer.stderr.lower()
    hf_client.hf(served.url, "download", "alice/secret", "--local-dir", tmp_path / "down", env=as_user(served))
    assert_same_files(tmp_path / "down", small)


def test_a_refusal_is_read_in_our_words_before_a_byte_of_the_file_moves(
    hf_client: HubClient, served: Running, small: Path
) -> None:
    (small / "notes.json").write_bytes(b"\x80\x04\x95" + bytes(100))
    with through(served) as (proxy, url):
        answer = hf_client.hf(url, "upload", "team/sql", small, ".", env=as_user(served), code=1)
        sent = [
            exchange.path
            for exchange in proxy.exchanges
            if "commit/" in exchange.path or exchange.method == "PUT" or "/xet/" in exchange.path
        ]
    assert "notes.json: a pickle or an archive under another name" in " ".join(answer.stderr.split())
    assert sent == []


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hf_client: HubClient, served: Running, small: Path) -> None:
    lost: list[str] = []

    def fault(exchange: Exchange) -> None:
        if "/commit/" in exchange.path and not lost:
            lost.append(exchange.path)
            exchange.hang_up = True

    commit = "result = api.upload_folder(folder_path=words[0], repo_id=api.create_repo('team/sql', exist_ok=True).repo_id).oid"
    with through(served) as (proxy, url):
        proxy.after = fault
        try:
            pushed_commit = api(hf_client, served, commit, small, url=url)
        except AssertionError:  # a client that gives up: its user runs it again
            pushed_commit = api(hf_client, served, commit, small, url=url)
    assert lost
    assert pushed_commit == commit_id(oci_manifest.build(small).digest)
    assert len(api(hf_client, served, "result = [c.commit_id for c in api.list_repo_commits('team/sql')]")) == 1


WARNS = [(version, None) for version in ("1.16.4", "1.20.0", "1.33.0", "2.4.0")]


@pytest.mark.parametrize("hf_client", WARNS, indirect=True, ids=lambda client: client[0])
def test_what_a_commit_became_is_told_in_the_terminal(
    hf_client: HubClient, served: Running, small: Path, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("# Soon\n")
    answer = hf_client.hf(served.url, "upload", "team/sql", tmp_path / "README.md", "README.md", env=as_user(served))
    assert "not a whole adapter yet" in answer.stdout + answer.stderr
    answer = hf_client.hf(served.url, "upload", "team/sql", small, ".", env=as_user(served))
    assert "team/sql:v1" in answer.stdout + answer.stderr


XET = [(version, xet) for version in ("1.20.0", "1.33.0", "2.4.0") for xet in ("1.5.2", "1.8.0")]
XET = [client for client in XET if client not in (("1.33.0", "1.5.2"), ("2.4.0", "1.5.2"))]


@pytest.mark.parametrize("hf_client", XET, indirect=True, ids="-xet-".join)
def test_a_client_that_remembers_what_the_server_forgot_succeeds_at_the_second_try(
    hf_client: HubClient, served: Running, large: Path, tmp_path: Path
) -> None:
    hf_client.hf(served.url, "upload", "team/sql", large, ".", env=as_user(served))
    for path in (served.folder / ".adapterhub" / "tmp").glob("*.xorb"):
        path.unlink()
    changed = write_large_adapter(tmp_path / "changed", layers=3)  # the first two layers are the same
    hf_client.hf(served.url, "upload", "team/sql", changed, ".", env=as_user(served), code=None)
    hf_client.hf(served.url, "upload", "team/sql", changed, ".", env=as_user(served))
    with served.registry() as registry:
        assert registry.resolve(Ref("team/sql")).digest == oci_manifest.build(changed).digest


@pytest.mark.parametrize("hf_client", [("1.33.0", None), ("2.4.0", None)], indirect=True, ids=lambda client: client[0])
def test_what_clients_ask_besides_is_asked_once(hf_client: HubClient, served: Running, small: Path, tmp_path: Path) -> None:
    with served.registry() as registry:
        registry.push(small, Ref("team/sql"))
    with through(served) as (proxy, url):
        for out in ("one", "two"):
            hf_client.hf(url, "download", "team/sql", "--local-dir", tmp_path / out, env=as_user(served))
        paths = [exchange.path for exchange in proxy.exchanges if "/api/agent-harnesses" in exchange.path]
    assert len(paths) == 1


JAVASCRIPT = """
import { createRepo, deleteFile, downloadFile, listCommits, listFiles, listModels, modelInfo, uploadFiles, whoAmI }
    from "@huggingface/hub";
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
const [hubUrl, accessToken, folder, down] = process.argv.slice(1);
const at = { hubUrl, accessToken, repo: "team/sql" };
const names = await readdir(folder);
const read = async (path) => ({ path, content: new Blob([await readFile(`${folder}/${path}`)]) });
await createRepo(at);
const { commit } = await uploadFiles({ ...at, files: await Promise.all(names.map(read)) });
const files = [];
await mkdir(down);
for await (const file of listFiles({ ...at, recursive: true })) files.push(file);
for (const { path } of files)
    await writeFile(`${down}/${path}`, Buffer.from(await (await downloadFile({ ...at, path })).arrayBuffer()));
const models = [];
for await (const model of listModels({ ...at, search: { owner: "team" } })) models.push(model.name);
const info = await modelInfo({ ...at, name: "team/sql", additionalFields: ["sha", "tags", "cardData"] });
await deleteFile({ ...at, path: "README.md" });
const commits = [];
for await (const one of listCommits(at)) commits.push(one.oid);
const { name } = await whoAmI({ hubUrl, accessToken });
console.log(JSON.stringify({ oid: commit.oid, files, models, info, commits, name }));
"""


def test_javascript_uploads_lists_informs_and_downloads(
    js_client: JavaScriptClient, served: Running, large: Path, tmp_path: Path
) -> None:
    document = json.loads(js_client.script(JAVASCRIPT, served.url, served.token, large, tmp_path / "down").stdout)
    assert document["oid"] == commit_id(oci_manifest.build(large).digest)
    weights = next(file for file in document["files"] if file["path"] == WEIGHTS)
    assert weights["lfs"]["size"] == weights["size"] == (large / WEIGHTS).stat().st_size
    assert document["models"] == ["team/sql"]
    assert document["info"]["sha"] == document["oid"]
    assert "base_model:adapter:org/base" in document["info"]["tags"]
    assert (document["commits"][-1], len(document["commits"]), document["name"]) == (document["oid"], 2, "alice")
    assert_same_files(tmp_path / "down", large)
