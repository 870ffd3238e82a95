"""`model.sig` in a repository on a hub that is not ours: written beside the files, and read back from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.hub_server import TOKEN, File, Hub
from tests.support.signing import model_signing

FIELDS = "base_model: org/tiny\nbase_model_relation: adapter\nlibrary_name: peft\nlicense: mit\n"
CARD = f"---\n{FIELDS}tags: [lora]\npipeline_tag: text-generation\n---\n# SQL\n"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def go(run: Run, hub: Hub, tmp_path: Path) -> Run:
    """Runs commands with the hub and a signed version `team/sql`."""
    run("key", "generate", "team")
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}

    def call(*words: object, code: int = 0) -> Any:
        return run(*words, env=env, code=code)

    return call  # type: ignore[return-value]


def files(hub: Hub) -> dict[str, File]:
    return hub.repos["org/sql"].branches["main"].files


def test_a_signature_goes_to_a_hub_and_is_verified_there(go: Run, make: Make, hub: Hub, tmp_path: Path) -> None:
    folder = make("sql")
    (folder / "README.md").write_text(CARD)
    go("push", folder, "team/sql")
    go("sign", "team/sql", "--key", "team.key")
    pushed = go("push", "team/sql", "hf://org/sql")
    assert "stay behind" not in pushed.stderr
    assert "model.sig" in files(hub)
    go("verify", "hf://org/sql", "--key", "team.pub", "--signed-as", "team/sql")
    # What was copied from there has the signature too.
    go("copy", "hf://org/sql", "team/copied")
    go("verify", "team/copied", "--key", "team.pub", "--signed-as", "team/sql")
    # A signature of an earlier version does not stay beside another one.
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + "\n")
    go("push", folder, "hf://org/sql")
    assert "model.sig" not in files(hub)
    assert "is not signed" in go("verify", "hf://org/sql", "--key", "team.pub", code=1).stdout
    # A version there can be signed where it is; its digest stays the same.
    before = json.loads(go("show", "hf://org/sql", "--json").stdout)["digest"]
    go("sign", "hf://org/sql", "--key", "team.key")
    go("verify", "hf://org/sql", "--key", "team.pub")
    assert json.loads(go("show", "hf://org/sql", "--json").stdout)["digest"] == before
    # A damaged file is refused, and so is a true one beside other bytes.
    signature = files(hub)["model.sig"].data
    files(hub)["model.sig"] = File(signature[:-40])
    assert "not valid JSON" in go("verify", "hf://org/sql", "--key", "team.pub", code=1).stdout
    files(hub)["model.sig"] = File(signature.replace(b'"payload":"', b'"payload":"AAAA'))
    go("verify", "hf://org/sql", "--key", "team.pub", code=1)


def test_model_signing_and_a_repository_of_others_verify_each_other(go: Run, make: Make, hub: Hub, tmp_path: Path) -> None:
    folder = make("sql")
    (folder / "README.md").write_text(CARD)
    go("push", folder, "hf://org/sql")
    go("sign", "hf://org/sql", "--key", "team.key")
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for path, file in files(hub).items():
        (downloaded / path).write_bytes(file.data)
    assert model_signing("verify", tmp_path / "team.pub", downloaded) == ""
    # What its owner signed with that program, without adapter.json or our tool.
    theirs = {path: file for path, file in files(hub).items() if path not in ("adapter.json", "model.sig")}
    (downloaded / "adapter.json").unlink()
    (downloaded / "model.sig").unlink()
    assert model_signing("sign", tmp_path / "team.key", downloaded) == ""
    files(hub).clear()
    files(hub).update(theirs, **{"model.sig": File((downloaded / "model.sig").read_bytes())})
    words = ("verify", "hf://org/sql", "--key", "team.pub", "--signed-as", "downloaded")
    assert "signed as downloaded" in go(*words).stdout
    go("pull", "hf://org/sql", "-o", "out")
    files(hub)["README.md"] = File(b"# Another\n")
    assert "README.md (changed)" in go(*words, code=1).stdout


def test_what_a_hub_cannot_keep_is_said(go: Run, make: Make, hub: Hub, tmp_path: Path) -> None:
    go("push", make("sql"), "team/sql")
    for key in ("team", "other"):
        if key == "other":
            go("key", "generate", key)
        go("sign", "team/sql", "--key", f"{key}.key")
    notes = go("push", "team/sql", "hf://org/sql").stderr
    assert "keeps one model.sig and no attachments, so one other claim stays behind" in notes
    assert "README.md is completed on the hub, so that other programs find it changed" in notes
