"""Links travel in a repository: whoever works in a clone touches nothing outside, and reads one line about the link."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.registry.registry import Registry

Run = Callable[..., subprocess.CompletedProcess[str]]
Make = Callable[..., Path]
OLD = 1_000_000_000  # seconds since 1970: over any grace period
FOLDERS = ["bases", "blobs", "cache", "leases", "merges", "packs", "pending", "refs", "tensors", "tmp"]


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder outside the clone, with an old file and an old project in it."""
    folder = tmp_path / "victim"
    (folder / "project" / "source").mkdir(parents=True)
    for path in (folder / "id", folder / f"{'0' * 64}", folder / "project" / "source" / "main.c"):
        path.write_text("precious")
        os.utime(path, (OLD, OLD))
    for path in (folder / "project" / "source", folder / "project", folder):
        os.utime(path, (OLD, OLD))
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that brings a registry."""
    folder = tmp_path / "clone"
    Registry.init(folder).close()
    return folder


def contents(folder: Path) -> dict[str, str]:
    """The files below a folder, and the names of its folders."""
    return {str(path.relative_to(folder)): "" if path.is_dir() else path.read_text() for path in sorted(folder.rglob("*"))}


def link(path: Path, target: Path) -> None:
    """Put a relative link, as git brings it, in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent))


def refused(result: subprocess.CompletedProcess[str], path: Path | str) -> None:
    """One line on stderr that names the link."""
    assert [line for line in result.stderr.splitlines() if not line.startswith("warning")] == result.stderr.splitlines()[-1:]
    assert str(path) in result.stderr
    assert "a link" in result.stderr


@pytest.mark.parametrize("folder", FOLDERS)
def test_gc_removes_nothing_behind_a_folder_of_the_store_that_is_a_link(
    run: Run, clone: Path, victim: Path, folder: str
) -> None:
    before = contents(victim)
    link(clone / ".adapterhub" / folder, victim)
    refused(run("gc", "--grace", 0, cwd=clone, code=6), f".adapterhub/{folder}")
    assert contents(victim) == before


@pytest.mark.parametrize(
    "words",
    [
        ("push", "ADAPTER", "team/sql"),
        ("list",),
        ("fsck",),
        ("fsck", "--rebuild-index"),
        ("pack",),
        ("pack", "--undo"),
        ("init",),
    ],
)
def test_every_command_refuses_a_store_with_a_link_in_it(
    run: Run, make: Make, clone: Path, victim: Path, words: tuple[str, ...]
) -> None:
    before, adapter = contents(victim), make()
    link(clone / ".adapterhub" / "tmp", victim)
    refused(run(*(adapter if word == "ADAPTER" else word for word in words), cwd=clone, code=6), ".adapterhub/tmp")
    assert contents(victim) == before


@pytest.mark.parametrize("place", ["blobs/sha256", "refs/team", "refs/team/sql"])
def test_a_push_writes_nothing_behind_a_link_further_down(run: Run, make: Make, clone: Path, victim: Path, place: str) -> None:
    before = contents(victim)
    link(clone / ".adapterhub" / place, victim)
    refused(run("push", make(), "team/sql", cwd=clone, code=6), f".adapterhub/{place}")
    assert contents(victim) == before


def test_a_store_that_is_itself_a_link_is_refused_and_one_whose_registry_is_reached_by_a_link_is_not(
    run: Run, make: Make, clone: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    Registry.init(mine).close()
    link(clone / ".adapterhub", mine / ".adapterhub")
    refused(run("gc", cwd=clone, code=6), ".adapterhub")
    (tmp_path / "by-link").symlink_to(mine)
    run("--registry", tmp_path / "by-link", "push", make(), "team/sql")
    assert "team/sql" in run("--registry", mine, "list").stdout


@pytest.mark.parametrize("name", ["registry.db", "registry.db-wal", "registry.db-journal"])
def test_a_database_that_is_a_link_is_refused(run: Run, make: Make, clone: Path, victim: Path, name: str) -> None:
    link(clone / name, victim / "id")
    refused(run("push", make(), "team/sql", cwd=clone, code=6), name)
    assert (victim / "id").read_text() == "precious"


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
def test_a_file_of_the_store_that_is_a_link_is_refused(run: Run, make: Make, clone: Path, victim: Path, name: str) -> None:
    link(clone / ".adapterhub" / name, victim / "id")
    refused(run("push", make(), "team/sql", cwd=clone, code=6), name)
    assert (victim / "id").read_text() == "precious"


# ---- the project's own files


@pytest.fixture
def locked(run: Run, make: Make, tmp_path: Path) -> Path:
    """A project whose lock file has one adapter of an image layout elsewhere."""
    project = tmp_path / "project"
    project.mkdir()
    address = f"layout://{tmp_path / 'hub'}:team/sql"
    run("push", make(), address)
    run("lock", address, cwd=project)
    return project


@pytest.mark.parametrize("place", ["adapters", "adapters/team", "adapters/team/sql"])
def test_what_a_lock_file_names_is_not_written_through_a_link(run: Run, locked: Path, victim: Path, place: str) -> None:
    before = contents(victim)
    link(locked / place, victim)
    refused(run("pull", "--locked", cwd=locked, code=6), place)
    assert contents(victim) == before


def test_a_folder_that_the_user_names_may_be_a_link(run: Run, locked: Path, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    link(locked / "adapters", tmp_path / "big")
    run("pull", "--locked", "-o", "adapters", cwd=locked)
    assert (tmp_path / "big" / "team" / "sql" / "adapter_config.json").is_file()


def test_incomplete_files_that_a_repository_brings_are_not_written_through(run: Run, locked: Path, victim: Path) -> None:
    (entry,) = json.loads((locked / "adapters.lock").read_text())["adapters"].values()
    waiting = locked / "adapters" / "team" / f".sql.pull-{entry['digest'][7:19]}"
    blobs = [path.name for path in (locked.parent / "hub" / "blobs" / "sha256").iterdir()]
    for blob in blobs:
        for suffix in (".part.json", ".part.new"):
            link(waiting / f"{blob}{suffix}", victim / "id")
    run("pull", "--locked", cwd=locked)
    shutil.rmtree(locked / "adapters")
    for blob in blobs:
        link(waiting / f"{blob}.part", victim / "id")
    refused(run("pull", "--locked", cwd=locked, code=6), waiting.name)
    assert (victim / "id").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapters.lock", ("lock", "layout://HUB:team/sql")),
        ("adapters.lock", ("pull", "--locked")),
        ("adapterhub.toml", ("remote", "add", "evil", "oci://evil.example/x", "--project")),
        ("adapterhub.toml", ("init", "--project")),
        ("adapterhub.toml", ("list",)),
    ],
)
def test_a_file_of_a_project_is_not_read_or_written_through_a_link(
    run: Run, locked: Path, victim: Path, name: str, words: tuple[str, ...]
) -> None:
    link(locked / name, victim / "id")
    refused(run(*(word.replace("HUB", str(locked.parent / "hub")) for word in words), cwd=locked, code=6), name)
    assert (victim / "id").read_text() == "precious"


@pytest.mark.parametrize("place", ["ingest", "blobs", "blobs/sha256"])
def test_a_push_to_an_image_layout_writes_nothing_behind_a_link_in_it(
    run: Run, make: Make, locked: Path, victim: Path, place: str
) -> None:
    before, hub = contents(victim), locked.parent / "hub"
    link(hub / place, victim)
    refused(run("push", make("other", seed=1), f"layout://{hub}:team/other", code=6), place)
    assert contents(victim) == before
