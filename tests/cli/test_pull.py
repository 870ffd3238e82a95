"""`adapterhub pull` into a folder that is there: the same version, an older one, one with changes, and other things."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from adapterhub.digest import sha256_file
from adapterhub.manifest import oci_manifest
from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.fixtures import Filled
from tests.support.folders import base, two_adapters

# Ends the process at the rename with this number, before it happens.
_KILL = """
import os, sys
left = {at}
def hook(event, args):
    global left
    if event == "os.rename" and os.fsdecode(args[1]).rpartition("/")[2].startswith((".out.old", "out")):
        left -= 1
        if left < 0:
            os._exit(99)
sys.addaudithook(hook)
"""


@pytest.fixture
def team(run: Run, make: Make, filled: Filled, tmp_path: Path) -> Path:
    """team/sql:v1 and v2, which differ in the weights, and v1 in `out`."""

    def commands() -> None:
        for seed in (1, 2):
            run("push", make(f"v{seed}", seed), "team/sql")
        run("pull", "team/sql:v1", "-o", "out")

    return filled("team", tmp_path, commands) / "out"


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".out")]


def test_the_same_version_is_there_already(run: Run, team: Path) -> None:
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in team.iterdir()}
    assert run("pull", "team/sql:v1", "-o", "out").stdout.startswith("already there: out: team/sql:v1, ")
    assert json.loads(run("pull", "team/sql:v1", "-o", "out", "--json").stdout)["new"] is False
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in team.iterdir()} == before


def test_another_version_replaces_one_that_was_not_modified(run: Run, team: Path, tmp_path: Path) -> None:
    inodes = {path.name: path.stat().st_ino for path in team.iterdir()}
    result = run("pull", "team/sql:v2", "-o", "out")
    assert result.stdout.startswith("out: team/sql:v2, ")
    assert result.stderr.startswith("replaces the version sha256:")
    run("pull", "team/sql:v2", "-o", "fresh")
    assert contents(team) == contents(tmp_path / "fresh")
    same = {name for name, inode in inodes.items() if (team / name).stat().st_ino == inode}
    assert same == {"README.md", "adapter_config.json"}  # the weights and adapter.json changed
    assert hidden(tmp_path) == []


def test_a_folder_with_changes_is_refused_by_the_names_of_the_files(run: Run, team: Path) -> None:
    (team / "README.md").write_text("mine")
    (team / "notes.txt").write_text("mine")
    before = contents(team)
    for ref in ("team/sql:v1", "team/sql:v2"):
        error = run("pull", ref, "-o", "out", code=2).stderr
        assert "out: exists, and is not as its adapter.json records it: README.md (edited), notes.txt (added)" in error
        assert "--replace" in error
        assert contents(team) == before
    result = run("pull", "team/sql:v2", "-o", "out", "--replace")
    assert result.stderr == "replaces what has changed in out: README.md (edited), notes.txt (added)\n"
    assert oci_manifest.build(team).digest in run("log", "team/sql", "--json").stdout
    assert not (team / "notes.txt").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train.py", "exists, and has files that are part of no version: train.py (added). Name another, or replace"),
        (".git/config", "exists, and has files that are part of no version: .git (added). Name another, or replace"),
        (
            "sub/more.md",
            "exists, and is not as its adapter.json records it: sub/more.md (added). Name another, or replace",
        ),
    ],
)
def test_a_file_of_no_version_is_never_lost(run: Run, team: Path, name: str, words: str) -> None:
    (team / name).parent.mkdir(exist_ok=True)
    (team / name).write_text("mine")
    assert f"error: out: {words} it with --replace  [output-exists]\n" in run("pull", "team/sql:v2", "-o", "out", code=2).stderr
    if name.startswith(".git"):
        error = run("pull", "team/sql:v2", "-o", "out", "--replace", code=2).stderr
        assert "out: contains .git, which is no part of an earlier output" in error
    assert (team / name).read_text() == "mine"


def test_an_adapter_that_is_stored_nowhere_is_not_replaced(run: Run, team: Path, make: Make, tmp_path: Path) -> None:
    """A folder that was just trained has an adapter.json that names its files too."""
    trained_folder = make("trained", 5)
    (trained_folder / "adapter.json").write_bytes(_document(trained_folder))
    shutil.rmtree(team)
    trained_folder.rename(team)
    before = contents(team)
    assert "out: already exists" in run("pull", "team/sql:v2", "-o", "out", code=2).stderr
    assert contents(team) == before
    run("push", "out", "team/other")
    run("pull", "team/sql:v2", "-o", "out")


def _document(folder: Path) -> bytes:
    from adapterhub.manifest import derive

    return derive.finalize(folder)[1]


def test_links_and_files_are_not_replaced(run: Run, team: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(team)
    (tmp_path / "file").write_text("mine")
    before = contents(team)
    for name in ("link", "file"):
        for flags in ((), ("--replace",)):
            run("pull", "team/sql:v2", "-o", name, *flags, code=2)
    assert contents(team) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_no_adapter_is_not_replaced(run: Run, team: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_text("mine")
    assert "already exists" in run("pull", "team/sql:v2", "-o", "photos", code=2).stderr
    error = run("pull", "team/sql:v2", "-o", "photos", "--replace", code=2).stderr
    assert "photos: is not an earlier output: it contains neither an adapter nor a model" in error
    assert "is the working folder" in run("pull", "team/sql:v2", "-o", ".", cwd=team, code=2).stderr


def test_a_folder_that_is_read_meanwhile_stays_readable(run: Run, team: Path) -> None:
    with open(team / "README.md") as held_file, open(team / "adapter_model.safetensors", "rb") as old:
        run("pull", "team/sql:v2", "-o", "out")
        assert os.path.samestat(os.fstat(held_file.fileno()), (team / "README.md").stat())
        assert len(old.read()) > 100


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_kill_at_any_rename_leaves_the_old_or_the_new_version(started: Run, team: Path, tmp_path: Path, at: int) -> None:
    old = contents(team)
    result = started("pull", "team/sql:v2", "-o", "out", code=None, first=_KILL.format(at=at))
    assert result.returncode == (99 if at < 2 else 0)
    if team.exists():
        assert contents(team) in (old, contents(tmp_path / "v2") | _manifest(team))
    else:
        (aside,) = tmp_path.glob(".out.old-*")
        assert contents(aside) == old
    started("pull", "team/sql:v1", "-o", "out")
    assert contents(team) == old
    started("pull", "team/sql:v2", "-o", "out")
    assert hidden(tmp_path) == []


def _manifest(folder: Path) -> dict[str, str]:
    return {"adapter.json": sha256_file(folder / "adapter.json")}


def test_a_pull_from_elsewhere_replaces_and_receives_only_what_changed(run: Run, team: Path, host: str, tmp_path: Path) -> None:
    address = f"oci://{host}/sync/{tmp_path.name.lower().replace('_', '-')}"
    for number in (1, 2):
        run("copy", f"team/sql:v{number}", f"{address}:v{number}")
    shutil.rmtree(team)
    run("pull", f"{address}:v1", "-o", "out", "--registry", "empty")
    inode = (team / "README.md").stat().st_ino
    result = run("pull", f"{address}:v2", "-o", "out", "--registry", "empty", "--events")
    sizes = {path.name: path.stat().st_size for path in team.iterdir()}
    totals = [json.loads(line).get("total") for line in result.stderr.splitlines() if line.startswith("{")]
    assert set(totals) <= {None, sizes["adapter.json"] + sizes["adapter_model.safetensors"]}
    assert (team / "README.md").stat().st_ino == inode
    (team / "README.md").write_text("mine")
    assert "README.md (edited)" in run("pull", f"{address}:v1", "-o", "out", code=2).stderr
    run("pull", f"{address}:v1", "-o", "out", "--replace")


# ---- outputs that are replaced


@pytest.fixture
def two(run: Run, filled: Filled, tmp_path: Path) -> Path:
    """A base, two adapters `a` and `b` on it, and a full fine-tune of it; team/a and team/b in a registry."""

    def commands() -> None:
        base(tmp_path / "base", 2)
        two_adapters(tmp_path)
        for name in "ab":
            run("push", name, f"team/{name}", "--base", "base")
        run("merge", "./a", "--into", "base", "-o", "tuned")

    return filled("two", tmp_path, commands)


OUTPUTS = {
    "convert to a file": ("convert {name} out.gguf --to gguf --base base", "out.gguf"),
    "convert to a folder": ("convert {name} out --to mlx --base base", "out"),
    "merge": ("merge a {name} -o out", "out"),
    "merge into a base": ("merge ./{name} --into base -o out", "out"),
    "recipe": ("merge team/{name} --into base --recipe-only -o out.json", "out.json"),
    "extract": ("extract tuned --base base --rank 1 -o out", "out"),
    "bundle to a file": ("bundle team/{name} -o out.tar", "out.tar"),
    "bundle to a folder": ("bundle team/{name} -o out", "out"),
    "pull as another format": ("pull team/{name} --to mlx --base base -o out", "out"),
}


@pytest.mark.parametrize("output_kind", OUTPUTS)
def test_an_earlier_output_is_replaced_only_when_that_is_asked_for(run: Run, two: Path, output_kind: str) -> None:
    line, out = OUTPUTS[output_kind]
    run(*line.format(name="a").split())
    before = _digests(two / out)
    error = run(*line.format(name="b").split(), code=2).stderr
    assert f"{out}: already exists. Name another, or replace it with --replace" in error.replace("./out", "out")
    assert _digests(two / out) == before
    run(*line.format(name="b").split(), "--replace")
    assert output_kind == "extract" or _digests(two / out) != before
    assert hidden(two) == []


@pytest.mark.parametrize("output_kind", OUTPUTS)
def test_files_that_an_output_has_again_are_not_touched(run: Run, two: Path, output_kind: str) -> None:
    line, out = OUTPUTS[output_kind]
    run(*line.format(name="a").split())
    files = [path for path in (two / out, *(two / out).rglob("*")) if path.is_file()]
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}
    run(*line.format(name="a").split(), "--replace")
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files} == before
    assert hidden(two) == []


def _digests(path: Path) -> dict[str, str]:
    return contents(path) if path.is_dir() else {"": sha256_file(path)}


def test_an_output_replaces_no_other_kind_and_not_its_own_source(run: Run, two: Path) -> None:
    run("list")  # which notes in the index of a copied registry that its logs were compared
    before = _digests(two)
    for line, says in (
        (
            "merge a b -o base --replace",
            "base: is a model, and would be replaced by an adapter. Remove it yourself, or name another output",
        ),
        ("merge ./a --into base -o base --replace", "base: is the source or contains it"),
        ("convert a a --to mlx --base base --replace", "a: is the source or contains it"),
        ("merge a b -o a --replace", "a: is the source or contains it"),
        ("convert a base/config.json --to mlx --base base --replace", "is not a folder, and the output is one"),
    ):
        assert says in run(*line.split(), code=2).stderr
    assert _digests(two) == before


def test_an_interrupted_pull_reports_that_the_same_command_resumes(started: Run, team: Path) -> None:
    stop = """
import os, sys
def hook(event, args):
    if event == "os.rename" and ".out.old-" in os.fsdecode(args[1]):
        raise KeyboardInterrupt
sys.addaudithook(hook)
"""
    before = contents(team)
    result = started("pull", "team/sql:v2", "-o", "out", code=130, first=stop)
    assert "interrupted; the same command resumes" in result.stderr
    assert contents(team) == before
