"""huggingface_hub sees what we push, and we what it pushes: on a hub that their own client proves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.hub.hub_client import HubAddress
from adapterhub.remotes.hub.hub_repository import HubRepository
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import AdapterhubError, ConflictError, IntegrityError, RefusedError, UsageError
from tests.conftest import Run, need_module
from tests.support.adapters import write_adapter
from tests.support.hub_server import TOKEN, Hub

Make = Callable[..., Path]
pytestmark = pytest.mark.peer


@pytest.fixture
def call(run: Run, hub: Hub, tmp_path: Path) -> Run:
    """Run adapterhub against the hub."""

    def go(*args: object, env: dict[str, str] | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
        nowhere = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_TOKEN_PATH": ""}
        return run(*args, env={**nowhere, **(env or {})}, code=code)

    return go


@pytest.fixture
def api(hub: Hub) -> Any:
    """huggingface_hub's own client."""
    need_module("huggingface_hub")
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url, token=False)


def theirs(script: str, hub: Hub, tmp_path: Path, **env: str) -> str:
    """What a script says that runs with huggingface_hub, without its own storage protocol."""
    need_module("huggingface_hub")
    hub_env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **hub_env, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def remote(hub: Hub, text: str = "hf://org/sql", token: str | None = None) -> HubRepository:
    return HubRepository(HubAddress.parse(text), hub.url, token, pauses=())


def push(hub: Hub, folder: Path, text: str = "hf://org/sql") -> HubRepository:
    with remote(hub, text) as to:
        copy_version(AdapterFolder(folder), "latest", to, to.address.reference)
    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi(token={token!r})
