"""Folders in folders, deeper than Python recurses and than a path can be, in the place where a clone has an adapter."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Make = Callable[..., Path]


@pytest.fixture
def deep(make: Make) -> Iterator[Path]:
    """An adapter with 2,500 folders in each other."""
    folder = make("deep")
    handles = [os.open(folder, os.O_RDONLY)]
    for _ in range(2500):
        os.mkdir("d", dir_fd=handles[-1])
        handles.append(os.open("d", os.O_RDONLY, dir_fd=handles[-1]))
        if len(handles) > 2:
            os.close(handles.pop(0))
    yield folder
    for handle in handles:
        os.close(handle)
    subprocess.run(["rm", "-r", folder / "d"], check=True)  # which shutil cannot: it recurses


@pytest.mark.parametrize("words", [("push", "team/sql"), ("show",), ("merge", "--method", "linear", "-o", "merged")])
def test_deep_folders_end_no_command_as_a_bug(run: Run, make: Make, tmp_path: Path, deep: Path, words: tuple[str, ...]) -> None:
    more = [make()] if words[0] == "merge" else []
    done = run(words[0], deep, *more, *words[1:], cwd=tmp_path, code=None)
    assert done.returncode in (0, 6), done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_deep_folders_are_named_when_they_cannot_be_packaged(run: Run, tmp_path: Path, deep: Path) -> None:
    assert "more than 1024 characters" in run("push", deep, "team/sql", cwd=tmp_path, code=6).stderr
    assert "more than 1024 characters" in run("validate", deep, cwd=tmp_path, code=None).stdout


def test_deep_folders_may_be_left_out(run: Run, tmp_path: Path, deep: Path) -> None:
    run("init", cwd=tmp_path)
    (deep / ".adapterhubignore").write_text("d/\n")
    run("push", deep, "team/sql", cwd=tmp_path)


@pytest.mark.parametrize("command", ["gc", "info"])
def test_deep_folders_in_the_cache_of_a_registry_end_no_command_as_a_bug(
    run: Run, make: Make, tmp_path: Path, deep: Path, command: str
) -> None:
    run("push", make("good"), "team/sql", "--registry", tmp_path / "r")
    cached = tmp_path / "r/.adapterhub/cache/x"
    cached.parent.mkdir(exist_ok=True)
    (deep / "d").rename(cached)
    os.utime(cached, (0, 0))
    try:
        assert run(command, "--registry", tmp_path / "r", code=None).returncode == 0
    finally:
        cached.rename(deep / "d")
