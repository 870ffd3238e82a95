"""What a target means: a ref, an address or a path. What looks like a ref and is not one never becomes a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.adapters import write_adapter

# Commands whose target may be a ref or a folder, and those that write a path only.
REF_OR_FOLDER = ("copy team/sql {}", "copy team/sql {} --dry-run", "merge team/sql team/chat -o {}")
PATH_ONLY = (
    "pull team/sql -o {}",
    "pull team/sql -o {} --dry-run",
    "pull team/sql --to gguf -o {}",
    "convert team/sql {} --to mlx",
    "bundle team/sql -o {}",
    "rebuild team/both -o {}",
)


@pytest.fixture
def home(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a registry of two adapters and their merge."""
    monkeypatch.chdir(tmp_path)
    run("init")
    for seed, name in ((1, "sql"), (2, "chat")):
        run("push", write_adapter(tmp_path / "made" / name, seed), f"team/{name}")
    run("merge", "team/sql", "team/chat", "-o", "team/both")
    return tmp_path


def files(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (
            "lab/x--y",
            "'x--y' cannot be part of a name. Write lab/x-y, or hf://lab/x--y for one on the Hub; for a folder, write",
        ),
        ("Lab/X", "'Lab' cannot be part of a name. Write lab/x, or hf://Lab/X for one on the Hub; for a folder, write ./Lab/X"),
        ("lab/x:v03", "v03 is not a version number. They are v1, v2 and so on; for a folder, write ./lab/x:v03"),
        ("lab/x@sha256:zz", "'sha256:zz' is not a digest."),
        ("lab/x:.a", "'.a' is not a tag."),
        ("x:prod", "'x' is not namespace/name. Write it like team/sql; for a folder, write ./x:prod"),
        ("ghcr.io/lab/x", "not a ref and not an address. Write oci://ghcr.io/lab/x; for a folder, write ./ghcr.io/lab/x"),
    ],
)
@pytest.mark.parametrize("command", REF_OR_FOLDER)
def test_what_looks_like_a_ref_and_is_not_one_is_refused_by_name(
    home: Path, run: Run, command: str, target: str, says: str
) -> None:
    before = files(home)
    result = run(*command.format(target).split(), code=2)
    assert f"error: {target}: {says}" in result.stderr
    assert result.stderr.endswith("[invalid-ref]\n")
    assert files(home) == before


@pytest.mark.parametrize("target", ["lab/x:prod", "lab/x--y@sha256:zz", "lab/a/b:c"])
@pytest.mark.parametrize("command", PATH_ONLY)
def test_a_ref_is_no_output_of_a_command_that_writes_paths(home: Path, run: Run, command: str, target: str) -> None:
    before = files(home)
    words = "looks like a ref, and this is written to a folder or a file"
    assert (
        f"error: {target}: {words}. Write ./{target} for the path  [invalid-ref]"
        in run(*command.format(target).split(), code=2).stderr
    )
    assert files(home) == before


@pytest.mark.parametrize("command", PATH_ONLY)
def test_an_address_is_no_output_of_a_command_that_writes_paths(home: Path, run: Run, command: str) -> None:
    before = files(home)
    says = run(*command.format("oci://127.0.0.1:9/lab/x").split(), code=2).stderr
    assert "is an address, and this is written to a folder or a file. Write a path" in says
    assert files(home) == before


@pytest.mark.parametrize(
    "target", ["./lab/x--y", "./Lab/X:prod", "lab/x--y/", "sub/x--y", "word", "lab/deep/x--y", "../{}/out--x"]
)
@pytest.mark.parametrize("command", [REF_OR_FOLDER[0], REF_OR_FOLDER[2], PATH_ONLY[0], PATH_ONLY[3], PATH_ONLY[4]])
def test_what_is_clearly_a_path_is_one(home: Path, run: Run, command: str, target: str) -> None:
    (home / "sub").mkdir()
    target = target.format(home.name)
    run(*command.format(target).split())
    assert (home / target).is_dir()


def test_a_folder_that_is_there_is_one_whatever_its_name(home: Path, run: Run) -> None:
    run("copy", "team/sql", "./Lab/X")
    assert "already there" in run("copy", "team/sql", "Lab/X").stdout
