"""What people write for several adapters ends in one line with the command line that does it, and that line works."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub.cli import loop_hints
from tests.conftest import Run, _environment
from tests.support.folders import adapter, pairs

PUSH = 'for a in adapters/a adapters/b; do adapterhub push "$a" team/"${a##*/}"'


@pytest.fixture
def place(run: Run, tmp_path: Path) -> Path:
    """A folder with two adapters, and a registry with two others."""
    run("init")
    for name in "ab":
        adapter(tmp_path / "adapters" / name, pairs(1), alpha_pattern={}, lora_alpha=ord(name))
        run("push", f"adapters/{name}", f"old/{name}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["push", "adapters/a", "adapters/b", "team/"], f"{PUSH}; done"),
        (["push", "adapters/a/", "adapters/b/", "team"], f"{PUSH}; done"),
        (["push", "adapters/a", "adapters/b", "team/", "-m", "a b"], f"{PUSH} -m 'a b'; done"),
        (["push", "adapters", "team/"], f"{PUSH}; done"),
        (["push", "adapters/*", "team/"], f"{PUSH}; done"),
        (["push", "adapters/a", "team/", "--tag", "new"], "adapterhub push adapters/a team/a --tag new"),
        (["push", "adapters/a/", "team/"], "adapterhub push adapters/a team/a"),
        (["convert", "adapters/a", "adapters/b", "out/", "--to", "mlx"],
         'for a in adapters/a adapters/b; do adapterhub convert "$a" out/"${a##*/}" --to mlx; done'),
        (["pull", "old/a", "old/b"], 'for a in old/a old/b; do adapterhub pull "$a"; done'),
        (["pull", "old/*", "-o", "out"], 'for a in old/a old/b; do adapterhub pull "$a" -o out/"${a##*/}"; done'),
        (["pull", "old/b*"], "adapterhub pull old/b"),
        (["copy", "old/*", "layout://x/"], 'for a in old/a old/b; do adapterhub copy "$a" layout://x/"${a##*/}"; done'),
        (["show", "old/?"], 'for a in old/a old/b; do adapterhub show "$a"; done'),
        (["validate", "old/*", "--strict"], "adapterhub validate old/a old/b --strict"),
        (["merge", "old/*", "-o", "team/both"], "adapterhub merge old/a old/b -o team/both"),
        (["--registry", ".", "pull", "old/a", "old/b"],
         'for a in old/a old/b; do adapterhub pull "$a" --registry .; done'),
        (["--registry", ".", "pull", "old/b*"], "adapterhub pull old/b --registry ."),
        (["rollback", "old/a", "prod", "-m", "wrong"], "adapterhub rollback old/a:prod -m wrong"),
        (["pull", "old/a", "v1", "-o", "out"], "adapterhub pull old/a:v1 -o out"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_hint_is_the_command_line_that_does_it(run: Run, place: Path, words: list[str], line: str) -> None:
    error = run(*words, code=None).stderr
    assert f" Write `{line}`  [" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["push", "adapters/a", "adapters/b", "team/"], ["team/a", "team/b"]),
        (["push", "adapters", "team/"], ["team/a", "team/b"]),
        (["merge", "old/*", "-o", "team/both"], ["team/both"]),
    ],
    ids=" ".join,
)
def test_the_line_does_what_was_meant(run: Run, place: Path, words: list[str], names: list[str]) -> None:
    match = re.search(r"Write `(.*)`", run(*words, code=None).stderr)
    assert match
    program = f'adapterhub() {{ {shlex.join([sys.executable, "-m", "adapterhub"])} "$@"; }}'
    subprocess.run(["bash", "-c", f"{program}; {match[1]}"], cwd=place, env=_environment(place, None), check=True)
    listed = run("list", "team").stdout
    assert all(f"{name}:v1" in listed for name in names)


def test_many_paths_are_the_pattern_that_a_shell_expands(run: Run, place: Path) -> None:
    for name in "cde":
        adapter(place / "adapters" / name, pairs(1))
    line = 'Write `for a in adapters/*; do adapterhub push "$a" team/"${a##*/}"; done`'
    names = [f"adapters/{name}" for name in "abcde"]
    for words in (["adapters/*"], ["adapters"], names):
        assert line in run("push", *words, "team/", code=2).stderr
    assert "for a in adapters/a adapters/b adapters/c adapters/d; do" in run("push", *names[:4], "team/", code=2).stderr


def test_a_pattern_without_a_match_says_so(run: Run, place: Path) -> None:
    for command in ("pull", "validate", "show"):
        error = run(command, "none/*", code=None).stderr
        assert "No adapter and no file matches none/*; `adapterhub list` shows the adapters" in error
    error = run("list", "none/*", "--registry", ".", code=3).stderr
    assert "No adapter and no file matches none/*; `adapterhub list --registry .` shows the adapters" in error


def test_many_names_end_the_list(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_hints, "_MAX_SOURCES", 2)
    sources = ["team/a", "team/b", "team/c"]
    line = loop_hints._loop("adapterhub pull", ["team/*"], sources, "", pattern="team/*")
    assert line == '`for a in team/a team/b …; do adapterhub pull "$a"; done`'


@pytest.mark.parametrize("words", [["chat", "a", "b"], ["list", "a", "b"], ["tag", "a", "b", "c"], ["diff", "a", "b", "c"]])
def test_a_command_that_is_no_loop_gets_none(run: Run, words: list[str]) -> None:
    assert f"See `adapterhub {words[0]} --help`" in run(*words, code=2).stderr