api.create_repo({repo!r}, exist_ok=True)
api.upload_folder(repo_id={repo!r}, folder_path={folder!r})
"""


@pytest.mark.parametrize("part", [0, 300])
def test_huggingface_hub_itself_uploads_to_this_hub_and_downloads_from_it(
    make: Make, hub: Hub, api: Any, tmp_path: Path, part: int
) -> None:
    source, hub.part = make(), part
    theirs(UPLOAD.format(token=TOKEN, repo="org/theirs", folder=str(source)), hub, tmp_path)
    files = contents(Path(api.snapshot_download("org/theirs", local_dir=tmp_path / "down", cache_dir=tmp_path / "cache")))
    assert contents(source).items() <= files.items()
    assert hub.storage is not None
    assert [path for method, path, _ in hub.storage.requests if method == "PUT" and (part == 0) != ("part=" in path)]


def test_what_huggingface_hub_pushed_becomes_an_adapter_with_a_manifest(
    make: Make, hub: Hub, call: Run, tmp_path: Path
) -> None:
    source = make()
    (source / "training_args.bin").write_bytes(b"\x80\x02.")
    (source / "checkpoint-5").mkdir()
    (source / "checkpoint-5/adapter_config.json").write_text("{}")
    theirs(UPLOAD.format(token=TOKEN, repo="org/theirs", folder=str(source)), hub, tmp_path)
    result = call("pull", "hf://org/theirs", "-o", "out")
    assert "adapter.json: it was derived" in result.stderr
    for name in ("training_args.bin", "checkpoint-5/adapter_config.json", ".gitattributes"):
        assert f"left out: {name}\n" in result.stderr
    (source / "training_args.bin").unlink()
    (source / "checkpoint-5/adapter_config.json").unlink()
    (source / "checkpoint-5").rmdir()
    assert {key: value for key, value in contents(tmp_path / "out").items() if key != "adapter.json"} == contents(source)
    copied = json.loads(call("copy", "hf://org/theirs", "team/theirs", "--json").stdout)
    assert copied["digest"] == oci_manifest.build(source).digest


def test_huggingface_hub_gets_what_was_pushed(make: Make, hub: Hub, api: Any, call: Run, tmp_path: Path) -> None:
    source = make()
    pushed = json.loads(call("push", source, "hf://org/sql", "--json").stdout)
    info = api.model_info("org/sql", files_metadata=True)
    assert info.sha == pushed["commit"]
    weights = next(file for file in info.siblings if file.rfilename == "adapter_model.safetensors")
    layer = next(layer for layer in oci_manifest.build(source).layers if layer.path == "adapter_model.safetensors")
    assert f"sha256:{weights.lfs.sha256}" == layer.digest
    assert info.card_data.base_model == "org/base"
    folder = Path(api.snapshot_download("org/sql", cache_dir=tmp_path / "cache", revision=pushed["commit"]))
    files = contents(folder)
    assert {key: value for key, value in files.items() if key in contents(source) and key != "README.md"} == {
        key: value for key, value in contents(source).items() if key != "README.md"
    }
    path = api.hf_hub_download("org/sql", "adapter_config.json", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == (source / "adapter_config.json").read_bytes()
    card = json.loads(
        theirs(
            "import json; from huggingface_hub import ModelCard; card = ModelCard.load('org/sql', token=False);"
            "print(json.dumps({**card.data.to_dict(), 'text': card.text}))",
            hub,
            tmp_path,
        )
    )
    assert (card["library_name"], card["base_model"], card["tags"]) == ("peft", "org/base", ["lora"])
    assert card["text"].strip() == "# A test"
    refs = api.list_repo_refs("org/sql")
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", pushed["commit"])]


def test_one_digest_from_folder_to_hub_to_registry_and_back(make: Make, call: Run, hub: Hub, api: Any, tmp_path: Path) -> None:
    source = make()
    digest = oci_manifest.build(source).digest

    def run_json(*words: object) -> dict[str, Any]:
        return dict(json.loads(call(*words, "--json").stdout))

    call("init", ".")
    first = run_json("push", source, "hf://org/sql")
    assert first["digest"] == digest
    assert first["sent"] > first["size"] - 1
    again = run_json("push", source, "hf://org/sql@prod")
    assert (again["sent"], again["commit"]) == (0, first["commit"])  # a branch, and no commit of its own
    assert call("push", source, "hf://org/sql").stdout.startswith("already there: ")
    assert run_json("copy", "hf://org/sql@prod", "team/sql:v9")["digest"] == digest
    assert run_json("copy", "team/sql", "hf://org/other@stable")["digest"] == digest
    assert run_json("copy", "hf://org/other@stable", "hf://org/third")["digest"] == digest
    pulled = run_json("pull", f"hf://org/third@{digest}", "-o", "out")
    assert pulled["digest"] == digest == oci_manifest.build(tmp_path / "out").digest
    assert (tmp_path / "out/README.md").read_bytes() == (source / "README.md").read_bytes()
    assert run_json("pull", f"hf://org/sql@{first['commit']}", "-o", "by-commit")["digest"] == digest
    assert f"commit {first['commit']}\n" in call("pull", "hf://org/sql", "-o", "again").stderr
    api.create_tag("org/sql", tag="v1.0")
    (line,) = call("list", "hf://org/sql").stdout.splitlines()[1:]
    assert line.startswith("hf://org/sql@main ")
    assert "prod, v1.0" in line
    assert line.endswith(str(first["commit"]))
    assert run_json("list", "hf://org/sql")["commits"]["prod"] == first["commit"]
    assert call("validate", "hf://org/sql@v1.0").stdout.endswith("ok: nothing to report\n")
    assert run_json("pull", f"hub+{hub.url}/org/sql", "-o", "by-host")["digest"] == digest


def test_fsck_puts_back_from_a_hub_what_is_lost(make: Make, call: Run, tmp_path: Path) -> None:
    call("init", ".")
    call("push", make(), "team/sql")
    call("push", "team/sql", "hf://org/sql")
    blobs = tmp_path / ".adapterhub/blobs/sha256"
    manifest = oci_manifest.build(tmp_path / "adapter")
    for digest in (manifest.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers)):
        (blobs / digest[7:]).unlink()
    assert "restored 6 blobs" in call("fsck", "--repair", "--from", "hf://org/sql").stderr
    call("verify", "team/sql")


# ---- what a repository keeps, and what goes


def test_files_of_the_version_before_go_and_those_of_others_stay(make: Make, hub: Hub, api: Any, tmp_path: Path) -> None:
    source = make()
    (source / "notes.txt").write_text("old")
    push(hub, source)
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="eval/results.txt", repo_id="org/sql")
    (source / "notes.txt").unlink()
    manifest = oci_manifest.build(source)
    push(hub, source)
    repo_files = api.list_repo_files("org/sql")
    expected = {".gitattributes", "eval/results.txt", *(layer.path for layer in manifest.layers)}
    assert set(repo_files) == expected
    with remote(hub) as source_:
        assert source_.manifest("main").digest == manifest.digest


def test_a_card_written_on_the_hub_is_kept_and_completed(make: Make, hub: Hub, api: Any) -> None:
    source = make()
    (source / "README.md").unlink()
    push(hub, source)
    assert b"# adapterhub: written of adapter.json" in hub.repos["org/sql"].branches["main"].files["README.md"].data
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n# By hand\n", path_in_repo="README.md", repo_id="org/sql")
    manifest = copy_version(AdapterFolder(source), "latest", remote(hub), "main").manifest
    card = hub.repos["org/sql"].branches["main"].files["README.md"].data
    assert b"license: mit" in card
    assert b"base_model: org/base" in card
    assert card.endswith(b"---\n# By hand\n")
    assert manifest.digest == oci_manifest.build(source).digest == remote(hub).manifest("main").digest


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "README.md", "adapter.json"])
def test_a_file_that_was_changed_on_the_hub_is_noticed_and_put_back(
    make: Make, hub: Hub, api: Any, call: Run, tmp_path: Path, name: str
) -> None:
    source = make()
    push(hub, source)
    files = hub.repos["org/sql"].branches["main"].files
    changed = files[name].data[:-2] + b"?" + files[name].data[-1:]
    theirs(
        "from huggingface_hub import HfApi; import sys;"
        f"HfApi(token={TOKEN!r}).upload_file(path_or_fileobj={changed!r}, path_in_repo={name!r}, repo_id='org/sql')",
        hub,
        tmp_path,
    )
    assert "Traceback" not in call("pull", "hf://org/sql", "-o", "out", code=4).stderr
    assert not (tmp_path / "out").exists()
    push(hub, source)
    call("pull", "hf://org/sql", "-o", "out")


# ---- branches, tags, conflicts


def test_a_tag_stays_and_a_commit_is_no_branch(make: Make, hub: Hub, api: Any, tmp_path: Path) -> None:
    source = make()
    to = push(hub, source)
    api.create_tag("org/sql", tag="v1")
    assert push(hub, source, "hf://org/sql@v1").commit_id == to.commit_id
    with pytest.raises(RefusedError, match="is a tag"):
        push(hub, write_adapter(tmp_path / "other", 1), "hf://org/sql@v1")
    with pytest.raises(UsageError, match="a commit cannot be pushed to"):
        push(hub, source, f"hf://org/sql@{to.commit_id}")


@pytest.mark.parametrize("branch", ["main", "prod"])
def test_a_concurrent_commit_by_another_user_is_a_conflict(make: Make, hub: Hub, api: Any, tmp_path: Path, branch: str) -> None:
    push(hub, make(), f"hf://org/sql@{branch}")
    other_folder = AdapterFolder(write_adapter(tmp_path / "other", 1))
    with remote(hub) as to:
        made_of = to._writer.paths_stored_large

        def between(*args: Any) -> set[str]:
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/sql", revision=branch)
            return made_of(*args)

        to._writer.paths_stored_large = between  # type: ignore[method-assign]
        with pytest.raises(ConflictError, match="somebody else committed") as caught:
            copy_version(other_folder, "latest", to, branch)
    assert caught.value.exit_code == 7
    assert "x.txt" in hub.repos["org/sql"].branches[branch].files


def test_a_push_that_failed_leaves_no_branch(make: Make, hub: Hub, tmp_path: Path) -> None:
    push(hub, make())
    other_folder = AdapterFolder(write_adapter(tmp_path / "other", 1))
    with remote(hub) as to:
        for blob in (*other_folder.manifest("latest").layers, other_folder.manifest("latest").config):
            to.put_blob(blob, other_folder)
        hub.large.clear()
        with pytest.raises(AdapterhubError):
            to.put_manifest(other_folder.manifest("latest"), "prod")
    assert list(hub.repos["org/sql"].branches) == ["main"]


def test_a_failed_push_leaves_a_branch_that_another_user_changed(make: Make, hub: Hub, api: Any, tmp_path: Path) -> None:
    push(hub, make())
    other_folder = AdapterFolder(write_adapter(tmp_path / "other", 1))
    with remote(hub) as to:
        make_branch = to._writer.create_branch

        def between(name: str, start: str) -> None:
            make_branch(name, start)
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/sql", revision=name)

        to._writer.create_branch = between  # type: ignore[method-assign]
        with pytest.raises(ConflictError):
            copy_version(other_folder, "latest", to, "prod")
    assert "x.txt" in hub.repos["org/sql"].branches["prod"].files


def test_a_push_does_not_read_the_existing_versions_of_others(make: Make, hub: Hub, api: Any) -> None:
    api.create_repo("org/sql", token=TOKEN)
    api.upload_file(path_or_fileobj=b"theirs", path_in_repo="results.txt", repo_id="org/sql")
    hub.requests.clear()
    manifest = copy_version(AdapterFolder(make()), "latest", remote(hub), "main").manifest
    assert not [path for _, path, _ in hub.requests if "results.txt" in path]
    assert remote(hub).manifest("main").digest == manifest.digest


def test_a_push_resumes_after_a_failed_one_and_resends_no_large_file(make: Make, hub: Hub) -> None:
    source = AdapterFolder(make())
    manifest = source.manifest("latest")
    with remote(hub) as to:
        for blob in manifest.layers:
            to.put_blob(blob, source)
    weights = next(layer for layer in manifest.layers if layer.path.endswith(".safetensors"))
    with remote(hub) as to:
        assert to.put_blob(weights, source) == 0
        assert copy_version(source, "latest", to, "main").manifest.digest == remote(hub).manifest("main").digest


@pytest.mark.parametrize("part", [1, 100, 1000, 1104])
def test_large_files_go_in_the_parts_that_the_hub_asks_for(make: Make, hub: Hub, part: int) -> None:
    hub.part, source = part, make()
    manifest = AdapterFolder(source).manifest("latest")
    push(hub, source)
    assert remote(hub).manifest("main").digest == manifest.digest


def test_what_a_hub_cannot_give_back_is_refused(make: Make, hub: Hub) -> None:
    source = AdapterFolder(make())
    manifest = source.manifest("latest")
    document = json.loads(manifest.raw)
    document["annotations"]["org.example.mine"] = "x"
    other_manifest = oci_manifest.parse(json.dumps(document).encode(), "")
    with remote(hub) as to:
        for blob in (*manifest.layers, manifest.config):
            to.put_blob(blob, source)
        with pytest.raises(RefusedError, match="a hub keeps only files"):
            to.put_manifest(other_manifest, "main")


# ---- who asks


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Hub]:
    with Hub(token=TOKEN) as server:
        yield server


def test_a_token_is_taken_as_huggingface_hub_takes_it_and_goes_to_the_hub_alone(
    make: Make, private: Hub, run: Run, tmp_path: Path
) -> None:
    nobody = {"HF_ENDPOINT": private.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "", "HF_TOKEN_PATH": ""}
    right = {**nobody, "HF_TOKEN": TOKEN}
    (tmp_path / "hf").mkdir()
    assert "Set HF_TOKEN, or log in with `hf auth login`" in run("push", make(), "hf://org/sql", env=nobody, code=5).stderr
    wrong = run("push", make(), "hf://org/sql", env={**nobody, "HF_TOKEN": "hf_not-the-token"}, code=5)
    assert "not-the-token" not in wrong.stderr + wrong.stdout
    result = run("push", make(), "hf://org/sql", env=right)
    assert "created the repository hf://org/sql, with the hub's default visibility" in result.stderr
    private.repos["org/sql"].private = True
    assert "no such repository" in run("pull", "hf://org/sql", "-o", "out", env=nobody, code=3).stderr
    (tmp_path / "hf/token").write_text(TOKEN + "\n")
    run("pull", "hf://org/sql", "-o", "out", env={key: value for key, value in nobody.items() if key != "HF_TOKEN_PATH"})
    private.repos["org/sql"].gated = True
    assert "a gated repository" in run("pull", "hf://org/sql", "-o", "gated", env=right, code=5).stderr
    assert private.storage is not None
    assert {method for method, _, _ in private.storage.requests} == {"GET", "PUT"}
    assert all("authorization" not in headers for _, _, headers in private.storage.requests)
    # Another hub than HF_ENDPOINT is not told the token.
    with Hub(token=TOKEN) as other_hub:
        run("pull", f"hub+{other_hub.url}/org/sql", "-o", "other", env=right, code=3)
        assert all("authorization" not in headers for _, _, headers in other_hub.requests)


def test_a_repository_is_made_private_on_request(make: Make, run: Run, private: Hub, tmp_path: Path) -> None:
    source, env = make(), {"HF_ENDPOINT": private.url, "HF_TOKEN": TOKEN}
    run("push", source, "hf://org/public", env=env)
    assert "hf://org/secret, private" in run("push", source, "hf://org/secret", "--private", env=env).stderr
    assert [private.repos[name].private for name in ("org/public", "org/secret")] == [False, True]
    run("pull", "hf://org/secret", "-o", "out", env=env)
    for ref in ("team/sql", "oci://127.0.0.1:9/team/sql"):
        assert "--private: only a repository on a hub" in run("push", source, ref, "--private", code=2).stderr


def test_offline_is_reported_in_one_line(run: Run) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        result = run("pull", "hf://org/sql", env={name: "1"}, code=5)
        assert result.stderr.startswith("error: HF_HUB_OFFLINE: is set")


BAD = [
    "hf://",
    "hf://org",
    "hf://org/name/file.safetensors",
    "hf://org/name@main/file.json",
    "hf://org/na--me",
    "hf://org/name@sha256:123",
    "hf://org/name@main@sha256:" + "0" * 64,
    "hf://org/name@\x07",
    "hub+https:///org/name",
    "hub+https://user:secret@hub.example/org/name",
    "hub+https://hub.example/name",
]


@pytest.mark.parametrize("text", BAD)
def test_a_malformed_address_is_one_line(text: str) -> None:
    with pytest.raises(AdapterhubError) as caught:
        HubAddress.parse(text)
    assert caught.value.exit_code in (2, 4)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/name",
        "hf://org/name@v1",
        "hf://org/name@refs%2Fpr%2F1",
        "hub+http://127.0.0.1:80/o/n@x",
        "hf://o/n@sha256:" + "1" * 64,
    ],
)
def test_an_address_is_written_as_it_is_read(text: str) -> None:
    assert str(HubAddress.parse(text)) == text
    assert HubAddress.parse(str(HubAddress.parse(text))) == HubAddress.parse(text)


def test_a_repository_without_an_adapter_or_with_a_pickle_is_refused(hub: Hub, api: Any, tmp_path: Path, make: Make) -> None:
    api.create_repo("org/empty", token=TOKEN)
    with pytest.raises(AdapterhubError, match="no adapter in this repository"):
        remote(hub, "hf://org/empty").manifest("main")
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="adapter_config.json", repo_id="org/empty")
    theirs(
        f"from huggingface_hub import HfApi; HfApi(token={TOKEN!r}).upload_file("
        "path_or_fileobj=b'x', path_in_repo='adapter_model.bin', repo_id='org/empty')",
        hub,
        tmp_path,
    )
    with pytest.raises(RefusedError, match="a pickle can run code"):
        remote(hub, "hf://org/empty").manifest("main")


def test_the_digest_of_what_is_only_in_the_history_is_found(make: Make, hub: Hub, tmp_path: Path) -> None:
    first = oci_manifest.build(make())
    push(hub, make())
    for seed in range(1, 5):
        push(hub, write_adapter(tmp_path / f"n{seed}", seed))
    with remote(hub) as repository:
        assert repository.manifest(first.digest).raw == first.raw
        with pytest.raises(AdapterhubError, match="no such version"):
            repository.manifest("sha256:" + "0" * 64)


def test_a_file_that_is_gone_is_named(make: Make, hub: Hub, api: Any) -> None:
    push(hub, make())
    api.delete_file("adapter_config.json", "org/sql", token=TOKEN)
    with (
        remote(hub) as repository,
        pytest.raises(IntegrityError, match=r"adapter_config\.json: missing, but adapter\.json lists it"),
    ):
        repository.manifest("main")
