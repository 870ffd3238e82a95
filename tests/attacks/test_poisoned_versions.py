"""One version, log or blob that is wrong stops nothing else: the others are listed, checked, pulled and removed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.moves import now
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Entry
from tests.conftest import Run
from tests.support.adapters import Make

GOOD, BAD = Ref.parse("team/good"), Ref.parse("team/bad")


@pytest.fixture
def root(make: Make, tmp_path: Path) -> Path:
    """A name that stays as it is, and one to be poisoned."""
    with Registry.init(tmp_path / "r") as registry:
        registry.push(make("good", 1), GOOD)
        registry.push(make("bad", 2), BAD)
    return tmp_path / "r"


def named(root: Path, raw: bytes) -> None:
    """Have the log push a manifest of these bytes."""
    with Registry.open(root) as registry:
        digest, size = registry.store.put_bytes(raw)
        registry.move(
            "team/bad",
            lambda state: Entry(
                state.name, state.seq + 1, "push", now(), digest, size, state.number + 1, ("latest",), state.head
            ),
        )


def manifest(root: Path) -> dict[str, object]:
    with Registry.open(root) as registry:
        document: dict[str, object] = json.loads(registry.store.read_document(registry.resolve(BAD).digest))
    return document


def no_json(root: Path) -> None:
    named(root, b"{")


def no_manifest(root: Path) -> None:
    named(root, b'{"schemaVersion": 2, "layers": 5}')


def nested(root: Path) -> None:
    named(root, b"[" * 100_000)


def absurd_names(root: Path) -> None:
    document = manifest(root)
    layers = document["layers"]
    assert isinstance(layers, list)
    layers[0]["annotations"] = {oci_manifest.TITLE: "../../x"}
    named(root, json.dumps(document).encode())


def both_kinds(root: Path) -> None:
    named(root, json.dumps({**manifest(root), "manifests": []}).encode())


def missing_manifest(root: Path) -> None:
    with Registry.open(root) as registry:
        path = registry.store.blob_path(registry.resolve(BAD).digest)
    path.unlink()


def a_folder_for_a_blob(root: Path) -> None:
    with Registry.open(root) as registry:
        path = registry.store.blob_path(registry.files(registry.resolve(BAD))[-1].digest)
    path.unlink()
    path.mkdir()


VERSIONS = [no_json, no_manifest, nested, absurd_names, both_kinds, missing_manifest, a_folder_for_a_blob]


def others_work(root: Path, run: Run) -> None:
    at = ("--registry", root)
    assert "team/good:v1" in run("list", *at).stdout
    for command in (("show", "team/good"), ("verify", "team/good"), ("search", "test")):
        run(*command, *at)
    out = root.parent / f"out{len(list(root.parent.iterdir()))}"
    run("pull", "team/good", "-o", out, *at)
    run("tag", "team/good", "fine", *at)


@pytest.mark.parametrize("poison", VERSIONS)
def test_a_poisoned_version_stops_nothing_else_and_can_be_removed(root: Path, run: Run, poison) -> None:  # type: ignore[no-untyped-def]
    poison(root)
    at = ("--registry", root)
    others_work(root, run)
    result = run("fsck", "--json", *at, code=1)
    errors = [finding for finding in json.loads(result.stdout)["findings"] if finding["severity"] == "error"]
    assert errors
    assert not any("team/good" in finding["where"] + finding["what"] for finding in errors)
    run("fsck", "--rebuild-index", *at, code=1)
    assert run("gc", "--grace", "0", *at, code=None).returncode in (0, 4)
    run("verify", "team/good", *at)
    run("rm", "team/bad", *at)
    run("gc", "--grace", "0", *at)
    others_work(root, run)


FACTS = {
    "nesting": b"[" * 200,
    "a list": b"[]",
    "an infinite number": b'{"r": 1e999}',
    "a key twice": b'{"r": 1, "r": 2}',
}


@pytest.mark.parametrize("raw", FACTS.values(), ids=FACTS)
def test_a_version_whose_documents_cannot_be_read_is_listed_and_marked_as_not_indexed(root: Path, run: Run, raw: bytes) -> None:
    with Registry.open(root) as registry:
        digest, size = registry.store.put_bytes(raw)
    document = manifest(root)
    layers = document["layers"]
    assert isinstance(layers, list)
    described = next(layer for layer in layers if layer["annotations"][oci_manifest.TITLE] == "adapter.json")
    described.update(digest=digest, size=size)
    named(root, json.dumps(document).encode())
    at = ("--registry", root)
    assert "team/bad:v2" in run("list", "team/bad", *at).stdout
    for command in (["fsck"], ["fsck", "--quick"], ["fsck", "--rebuild-index"]):
        result = run(*command, *at, code=None)
        assert "note[not-indexed] team/bad:v2: is not found by searches" in result.stdout
        assert result.returncode == (0 if "--quick" in command else 1)
        assert "--quick" in command or "error[wrong-facts] team/bad:v2: adapter.json: " in result.stdout
        assert "catalog" not in result.stdout
    others_work(root, run)


LOGS = {
    "no JSON": b"{",
    "a digest that is none": b'{"digest":"sha256:zz","name":"team/bad","number":2,"op":"push","previous":"","seq":2,"size":1,'
    b'"tags":[],"time":"","version":1}',
    "a number of 10 digits in a tag": b'{"digest":"","name":"team/bad","number":1,"op":"tag","previous":"","seq":2,"size":1,'
    b'"tags":["v9999999999"],"time":"","version":1}',
    "another name": b'{"digest":"","name":"team/good","number":1,"op":"delete","previous":"","seq":2,"size":1,"tags":[],'
    b'"time":"","version":1}',
    "an entry before it that is not": b'{"digest":"","name":"team/bad","number":1,"op":"delete","previous":"sha256:00","seq":2,'
    b'"size":0,"tags":[],"time":"","version":1}',
    "nesting": b"[" * 100_000,
}


@pytest.mark.parametrize("raw", LOGS.values(), ids=LOGS)
def test_a_broken_entry_stops_its_own_name_only(root: Path, run: Run, raw: bytes) -> None:
    (root / ".adapterhub/refs/team/bad/00000002.json").write_bytes(raw)
    at = ("--registry", root)
    others_work(root, run)
    result = run("fsck", *at, code=1)
    assert "error[broken-log]" in result.stdout
    assert "team/good:" not in result.stdout
    assert run("rm", "team/bad", *at, code=4).stderr.startswith("error: ")
    run("gc", "--grace", "0", *at, code=4)  # what the rest of that log needs is unknown
    run("fsck", "--rebuild-index", *at, code=1)
    others_work(root, run)


@pytest.mark.parametrize("name", ["a b", "x\n", "\x1b[31m", "..x", "UPPER", "n" * 200, os.fsdecode(b"\xff")])
def test_a_folder_among_the_logs_that_is_no_name_is_a_note(root: Path, run: Run, name: str) -> None:
    folder = root / ".adapterhub/refs/team" / name
    folder.mkdir()
    (folder / "00000001.json").write_bytes((root / ".adapterhub/refs/team/bad/00000001.json").read_bytes())
    result = run("fsck", "--registry", root)
    assert "note[foreign]" in result.stdout
    assert "\x1b" not in result.stdout
    (root / "registry.db").unlink()
    others_work(root, run)
    run("gc", "--grace", "0", "--registry", root)
