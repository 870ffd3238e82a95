"""A packed registry is the same registry: every version reads as before, whatever happens while it is packed."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub.maintenance import compress
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.maintenance.repair import repair
from adapterhub.maintenance.verify import verify
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.store.packs import pack_chains
from adapterhub_converters.errors import (
    AdapterhubError,
    IntegrityError,
    NotFoundError,
)
from adapterhub_converters.formats import peft
from tests.conftest import Run, need_program
from tests.support.trained_versions import check_whole, weights, write_trained

SQL = Ref.parse("team/sql")
Trained = Callable[..., Path]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return functools.partial(write_trained, tmp_path)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.init(tmp_path / "registry")


def blobs(registry: Registry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in registry.store.blobs()}


# ---- the same registry


def test_a_packed_version_is_pulled_byte_for_byte_under_its_old_digest(
    registry: Registry, trained: Trained, tmp_path: Path
) -> None:
    source = trained("a")
    version = registry.push(source, SQL)
    before = blobs(registry)
    (change,) = [change for change in compress.pack(registry) if change.outcome == "packed"]
    assert (change.ref, change.path, change.digest) == ("team/sql:v1", peft.WEIGHTS, weights(registry, "team/sql"))
    assert change.stored == registry.store.stored_size(change.digest) < 0.7 * change.size
    assert not registry.store.blob_path(change.digest).exists()
    assert registry.pull(SQL, tmp_path / "out").digest == version.digest
    for path in source.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert fsck(registry) == verify(registry, SQL) == []
    assert not registry.push(source, SQL).new  # a push finds the packed blob and writes no second one
    assert not registry.store.blob_path(change.digest).exists()
    assert [change.outcome for change in compress.unpack(registry)] == ["unpacked"]
    assert blobs(registry) == before
    assert list(registry.store.packs.digests()) == []


def test_checkpoints_become_differences_to_near_ones_and_no_chain_is_long(
    registry: Registry, trained: Trained, tmp_path: Path
) -> None:
    for step in range(7):
        registry.push(trained(f"s{step}", step=step), SQL)
    version = registry.push(trained("other", seed=5), Ref.parse("team/other"))
    changes = [change for change in compress.pack(registry, ["team"]) if change.outcome == "packed"]
    assert {change.ref for change in changes if not change.parent} == {"team/other:v1", "team/sql:v1"}
    assert all(change.stored < 0.45 * change.size for change in changes if change.parent)
    parents = registry.store.packs.parents()
    assert max(len(pack_chains.chain(digest, parents)) for digest in parents) == pack_chains.MAX_DEPTH
    check_whole(registry)
    registry.pull(SQL, tmp_path / "out")
    assert (tmp_path / "out" / peft.WEIGHTS).read_bytes() == (tmp_path / "s6" / peft.WEIGHTS).read_bytes()
    compress.unpack(registry, ["team/sql:v1"])  # a parent of others
    check_whole(registry)
    assert registry.resolve(Ref.parse("team/other")).digest == version.digest
    # Plain again, v1 finds a near one in v2, but v2 is a difference to it.
    assert [change.parent for change in compress.pack(registry, ["team/sql:v1"]) if change.path == peft.WEIGHTS] == [""]


def test_another_run_of_the_namespace_may_be_the_parent(registry: Registry, trained: Trained) -> None:
    registry.push(trained("a", step=1), Ref.parse("team/step1"))
    registry.push(trained("b", step=2), Ref.parse("team/step2"))
    registry.push(trained("c", step=2, seed=3), Ref.parse("elsewhere/step2"))
    parents = {change.ref: change.parent for change in compress.pack(registry) if change.path == peft.WEIGHTS}
    assert parents == {"elsewhere/step2:v1": "", "team/step1:v1": "", "team/step2:v1": weights(registry, "team/step1")}


def test_a_dry_run_changes_nothing_and_reports_what_would_change(registry: Registry, trained: Trained) -> None:
    registry.push(trained("a"), SQL)
    registry.push(trained("b", step=1), SQL)
    before = blobs(registry)
    planned = compress.pack(registry, dry_run=True)
    assert blobs(registry) == before
    assert list(registry.store.packs.digests()) == []
    assert compress.pack(registry) == planned


def test_a_name_that_is_not_there_is_one_line(registry: Registry) -> None:
    for act in (compress.pack, compress.unpack):
        with pytest.raises(NotFoundError, match="no adapter of this name or namespace"):
            act(registry, ["team/none"])


# ---- what is damaged or missing


def test_a_blob_that_is_damaged_already_stays_as_it_is(registry: Registry, trained: Trained) -> None:
    registry.push(trained("a"), SQL)
    path = registry.store.blob_path(weights(registry, "team/sql"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="its bytes do not have the digest of its name; it was not packed"):
        compress.pack(registry)
    assert path.read_bytes() == raw
    assert list(registry.store.packs.digests()) == []
    assert list((registry.store.root / "tmp").iterdir()) == []


def test_a_difference_without_its_parent_is_missing_until_both_are_pushed_again(
    registry: Registry, trained: Trained, tmp_path: Path
) -> None:
    folders = [trained("a"), trained("b", step=1)]
    for folder in folders:
        registry.push(folder, SQL)
    compress.pack(registry)
    parent, child = weights(registry, "team/sql:v1"), weights(registry, "team/sql:v2")
    registry.store.packs.path(parent).unlink()
    assert registry.store.size(child) is None
    assert {finding.code for finding in fsck(registry)} == {"missing", "broken-pack", "damaged"}
    assert [finding.code for finding in verify(registry, Ref.parse("team/sql:v2"))] == ["missing"]
    with pytest.raises(IntegrityError, match=parent):
        registry.pull(SQL, tmp_path / "out")
    registry.push(folders[0], SQL)
    check_whole(registry)


def test_a_pack_that_is_a_difference_to_itself_ends_in_one_line(registry: Registry, trained: Trained) -> None:
    for step in range(2):
        registry.push(trained(f"s{step}", step=step), SQL)
    compress.pack(registry)
    parent, child = weights(registry, "team/sql:v1"), weights(registry, "team/sql:v2")
    for digest in (parent, child):
        path = registry.store.packs.path(digest)
        raw = bytearray(path.read_bytes())
        raw[32:64] = bytes.fromhex(child[7:])
        path.chmod(0o644)
        path.write_bytes(raw)
    assert registry.store.size(child) is None
    assert {finding.code for finding in fsck(registry)} >= {"broken-pack"}
    assert [finding.code for finding in verify(registry, SQL)] == ["missing"]


def test_the_parent_of_a_needed_blob_is_no_orphan(registry: Registry, trained: Trained) -> None:
    registry.push(trained("a"), Ref.parse("team/first"))
    registry.push(trained("b", step=1), Ref.parse("team/second"))
    compress.pack(registry)
    parent, child = weights(registry, "team/first"), weights(registry, "team/second")
    assert registry.store.packs.parents() == {child: parent}
    registry.rm(Ref.parse("team/first"))
    (orphans,) = fsck(registry)
    assert orphans.what.startswith("3 blobs")  # what only the first version has: not the weights, which the second needs
    registry.rm(Ref.parse("team/second"))
    object_count = len(blobs(registry)) + len(registry.store.packs.files())
    assert fsck(registry)[0].what.startswith(f"{object_count} blobs")
    order = pack_chains.children_first([parent, child], registry.store.packs.parents())
    assert order == [child, parent]


def test_what_a_killed_writer_leaves_twice_is_tidied(registry: Registry, trained: Trained) -> None:
    registry.push(trained("a"), SQL)
    digest = weights(registry, "team/sql")
    plain = registry.store.blob_path(digest)
    content = plain.read_bytes()
    compress.pack(registry)
    plain.write_bytes(content)
    check_whole(registry)
    assert [change.outcome for change in compress.pack(registry)] == ["kept", "already"]
    assert not plain.exists()
    plain.write_bytes(content)
    compress.unpack(registry)
    assert plain.read_bytes() == content
    assert not registry.store.packs.path(digest).exists()
    registry.store.packs.path(digest).write_bytes(b"half a pack of nobody")
    compress.pack(registry)
    assert not plain.exists()
    check_whole(registry)


# ---- while others look


# ---- killed, or out of disk, anywhere

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(params=["pack", "unpack"])
def work(request: pytest.FixtureRequest, registry: Registry, trained: Trained) -> str:
    """What is done to a registry of two versions, of which the second packs as a difference to the first."""
    for step in range(2):
        registry.push(trained(f"s{step}", step=step), SQL)
    if request.param == "unpack":
        compress.pack(registry)
    registry.close()
    return str(request.param)


# ---- others, and the command line


@pytest.mark.peer
def test_skopeo_reads_plain_versions_next_to_packed_ones_and_packed_ones_once_unpacked(
    registry: Registry, trained: Trained, tmp_path: Path
) -> None:
    skopeo = need_program("skopeo")
    registry.push(trained("a"), SQL)
    registry.push(trained("b", seed=9), Ref.parse("team/plain"))
    compress.pack(registry, ["team/sql"])

    def copy(tag: str) -> int:
        command = [skopeo, "copy", f"oci:{registry.store.root}:{tag}", f"oci:{tmp_path}/out:x"]
        return subprocess.run(command, check=False, capture_output=True, timeout=60).returncode

    assert copy("team/plain:v1") == 0
    assert copy("team/sql:v1") != 0
    compress.unpack(registry, ["team/sql"])
    assert copy("team/sql:v1") == 0


def test_the_commands_report_what_they_did(registry: Registry, trained: Trained, run: Run, tmp_path: Path) -> None:
    registry.push(trained("a"), SQL)
    registry.push(trained("b", step=1), SQL)
    registry.close()
    at = ("--registry", registry.root)
    dry = json.loads(run("pack", "--dry-run", "--json", *at).stdout)
    packed = json.loads(run("pack", "team/sql", "--json", *at).stdout)
    assert (dry.pop("dry_run"), packed.pop("dry_run")) == (True, False)
    assert dry == packed
    assert [file["outcome"] for file in packed["files"]] == ["kept", "packed", "packed"]
    assert "0 files packed; 2 files already packed; 1 file not worth packing" in run("pack", *at).stdout
    table = run("du", *at).stdout
    assert "team/sql" in table
    assert "org/base: 2 versions of 1 adapter in" in table
    document = json.loads(run("du", "team", "--json", *at).stdout)
    assert document["total"]["stored"] < document["total"]["files"]
    assert run("verify", "team/sql", *at).stdout.startswith("team/sql: every byte matches")
    assert "2 files unpacked" in run("pack", "--undo", *at).stdout
    for command in (("pack", "team/x"), ("pack", "--undo", "team/x:v1"), ("du", "team/x")):
        assert run(*command, *at, code=3).stderr.startswith("error: team/x")


def test_without_zstandard_one_line_names_what_to_install(registry: Registry, trained: Trained, tmp_path: Path) -> None:
    registry.push(trained("a"), SQL)
    compress.pack(registry)
    registry.push(trained("b", seed=2), Ref.parse("team/plain"))
    registry.close()
    (tmp_path / "zstandard.py").write_text("raise ImportError")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from adapterhub.cli.main import main; main()"
    for words in (["pack"], ["pull", "team/sql"]):
        command = [sys.executable, "-c", code, str(tmp_path), *words, "--registry", str(registry.root)]
        result = subprocess.run(command, check=False, capture_output=True, text=True, env=ENV, cwd=tmp_path)
        assert (result.returncode, "Run `pip install zstandard`" in result.stderr) == (9, True), result.stderr


def test_a_damaged_pack_is_one_line_for_every_command(registry: Registry, trained: Trained, tmp_path: Path) -> None:
    registry.push(trained("a"), SQL)
    compress.pack(registry)
    path = registry.store.packs.path(weights(registry, "team/sql"))
    content, rng = path.read_bytes(), random.Random(0)
    path.chmod(0o644)
    for n in range(40):
        raw = bytearray(content)
        raw[rng.randrange(len(raw)) if n % 2 else rng.randrange(64)] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        for act in (
            lambda: registry.pull(SQL, tmp_path / "out"),
            lambda: compress.unpack(registry),
            lambda: fsck(registry),
            lambda: verify(registry, SQL),
        ):
            with contextlib.suppress(AdapterhubError):  # never anything else
                act()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        registry.store.blob_path(weights(registry, "team/sql")).unlink(missing_ok=True)
    path.write_bytes(content)
    check_whole(registry)


# ---- what goes, and what is put back


def old(registry: Registry) -> None:
    for path in registry.store.root.rglob("*"):
        os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("batch", [1, 256])
def test_a_collection_keeps_what_a_packed_blob_needs_and_takes_the_rest_in_order(
    registry: Registry, trained: Trained, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr("adapterhub.maintenance.gc._BATCH_SIZE", batch)
    registry.push(trained("a"), Ref.parse("team/first"))
    registry.push(trained("b", step=1), Ref.parse("team/second"))
    compress.pack(registry)
    parent, child = weights(registry, "team/first"), weights(registry, "team/second")
    registry.rm(Ref.parse("team/first"))
    assert gc(registry, grace=0).blobs == 3  # all but the weights
    assert registry.store.size(parent) is not None
    assert fsck(registry) == []
    registry.rm(Ref.parse("team/second"))
    old(registry)
    os.utime(registry.store.packs.path(child))  # a young one keeps what it is a difference to
    for path in (registry.store.root / "refs").rglob("*.json"):
        os.utime(path, (1e9, 1e9))
    assert gc(registry).waiting == 2
    assert registry.store.size(child) is not None
    dry = gc(registry, grace=0, dry_run=True)
    swept = gc(registry, grace=0)
    assert (dry.blobs, dry.size, dry.waiting) == (swept.blobs, swept.size, swept.waiting) == (2, swept.size, 0)
    assert registry.store.packs.files() == []
    assert blobs(registry) == {}


def test_a_pack_that_cannot_be_read_keeps_a_collection_from_all(registry: Registry, trained: Trained) -> None:
    for step in range(2):
        registry.push(trained(f"s{step}", step=step), SQL)
    compress.pack(registry)
    path = registry.store.packs.path(weights(registry, "team/sql:v2"))
    path.chmod(0o644)
    path.write_bytes(b"no pack")
    registry.store.put_bytes(b"nobody's")
    with pytest.raises(IntegrityError, match="so that its parent is unknown; nothing was removed"):
        gc(registry, grace=0)
    registry.rm(SQL)
    gc(registry, grace=0)
    assert (registry.store.packs.files(), blobs(registry)) == ([], {})


@pytest.mark.parametrize("damaged", ["parent", "child", "both", "parent beside a plain one"])
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_packs_are_healed(registry: Registry, trained: Trained, tmp_path: Path, damaged: str, packed: bool) -> None:
    for step in range(2):
        registry.push(trained(f"s{step}", step=step), SQL)
    shutil.copytree(registry.root, tmp_path / "copy")
    compress.pack(registry)
    parent, child = weights(registry, "team/sql:v1"), weights(registry, "team/sql:v2")
    if "plain" in damaged:
        registry.store.make_plain(parent, registry.store.size(parent) or 0)
    for digest in (parent, child):
        path = registry.store.packs.path(digest)
        if damaged.startswith("both" if damaged == "both" else "parent" if digest == parent else "child"):
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 3] ^= 1
            path.chmod(0o644)
            path.write_bytes(raw)
    assert any(finding.code == "broken-pack" for finding in fsck(registry))
    if packed:
        with Registry.open(tmp_path / "copy") as copy:
            compress.pack(copy)
    assert repair(registry, tmp_path / "copy")
    assert fsck(registry) == []
    check_whole(registry)


def test_a_parent_that_only_a_pack_needs_is_healed_too(registry: Registry, trained: Trained, tmp_path: Path) -> None:
    registry.push(trained("a"), Ref.parse("team/first"))
    registry.push(trained("b", step=1), Ref.parse("team/second"))
    compress.pack(registry)
    parent = weights(registry, "team/first")
    registry.rm(Ref.parse("team/first"))
    registry.store.packs.path(parent).unlink()
    assert repair(registry, tmp_path / "a")[0] == parent
    check_whole(registry)


def test_an_unpacked_blob_stays_when_its_pack_came_to_be_the_only_one(registry: Registry, trained: Trained) -> None:
    """As when one who packs removes the plain file between the two steps of one who unpacks, and the other way round."""
    registry.push(trained("a"), SQL)
    compress.pack(registry)
    digest = weights(registry, "team/sql")
    registry.store.make_plain(digest, registry.store.size(digest) or 0)
    compress.pack(registry)
    registry.store.drop_pack(digest)
    check_whole(registry)


def test_a_gc_packs_versions_of_over_a_day_where_the_registry_asks_for_it(
    trained: Trained, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(*words: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(run("gc", "--registry", tmp_path / "r", "--json", *words).stdout)
        return document

    with Registry.init(tmp_path / "r") as registry:
        monkeypatch.setattr("adapterhub.registry.moves.now", lambda: "2026-01-01T00:00:00Z")
        registry.push(trained("old"), SQL)
        monkeypatch.undo()
        registry.push(trained("new", step=1), SQL)
    assert report()["packed"] == 0
    (tmp_path / "r" / "adapterhub.toml").write_text("pack = true\n")
    assert report("--dry-run")["packed"] == 1
    pack_report = report()
    assert (pack_report["packed"], pack_report["packed_saving"] > 10_000) == (1, True)
    with Registry.open(tmp_path / "r") as registry:
        packed = {change.ref: change.outcome for change in compress.pack(registry, dry_run=True) if change.size > 10_000}
        assert packed == {"team/sql:v1": "already", "team/sql:v2": "packed"}
        assert fsck(registry) == []


@pytest.mark.parametrize("niceness", [0, 10])
def test_a_gc_packs_at_low_priority_whoever_starts_it(started: Run, tmp_path: Path, niceness: int) -> None:
    started("init", "r")
    (tmp_path / "r" / "adapterhub.toml").write_text("pack = true\n")
    own_niceness = os.nice(0)
    report = "import atexit, os; atexit.register(lambda: open('niceness', 'w').write(str(os.nice(0))))"
    started("gc", "--registry", "r", first=f"{report}; os.nice(max(0, {niceness} - os.nice(0)))")
    assert int((tmp_path / "niceness").read_text()) == max(own_niceness, 10)
