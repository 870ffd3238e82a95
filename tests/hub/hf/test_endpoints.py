"""The endpoints of the Hugging Face Hub one by one, as clients parse them: statuses, headers and bodies of raw requests."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import inspect
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from adapterhub.hub.hf import api_documents
from adapterhub.ref import Ref
from adapterhub.registry.repository_records import Repositories
from tests.hub.conftest import Running, serving
from tests.hub.hf.conftest import Ask
from tests.hub.sending import WEIGHTS, Sending


@pytest.fixture
def sha(reading: tuple[Running, str]) -> str:
    """The id of the commit that all tests read."""
    return reading[1]


def test_a_head_has_all_headers_and_the_size_of_the_file_though_a_range_is_asked_for(
    read: Ask, sha: str, adapter: Callable[..., Path]
) -> None:
    data = (adapter(1) / WEIGHTS).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    for headers in ({}, {"Range": "bytes=10-19"}):
        answer = read("HEAD", f"/team/sql/resolve/main/{WEIGHTS}", **headers)
        assert answer.status == 200
        expected = {
            "x-repo-commit": sha, "etag": f'"{digest}"', "content-length": str(len(data)), "accept-ranges": "bytes",
            "x-linked-etag": f'"{digest}"', "x-linked-size": str(len(data)),
        }  # fmt: skip
        assert expected.items() <= {key.lower(): value for key, value in answer.headers.items()}.items()
    part = read("GET", f"/team/sql/resolve/main/{WEIGHTS}", Range="bytes=10-19")
    assert (part.status, part.data, part.headers["content-range"]) == (206, data[10:20], f"bytes 10-19/{len(data)}")
    assert read("GET", f"/team/sql/resolve/main/{WEIGHTS}", Range=f"bytes={len(data)}-").status == 416
    small = read("HEAD", "/team/sql/resolve/main/README.md")
    assert len(json.loads(f"[{small.headers['etag']}]")[0]) == 40
    assert "x-linked-size" not in small.headers


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/api/models/team/none", "RepoNotFound"),
        ("/api/models/gpt2", "RepoNotFound"),
        ("/api/models/gpt2/revision/main", "RepoNotFound"),
        ("/gpt2/resolve/main/config.json", "RepoNotFound"),
        ("/api/models/..%2F..%2Fx/y", "RepoNotFound"),
        ("/team/none/resolve/main/README.md", "RepoNotFound"),
        ("/api/models/team/sql/revision/none", "RevisionNotFound"),
        ("/api/models/team/sql/revision/refs%2Fpr%2F1", "RevisionNotFound"),
        (f"/api/models/team/sql/revision/{'0' * 40}", "RevisionNotFound"),
        ("/api/models/team/sql/tree/none", "RevisionNotFound"),
        ("/api/models/team/sql/commits/none", "RevisionNotFound"),
        ("/team/sql/resolve/none/README.md", "RevisionNotFound"),
        ("/team/sql/resolve/main/none", "EntryNotFound"),
        ("/api/models/team/sql/tree/main/none", "EntryNotFound"),
    ],
)
def test_what_is_missing_has_its_code(read: Ask, sha: str, path: str, code: str) -> None:
    answer = read("GET", path)
    assert (answer.status, answer.headers.get("x-error-code")) == (404, code)
    assert answer.headers["x-error-message"]
    # Clients remember a missing file of a commit.
    assert answer.headers.get("x-repo-commit") == (sha if code == "EntryNotFound" else None)


def test_a_revision_that_is_none_is_told_as_one(read: Ask) -> None:
    for revision, words in (
        ("refs/pr/1", "no such proposal"),
        ("refs/x", "no such revision"),  # what no tag can be called
        ("none", "no such tag; the registry has latest, v1. List the versions of team/sql"),
    ):
        answer = read("GET", f"/api/models/team/sql/revision/{revision.replace('/', '%2F')}")
        assert answer.headers["x-error-message"] == f"team/sql:{revision}: {words}"


def test_every_spelling_of_a_name_and_of_its_newest_revision_is_the_same_commit(read: Ask, sha: str) -> None:
    for path in (
        "team/sql",
        "Team/SQL",
        "team/sql/revision/HEAD",
        "team/sql/revision/refs%2Fheads%2Fmain",
        "team/sql/revision/v1",
    ):
        document = read("GET", f"/api/models/{path}").json()
        assert (document["id"], document["sha"]) == ("team/sql", sha)


def test_a_model_has_what_clients_read(read: Ask, sha: str) -> None:
    document = read("GET", "/api/models/team/sql?blobs=true&securityStatus=true").json()
    assert {sibling["rfilename"] for sibling in document["siblings"]} == {
        "README.md",
        "adapter.json",
        "adapter_config.json",
        WEIGHTS,
    }
    assert all(sibling["size"] and len(sibling["blobId"]) == 40 for sibling in document["siblings"])
    assert document["library_name"] == "peft"
    assert document["pipeline_tag"] == "text-generation"
    assert document["cardData"]["base_model"] == "org/base"
    assert document["baseModels"] == {"relation": "adapter", "models": [{"_id": "org/base", "id": "org/base"}]}
    assert {"peft", "sql", "en", "license:mit", "base_model:adapter:org/base"} <= set(document["tags"])
    assert document["safetensors"] == {"parameters": {"F32": 128}, "total": 128}


@pytest.mark.parametrize(
    ("query", "is_listed"),
    [
        ({}, True), ({"search": "sql"}, True), ({"search": "french"}, False), ({"author": "team"}, True),
        ({"author": "Team"}, True), ({"author": "tea"}, False), ({"filter": "peft"}, True), ({"filter": "library:peft"}, True),
        ({"filter": "diffusers"}, False),
        ({"filter": "base_model:org/base"}, True), ({"filter": "base_model:adapter:org/base"}, True),
        ({"filter": "base_model:adapter:org/other"}, False), ({"filter": "sql"}, True), ({"filter": "sql,license:mit"}, True),
        ({"filter": "license:gpl"}, False), ({"filter": "gguf"}, False), ({"author": "team", "filter": "sql"}, True),
        ({"author": "team", "filter": "license:gpl"}, False), ({"pipeline_tag": "text-generation"}, True),
        ({"pipeline_tag": "image-to-image"}, False), ({"gated": "True"}, False), ({"gated": "false"}, True),
        ({"num_parameters": "min:100,max:1K"}, True), ({"num_parameters": "min:1B"}, False),
        ({"num_parameters": "max:999999999999999T"}, True), ({"num_parameters": "min:999999999999999T"}, False),
        ({"sort": "lastModified", "direction": "1"}, True), ({"filter": "lora"}, True), ({"filter": "safetensors"}, True),
        ({"library": "peft"}, True), ({"library": "diffusers"}, False), ({"search": "french", "filter": "peft"}, False),
    ],
)  # fmt: skip
def test_lists_are_filtered_as_their_tags_say(read: Ask, sha: str, query: dict[str, str], is_listed: bool) -> None:
    answer = read("GET", f"/api/models?{urlencode(query)}")
    assert answer.status == 200
    assert [model["id"] for model in answer.json()] == ["team/sql"] * is_listed


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("sort=trendingScore", "sorts by last"), ("direction=2", "neither -1"), ("apps=vllm", "which programs run"),
        ("inference=warm", "runs no inference"), ("inference_provider=all", "runs no inference"),
        ("config=true", "in its files"), ("num_parameters=many", "min:1M,max:1B"), ("full=maybe", "nor false"),
        ("expand=trendingScore", "it has author, baseModels"), ("color=red", "does not filter by that"),
        ("limit=x", "not a number"), ("limit=0", "above 0"), ("cursor=-1", "the link"), (f"cursor={'9' * 5000}", "the link"),
    ],
)  # fmt: skip
def test_what_a_list_cannot_be_asked_for_is_refused_in_words(read: Ask, query: str, words: str) -> None:
    answer = read("GET", f"/api/models?{query}")
    assert (answer.status, words in answer.headers["x-error-message"]) == (400, True)


def test_no_parameter_of_the_client_s_list_is_ignored(reading: tuple[Running, str]) -> None:
    """Each parameter of the signature, with a value that no adapter here meets: nothing, or a refusal in words."""
    values: dict[str, Any] = {
        "filter": "no-such-tag", "author": "nobody", "apps": "vllm", "gated": True, "inference": "warm",
        "inference_provider": "all", "trained_dataset": "none", "search": "nothing", "pipeline_tag": "image-to-image",
        "num_parameters": "min:1B", "emissions_thresholds": (0, 1), "sort": "trending_score", "expand": ["gguf"],
        "fetch_config": True,
    }  # fmt: skip
    presentation: dict[str, Any] = {"limit": 1, "full": True, "cardData": True, "token": False}
    api = HfApi(reading[0].url, token=reading[0].token)
    assert inspect.signature(api.list_models).parameters.keys() == values.keys() | presentation.keys()
    for key, value in values.items():
        with contextlib.suppress(HfHubHTTPError):
            extra = {"cardData": True} if key == "emissions_thresholds" else {}
            assert not [*api.list_models(**{key: value}, **extra)], key
    for key, value in presentation.items():
        (model,) = api.list_models(**{key: value})
        assert (bool(model.siblings), bool(model.card_data)) == (key == "full", key in ("full", "cardData"))


def test_a_file_is_under_raw_too(read: Ask, sha: str) -> None:
    for path in ("README.md", WEIGHTS):
        raw, resolved = (read("GET", f"/team/sql/{kind}/main/{path}") for kind in ("raw", "resolve"))
        assert (raw.status, raw.data) == (200, resolved.data)
        assert read("HEAD", f"/team/sql/raw/main/{path}").status == 200
    assert read("HEAD", "/team/sql/raw/main/none").status == 404


def test_no_repository_is_newer_than_its_last_change(hub: Running, ask: Ask, adapter: Callable[..., Path]) -> None:
    with hub.registry() as registry:
        registry.push(adapter(1), Ref("team/sql"))
        Repositories(registry).change("team/sql", lambda state: replace(state, created="2999-01-01T00:00:00Z"))
    model, (listed,) = ask("GET", "/api/models/team/sql").json(), ask("GET", "/api/models").json()
    for document in (model, listed):
        assert document["createdAt"] <= document["lastModified"]


def test_git_is_told_what_to_use_instead(hub: Running, sql: str) -> None:
    for name in ("team/sql", "team/sql.git"):
        result = subprocess.run(["git", "ls-remote", f"{hub.url}/{name}"], capture_output=True, text=True, check=False)
        assert result.returncode
        assert "remote: this hub does not speak git: download with `hf download team/sql`" in result.stderr


@pytest.mark.parametrize(
    "path", ["/api/models", "/api/models-tags-by-type", "/api/organizations/team/overview", "/v2/_catalog"]
)
def test_lists_of_a_hub_for_accounts_ask_strangers_to_log_in(tmp_path: Path, path: str) -> None:
    with serving(tmp_path / "closed", require_login=True) as closed:
        assert Sending(closed.url, "").ask("GET", path).status == 401
        assert Sending(closed.url, closed.token).ask("GET", path).status in (200, 404)


def test_every_tag_that_is_shown_finds_what_shows_it(read: Ask, sha: str) -> None:
    (model,) = read("GET", "/api/models").json()
    listed = [tag["id"] for tags in read("GET", "/api/models-tags-by-type").json().values() for tag in tags]
    assert {*model["tags"]} - {"base_model:adapter:org/base"} == {*listed}
    for tag in model["tags"]:
        assert [model["id"] for model in read("GET", f"/api/models?{urlencode({'filter': tag})}").json()] == ["team/sql"], tag


def test_a_model_and_a_list_have_the_fields_that_are_asked_for(read: Ask, sha: str) -> None:
    for field in api_documents.EXPANDABLE:
        (listed,) = read("GET", f"/api/models?expand={field}").json()
        model = read("GET", f"/api/models/team/sql?expand={field}").json()
        assert listed.keys() == model.keys() == {"_id", "id", field}
        assert listed[field] == model[field]
    refused = read("GET", "/api/models/team/sql?expand=gguf")
    assert (refused.status, refused.headers["x-error-message"].partition(";")[0]) == (
        400, "expand=gguf: this hub does not have that of a model",
    )  # fmt: skip


def test_the_library_and_the_task_are_those_of_the_card(hub: Running, ask: Ask, adapter: Callable[..., Path]) -> None:
    folder = adapter(1)
    (folder / "README.md").write_text("---\nlibrary_name: diffusers\npipeline_tag: text-to-video\n---\n")
    with hub.registry() as registry:
        registry.push(folder, Ref("team/film"))
    model, (listed,) = ask("GET", "/api/models/team/film").json(), ask("GET", "/api/models?filter=diffusers").json()
    for document in (model, listed):
        assert (document["library_name"], document["pipeline_tag"]) == ("diffusers", "text-to-video")
        assert {"diffusers", "text-to-video"} <= {*document["tags"]}


def test_lists_have_pages_and_none_is_short_for_what_others_may_not_see(
    hub: Running, ask: Ask, adapter: Callable[..., Path]
) -> None:
    with hub.registry() as registry:
        for number in range(9):
            registry.push(adapter(number), Ref(f"{'team' if number % 2 else 'other'}/sql{number}"))
    for number in (0, 2, 3, 8):
        space = "team" if number % 2 else "other"
        assert ask("PUT", f"/api/models/{space}/sql{number}/settings", {"private": True}).status == 200
    path, pages = "/api/models?limit=2&full=true&filter=peft", []
    while path:
        answer = ask("GET", path, token="")
        pages.append([model["id"] for model in answer.json()])
        assert all(len(model["siblings"]) == 4 for model in answer.json())
        path = answer.headers.get("link", "").partition(">")[0].lstrip("<")
    assert [len(page) for page in pages] == [2, 2, 1]
    assert sorted(name for page in pages for name in page) == [
        "other/sql4",
        "other/sql6",
        "team/sql1",
        "team/sql5",
        "team/sql7",
    ]


def test_a_repository_that_went_back_to_earlier_content_is_listed(hf: Any, ask: Ask, adapter: Callable[..., Path]) -> None:
    hf.create_repo("team/sql")
    *_, last = (hf.upload_folder(folder_path=adapter(seed), repo_id="team/sql").oid for seed in (1, 2, 1))
    (model,) = ask("GET", "/api/models?search=sql").json()
    assert model["sha"] == last


def test_trees_have_pages(hub: Running, ask: Ask, adapter: Callable[..., Path]) -> None:
    folder = adapter(1)
    (folder / "images").mkdir()
    for number in range(60):
        (folder / "images" / f"{number:02} ü.json").write_text(f"[{number}]")
    lines = [{"key": "header", "value": {"summary": "all"}}]
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = base64.b64encode(path.read_bytes()).decode()
        lines.append(
            {"key": "file", "value": {"path": path.relative_to(folder).as_posix(), "content": content, "encoding": "base64"}}
        )
    ask("POST", "/api/repos/create", {"name": "sql", "organization": "team"})
    committed = ask("POST", "/api/models/team/sql/commit/main", "\n".join(map(json.dumps, lines)))
    assert committed.status == 200, committed.data
    url, listed, sizes = "/api/models/team/sql/tree/main/images?expand=true&recursive=true", [], []
    while url:
        answer = ask("GET", url)
        listed += [entry["path"] for entry in answer.json()]
        sizes.append(len(answer.json()))
        url = answer.headers.get("link", "").partition(">")[0].lstrip("<")
    assert (sizes, len(set(listed))) == ([50, 10], 60)
    top = {entry["path"]: entry["type"] for entry in ask("GET", "/api/models/team/sql/tree/main").json()}
    assert top["images"] == "directory"
    assert not any("/" in path for path in top)


def test_paths_are_asked_for_in_a_form_and_in_json(read: Ask, sha: str) -> None:
    as_json = read("POST", "/api/models/team/sql/paths-info/main", {"paths": ["README.md", "none"], "expand": True}).json()
    form, kind = urlencode([("paths", "README.md"), ("paths", "none"), ("expand", "True")]), "application/x-www-form-urlencoded"
    as_form = read("POST", "/api/models/team/sql/paths-info/main", form, Content_Type=kind).json()
    assert as_json == as_form
    assert [(entry["path"], entry["lastCommit"]["id"]) for entry in as_form] == [("README.md", sha)]
    oversized = read("POST", "/api/models/team/sql/paths-info/main", urlencode([("paths", "x")] * 20_000), Content_Type=kind)
    assert (oversized.status, oversized.json()["error"]) == (400, "form: more than 10,000 fields")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/models/team/sql/discussions"), ("GET", "/api/collections"), ("GET", "/api/spaces/team/sql"),
        ("GET", "/api/datasets/team/sql"), ("GET", "/api/settings/webhooks"),
        ("POST", "/api/models/team/sql/lfs-files/duplicate"),
    ],
)  # fmt: skip
def test_what_this_hub_has_not_is_refused_once_and_in_words(read: Ask, sha: str, method: str, path: str) -> None:
    answer = read(method, path, {} if method != "GET" else None)
    assert (answer.status, answer.headers["x-error-code"]) == (501, "NotImplemented")
    assert "this hub has" in answer.headers["x-error-message"]


def test_small_things_that_clients_read(read: Ask, sha: str) -> None:
    assert read("GET", "/api/agent-harnesses", token="").json()
    assert read("HEAD", "/api/telemetry/examples/peft", token="").status == 204
    assert read("GET", "/api/models/team/sql/auth-check", token="").json() == {}
    assert read("GET", "/api/whoami-v2").json()["auth"]["accessToken"]["role"] == "write"
    assert read("GET", "/api/whoami-v2", token="").status == 401
    bad = read("GET", "/api/models/team/sql", token="hf_bad")
    assert (bad.status, bad.headers["x-error-message"]) == (401, "Invalid credentials in Authorization header")
    kinds = read("GET", "/api/models-tags-by-type").json()
    assert [tag["id"] for tag in kinds["license"]] == ["license:mit"]
    overview = read("GET", "/api/organizations/team/overview").json()
    assert (overview["name"], overview["numModels"]) == ("team", 1)
    assert read("GET", "/api/users/nobody/overview").status == 404


def test_a_commit_that_is_not_there_is_named(read: Ask) -> None:
    answer = read("GET", f"/api/models/team/sql/revision/{'0' * 40}")
    assert (answer.status, answer.headers["x-error-code"]) == (404, "RevisionNotFound")
    assert answer.json()["error"] == f"team/sql@{'0' * 40}: no such commit"


def test_headers_of_weights_are_as_in_the_files(read: Ask, ask: Ask) -> None:
    path = "/api/models/team/sql/safetensors-metadata/adapter_model.safetensors"
    answer = read("GET", path).json()
    data = read("GET", "/team/sql/resolve/main/adapter_model.safetensors").data
    length = int.from_bytes(data[:8], "little")
    assert answer == {"index": {}, "headers": {"adapter_model.safetensors": json.loads(data[8 : 8 + length])}}
    for unknown in ("none.safetensors", "none.safetensors.index.json"):
        assert read("GET", f"/api/models/team/sql/safetensors-metadata/{unknown}").headers["x-error-code"] == "EntryNotFound"
    assert read("GET", "/api/models/team/sql/safetensors-metadata/README.md").status == 400


def test_headers_of_shards_come_together(hub: Running, hf: Any) -> None:
    from safetensors.numpy import save

    hf.create_repo("team/large")
    shards = {f"model-{n}.safetensors": {f"weight.{n}": np.full((2, n), n, np.float32)} for n in (1, 2)}
    for name, tensors in shards.items():
        hf.upload_file(path_or_fileobj=save(tensors), path_in_repo=f"sub/{name}", repo_id="team/large")
    weights = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": 24}, "weight_map": weights}
    path = "sub/model.safetensors.index.json"
    hf.upload_file(path_or_fileobj=json.dumps(index).encode(), path_in_repo=path, repo_id="team/large")
    answer = Sending(hub.url, hub.token).ask("GET", f"/api/models/team/large/safetensors-metadata/{path}").json()
    assert (answer["index"], list(answer["headers"])) == ({"metadata": {"total_size": 24}}, list(shards))
    assert answer["headers"]["model-2.safetensors"]["weight.2"] == {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    if hasattr(hf, "get_sharded_safetensors_metadata"):
        metadata = hf.get_sharded_safetensors_metadata("team/large", filename=path)
        assert metadata.weight_map == weights
