"""Folders in folders, deeper than Python recurses and than a path can be, in the place where a clone has an adapter."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from adapterhub.manifest.package_files import check_paths
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.errors import FormatError
from adapterhub_converters.formats import peft
from tests.support.merge_recipes import Q, write_base

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
    extra_sources = [make()] if words[0] == "merge" else []
    result = run(words[0], deep, *extra_sources, *words[1:], cwd=tmp_path, code=None)
    assert result.returncode in (0, 6), result.stderr
    assert len(result.stderr.splitlines()) <= 1


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


@pytest.mark.parametrize("recipe", [False, True], ids=["merge", "rebuild"])
def test_deep_folders_in_a_base_are_not_copied(run: Run, tmp_path: Path, deep: Path, recipe: bool) -> None:
    write_base(tmp_path / "base")
    factors = LowRank(np.ones((4, 64), np.float32), np.ones((64, 4), np.float32), alpha=4)
    (tmp_path / "a").mkdir()
    peft.write(Adapter({Q: factors}), tmp_path / "a")
    (deep / "d").rename(tmp_path / "base/d")
    try:
        run("merge", "./a", "--into", "base", *(["--recipe-only", "-o", "a.json"] if recipe else ["-o", "out"]))
        if recipe:
            run("rebuild", "a.json", "--adapter", "a", "-o", "out")
    finally:
        (tmp_path / "base/d").rename(deep / "d")
    assert (tmp_path / "out/config.json").is_file()
    assert not (tmp_path / "out/d").exists()


def test_a_list_of_paths_does_not_take_gigabytes_to_be_compared() -> None:
    """A manifest of 4 MB can have 4,000 paths of 480 folders each, which took 2.2 GB and 7 s of whoever pulled it."""
    with pytest.raises(FormatError, match="has more than 32 parts"):
        check_paths([f"d{n}/{'a/' * 480}x.txt" for n in range(4000)], "manifest")
    assert check_paths([f"{'a/' * 31}x.txt"], "manifest")
