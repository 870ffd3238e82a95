"""What a shell completes at TAB, asked as bash asks, and by bash, zsh and fish themselves."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from adapterhub.cli.main import app
from tests.cli.test_options import commands
from tests.conftest import ROOT, Run, need_program
from tests.support.folders import adapter, base, pairs
from tests.support.programs import write_program

Complete = Callable[..., list[str]]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")])


@pytest.fixture
def place(run: Run, tmp_path: Path) -> Path:
    """A registry with two adapters, a tag and a base; a config and a folder."""
    adapter(tmp_path / "sql", pairs(1))
    base(tmp_path / "model", 1)
    (tmp_path / "sql.toml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    run("init")
    run("push", "sql", "team/sql:prod")
    run("push", "sql", "legal/terms")
    run("base", "add", "tiny", "model")
    return tmp_path


@pytest.fixture
def complete(run: Run, place: Path) -> Complete:
    """Returns the items that bash gets for words of a line, the last of which is being typed."""

    def call(*words: str) -> list[str]:
        variables = {"COMP_WORDS": " ".join(["adapterhub", *words]), "COMP_CWORD": str(len(words))}
        result = run(env={**variables, "_ADAPTERHUB_COMPLETE": "bash_complete"})
        assert result.stderr == ""
        return result.stdout.splitlines()

    return call


@pytest.mark.parametrize(
    ("words", "item"),
    [
        (["show", "te"], "plain,team/sql"),
        (["show", "team/sql:"], "plain,team/sql:prod"),
        (["tag", "team/sql", "pr"], "plain,prod"),
        (["push", "./sql", "team/sql", "--tag", "p"], "plain,prod"),
        (["run", "team/sql", "--base", "ti"], "plain,tiny"),
        (["base", "show", "ti"], "plain,tiny"),
        (["base", "rm", "ti"], "plain,tiny"),
        (["explain", "rank-c"], "plain,rank-config"),
        (["merge", "a", "b", "--method", "ti"], "plain,ties"),
        (["merge", "a", "b", "--method", "ties", "--set", "den"], "plain,density="),
        (["convert", "./sql", "out", "--to", "ml"], "plain,mlx"),
        (["train", "sq"], "plain,sql.toml"),
        (["train", "./sq"], "plain,./sql.toml"),
        (["keep", "le"], "plain,legal/terms"),
        (["validate", "./s"], "file,./s"),
        (["sign", "./sql", "--key", "te"], "file,te"),
        (["pull", "team/sql", "-o", "o"], "file,o"),
        (["list", "--registry", "x"], "dir,x"),
        (["hub", "st"], "plain,start"),
        (["hub", "user", "a"], "plain,add"),
        (["attach", "--li"], "plain,--list"),
    ],
    ids=" ".join,
)
def test_a_word_is_completed_by_what_its_place_takes(complete: Complete, words: list[str], item: str) -> None:
    assert item in complete(*words)


def test_after_a_group_each_of_its_commands_is_offered(complete: Complete) -> None:
    groups = [(name.split(), command) for name, command in commands(app) if isinstance(command, click.Group)]
    assert len(groups) > 10
    for words, group in groups:
        assert complete(*words, "") == [f"plain,{name}" for name in group.list_commands(click.Context(group))]


def test_only_files_of_the_right_kind_are_offered(complete: Complete) -> None:
    assert complete("train", "") == ["plain,sql.toml"]
    assert complete("train", "n") == ["file,n"]  # none: the shell's own way


# A line as it is typed, and the word that the shell puts in its place.
_LINES = {
    "adapterhub show team/s": "team/sql",
    "adapterhub hub sta": "start",
    "adapterhub explain rank-conf": "rank-config",
    "adapterhub merge a b --method tie": "ties",
    "adapterhub run team/sql --base tin": "tiny",
}


@pytest.fixture
def environment(place: Path) -> dict[str, str]:
    """The environment of a shell with the program, the registry of `place`, and no settings of its own."""
    (place / "bin").mkdir()
    write_program(place / "bin/adapterhub", "-m", "adapterhub")
    mine = {name: value for name, value in os.environ.items() if name.startswith(("ADAPTERHUB_", "XDG_"))}
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**mine, "PATH": path, "PYTHONPATH": PATH, "HOME": str(place), "ZDOTDIR": str(place), "TERM": "dumb"}


@pytest.mark.peer
def test_fish_puts_the_word_into_the_line(place: Path, environment: dict[str, str]) -> None:
    program = need_program("fish")
    for line, word in _LINES.items():
        script = f"adapterhub completion fish | source; complete -C '{line}'"
        result = subprocess.run(
            [program, "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert word in result.stdout.split(), (line, result)


# What bash and zsh read as they start; `{}` is the folder of the world.
_STARTED = {
    "bash": (".bashrc", "source <(adapterhub completion bash); bind 'set bell-style none'; PS1='ready> '\n"),
    "zsh": (".zshrc", "fpath=({}/functions $fpath); autoload -U compinit; compinit -u -D; unsetopt beep; PS1='ready> '\n"),
}


@pytest.mark.peer
@pytest.mark.parametrize("line", _LINES)
@pytest.mark.parametrize("shell", _STARTED)
def test_a_shell_at_a_terminal_puts_the_word_into_the_line(
    shell: str, line: str, place: Path, environment: dict[str, str]
) -> None:
    program, (settings, text) = need_program(shell), _STARTED[shell]
    (place / settings).write_text(text.format(place))
    (place / "functions").mkdir()
    words = [str(place / "bin/adapterhub"), "completion", shell]
    script = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    (place / "functions/_adapterhub").write_text(script)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(place)
        os.execvpe(program, [program, "-i"], environment)
    try:
        _read_until(terminal, "ready> ")
        os.write(terminal, f"{line}\t".encode())
        _read_until(terminal, _LINES[line])
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(terminal)


def _read_until(terminal: int, word: str) -> None:
    """Read what a terminal shows until there is a word in it; fail after a minute of silence."""
    screen = ""
    while word not in screen:
        assert select.select([terminal], [], [], 60)[0], screen
        screen += os.read(terminal, 4096).decode(errors="replace")
