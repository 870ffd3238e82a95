"""Every command on every kind of output: a pipe, one that nobody reads, a full disk, a narrow or a dumb terminal, and Ctrl-C.

A command that is not in `INVOCATIONS` fails here, so that none is forgotten. Each runs as a process, in a copy of a folder that
has what it needs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from adapterhub.cli import output
from adapterhub.cli.main import app
from adapterhub.serve.usage.usage_database import UsageDatabase, UsageKey, UsageSum
from tests.cli.test_options import commands
from tests.conftest import CHECKING, _environment
from tests.support.folders import adapter, base, pairs
from tests.support.forked import Forked

if sys.platform != "linux":
    pytest.skip("needs fork, /dev/full and Linux's signals", allow_module_level=True)

LEAVES = [name for name, command in commands(app) if not isinstance(command, click.Group)]
# What each is run with; those that need torch show what they would do.
INVOCATIONS = {
    "run": "--help",
    "chat": "--help",
    "serve": "--help",
    "resolve": "--help",
    "train": "--init new.toml",
    "eval": "--help",
    "merge": "sql other --method ties -o both",
    "extract": "merged --base base --rank 2 -o extracted",
    "convert": "sql sql.gguf --to gguf --base base --dtype f16",
    "describe": "sql --license Apache-2.0",
    "rebuild": "recipe.json -o rebuilt",
    "validate": "sql other --base base",
    "scan": "sql",
    "fix": "broken",
    "diff": "sql other",
    "verify-merge": "merged --base base --adapter team/sql",
    "explain": "rank-config",
    "push": "other team/new:prod",
    "pull": "team/sql -o pulled",
    "copy": "team/sql layout://copied:team/sql:v1",
    "bundle": "team/sql -o bundle.tar",
    "key generate": "signing",
    "sign": "--help",
    "attest": "--help",
    "policy check": "team/sql",
    "audit verify": "",
    "audit checkpoint": "--help",
    "bom": "team/sql -o sql.cdx.json",
    "attach": "layout://layout:team/sql:v1 note.txt --type application/x-note",
    "lock": "team/sql:prod",
    "remote add": "there layout://layout",
    "remote default": "here",
    "remote list": "",
    "remote rm": "here",
    "remote test": "here",
    "login": "--help",
    "promote": "team/sql:v2 staging",
    "approve": "--help",
    "rollback": "--help",
    "withdraw": "team/sql:v2 -m overfits",
    "served": "--help",
    "rollout show": "--help",
    "rollout resume": "--help",
    "rollout abort": "--help",
    "hub start": "--help",
    "hub user add": "ada",
    "hub user list": "",
    "hub user rm": "--help",
    "hub user link": "--help",
    "hub admission add": "--help",
    "hub admission list": "",
    "hub admission rm": "--help",
    "hub approve": "--help",
    "hub log": "--verify",
    "hub backup": "hub.tar",
    "hub load-backup": "--help",
    "hub doctor": "",
    "hub publisher add": "team --issuer https://ci.example --claim sub=x",
    "hub publisher list": "",
    "hub publisher rm": "--help",
    "hub webhook add": "team https://ci.example/hook",
    "hub webhook list": "",
    "hub webhook rm": "--help",
    "hub member list": "team",
    "hub member set": "--help",
    "hub member rm": "--help",
    "hub namespace set": "team --readers members",
    "hub namespace list": "",
    "hub token create": "ci --role write",
    "hub token list": "",
    "hub token revoke": "--help",
    "hub migrate": "--help",
    "hub recover": "--help",
    "hub gc": "--help",
    "logout": "127.0.0.1:5000",
    "list": "",
    "show": "team/sql",
    "search": "sql",
    "lineage": "team/both",
    "log": "team/sql",
    "info": "",
    "init": "project",
    "base add": "tiny base",
    "base list": "",
    "base show": "small",
    "base rm": "small",
    "tag": "team/sql blessed",
    "mv": "team/both team/moved",
    "rm": "team/both -y",
    "restore": "team/gone",
    "deprecate": "team/sql overfits",
    "keep": "team/sql --last 1",
    "gc": "--grace 0",
    "verify": "team/sql",
    "fsck": "",
    "pack": "",
    "du": "",
    "usage": "--usage-file usage.db --since 1970-01-01",
    "completion": "bash",
}
TRANSFERS = {"push", "pull", "copy"}
COLUMNS = 60


def words(name: str) -> list[str]:
    return [*name.split(), *INVOCATIONS[name].split()]


Call = Callable[..., subprocess.CompletedProcess[str]]


class World:
    """A folder with a registry and what is in it, and the commands that run there."""

    def __init__(self, folder: Path, server: Forked) -> None:
        self.folder, self._server = folder, server

    def environment(self, **variables: str) -> dict[str, str]:
        own_variables = {
            "COLUMNS": str(COLUMNS),
            "LINES": "40",
            "DOCKER_CONFIG": str(self.folder / "docker"),
            "HF_HUB_OFFLINE": "1",
        }
        inherited = {key: value for key, value in _environment(self.folder, None).items() if key not in ("NO_COLOR", "TERM")}
        return {**inherited, **own_variables, **variables}

    def piped(self, args: list[str], first: str = "") -> subprocess.CompletedProcess[str]:
        return self._server.run(args, self.folder, self.environment(), first)

    def into(self, args: list[str], out: int, err: int | None = None) -> tuple[int, str]:
        """The exit code with stdout on that descriptor, and what went to stderr, unless that has one too."""
        with open(self.folder / "stderr", "w+") as file:
            streams = out, file.fileno() if err is None else err
            code = self._server.exit_code(args, self.folder, self.environment(), streams=streams)
            file.seek(0)
            return code, file.read()

    def unread(self, args: list[str], *, with_stderr: bool = False) -> tuple[int, str]:
        """`into` a pipe that nobody reads, and stderr as well if `with_stderr`."""
        reader, writer = os.pipe()
        os.close(reader)
        try:
            return self.into(args, writer, writer if with_stderr else None)
        finally:
            os.close(writer)

    def terminal(self, args: list[str], **variables: str) -> tuple[int, str, str]:
        """The exit code on a terminal, its stdout and its stderr, which is a terminal of its own."""
        code, (out, err) = self._server.on_terminals(args, self.folder, self.environment(**variables), count=2)
        return code, out, err


@pytest.fixture(scope="module")
def prepared_world(tmp_path_factory: pytest.TempPathFactory, servers: Callable[..., Forked]) -> World:
    world = World(tmp_path_factory.mktemp("world"), servers(*CHECKING))
    folder = world.folder
    base(folder / "base")
    adapter(folder / "sql", pairs(2), base_model_name_or_path="base")
    adapter(folder / "other", pairs(2), lambda _, array: array * 2)
    adapter(folder / "broken", pairs(2), r=5)
    (folder / "note.txt").write_text("a note\n")
    with contextlib.closing(UsageDatabase(folder / "usage.db")) as usage:
        usage.add({UsageKey(0, "ada", "team/sql", "legal", "team/sql:v1", "vllm", "/v1/completions"): UsageSum(1, 0, 2, 0, 3)})
    (folder / "docker").mkdir()
    (folder / "docker/config.json").write_text('{"auths": {"127.0.0.1:5000": {"auth": "YTpi"}}}')
    for line in (
        "push sql team/sql:prod --base base",
        "push other team/sql",
        "push sql team/gone",
        "rm team/gone -y",
        "merge team/sql:v1 team/sql:v2 --method ties -o team/both:latest",
        "merge team/sql --into base -o merged",
        "merge team/sql --into base --recipe-only -o recipe.json",
        "copy team/sql:v1 layout://layout:team/sql:v1",
        "attach layout://layout:team/sql:v1 note.txt --type application/x-earlier",
        "remote add here layout://layout",
        "base add small base",
        "hub user add grace",
        "hub namespace set grace --readers members",
        "hub member set team grace --role read",
    ):
        result = world.piped(line.split())
        assert result.returncode == 0, (line, result.stderr)
    return world


@pytest.fixture
def world(prepared_world: World, tmp_path: Path) -> World:
    shutil.copytree(prepared_world.folder, tmp_path / "w")
    return World(tmp_path / "w", prepared_world._server)


def test_every_command_is_here() -> None:
    assert sorted(LEAVES) == sorted(INVOCATIONS)


BROKEN = ["--no-such-option", "--json"]


@pytest.mark.parametrize("name", LEAVES)
def test_json_is_one_document_without_color(world: World, name: str) -> None:
    result = world.piped([*words(name), "--json"])
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
    assert "--help" in words(name) or isinstance(json.loads(result.stdout), dict)


@pytest.mark.parametrize("name", LEAVES)
def test_a_reader_that_is_gone_is_no_error(world: World, name: str) -> None:
    code, complaint = world.unread(words(name))
    assert (code, [line for line in complaint.splitlines() if line.startswith(("error", "warning", "Traceback"))]) == (141, [])


def test_color_and_long_lines_break_between_words() -> None:
    assert output._wrap_line("  a word and another", 12) == ["  a word and", "    another"]
    assert output._wrap_line("\x1b[31merror\x1b[0m in a word", 16) == ["\x1b[31merror\x1b[0m in a word"]
    assert output._wrap_line("\x1b[31merror\x1b[0m in a word", 12) == ["\x1b[31merror\x1b[0m in a", "  word"]
    assert output._wrap_line("sha256:0123456789", 8) == ["sha256:0123456789"]
    assert output._wrap_line("error: run `adapterhub list` first", 24) == ["error: run", "  `adapterhub list`", "  first"]
    assert output._wrap_line("an odd ` is a word", 10) == ["an odd `", "  is a", "  word"]
    assert output._wrap_line("  ", 8) == ["  "]
    assert output._wrap_line("", 8) == [""]


def test_the_word_error_is_red_on_a_terminal_with_colors_only(world: World) -> None:
    _, _, err = world.terminal(["show", "team/sql:nosuch"], TERM="xterm")
    assert err.startswith("\x1b[31merror:\x1b[0m team/sql:nosuch: ")
    assert world.piped(["show", "team/sql:nosuch"]).stderr.startswith("error: team/sql:nosuch: ")
    assert "\x1b" not in world.terminal(["show", "team/sql:nosuch"], TERM="xterm", NO_COLOR="1")[2]


def test_an_error_on_a_terminal_breaks_between_words_and_keeps_a_command_whole(world: World) -> None:
    code, _, err = world.terminal(["show", "team/sql:nosuch"], TERM="xterm", NO_COLOR="1")
    lines = err.replace("\r\n", "\n").splitlines()
    assert (code, err.split()) == (3, world.piped(["show", "team/sql:nosuch"]).stderr.split())
    assert max(map(len, lines)) <= COLUMNS < len(" ".join(lines))
    assert any("`adapterhub list team/sql`" in line for line in lines)
    _, _, err = world.terminal(["convert", "sql", "sql-mlx", "--to", "mlx", "--base", "base"], TERM="xterm", NO_COLOR="1")
    assert "run it: mlx_lm.generate --model base --adapter-path sql-mlx --prompt Hello" in err.splitlines()


def test_an_error_that_nobody_reads_is_one_line_at_most(world: World) -> None:
    code, complaint = world.unread(["list", *BROKEN])
    assert (code, complaint.count("\n")) == (141, 1)
    assert world.unread(["list", *BROKEN], with_stderr=True)[0] == 141


@pytest.mark.parametrize("name", LEAVES)
def test_an_output_that_is_full_is_one_line(world: World, name: str) -> None:
    with open("/dev/full", "w") as full:
        code, complaint = world.into(words(name), full.fileno())
    lines = [line for line in complaint.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (8, 1), complaint
    assert "no space left on device" in lines[0]
    assert "Traceback" not in complaint


def test_an_error_on_an_output_that_is_full_is_still_that_error(world: World) -> None:
    with open("/dev/full", "w") as full:
        code, complaint = world.into(["list", *BROKEN], full.fileno())
    assert code == 2
    assert complaint.startswith("error: --no-such-option") or "No such option" in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("name", LEAVES)
def test_a_dumb_terminal_gets_no_escapes(world: World, name: str) -> None:
    code, out, err = world.terminal(words(name), TERM="dumb")
    assert code == 0, out + err
    assert "\x1b" not in out + err


@pytest.mark.parametrize("name", LEAVES)
def test_a_narrow_terminal_without_color_is_enough(world: World, name: str) -> None:
    """Except for what has no space to break it at, and commands and scripts, which are to be copied."""
    code, out, err = world.terminal(words(name), TERM="xterm", NO_COLOR="1")
    assert code == 0, out + err
    assert "\x1b" not in out
    if name != "completion":
        wide = [line for line in out.splitlines() if len(line) > COLUMNS and not line.startswith("  $ ")]
        assert not [line for line in wide if " " in line.strip()]


_INTERRUPT = """
import os, signal
from adapterhub.cli import main
seen, moment, original = 0, {moment}, main.run

def event(name, _):
    global seen
    if main.run is original and name.startswith(("open", "os.", "shutil.", "socket.", "sqlite3.", "tempfile.")):
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGINT)

def run(arguments):
    main.run = original
    try:
        if moment == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return original(arguments)
    finally:
        main.run = None
        if moment is None:
            with open("moments", "w") as file:
                file.write(str(seen))

main.run = run
import sys
sys.addaudithook(event)
"""


@pytest.mark.parametrize("name", LEAVES)
def test_ctrl_c_is_one_line(world: World, prepared_world: World, tmp_path: Path, name: str) -> None:
    """A third and two thirds of the way through its work with files, sockets and databases."""
    result = world.piped(words(name), _INTERRUPT.format(moment=None))
    assert "\x1b" not in result.stdout + result.stderr
    moments = int((world.folder / "moments").read_text())
    for third in (1, 2):
        again = World(shutil.copytree(prepared_world.folder, tmp_path / str(third)), prepared_world._server)
        moment = moments * third // 3
        result = again.piped(words(name), _INTERRUPT.format(moment=moment))
        assert result.returncode == 130, (result.returncode, result.stderr)
        if moment:  # else it comes before anything has begun
            assert result.stderr.startswith("interrupted")
            assert ("the same command resumes" in result.stderr) == (name in TRANSFERS)
            assert result.stderr.count("\n") == 1, result.stderr


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", LEAVES)
def test_a_full_disk_is_one_line(small_disk: Path, prepared_world: World, name: str) -> None:
    """Or no error, where nothing has to be written."""
    world = World(shutil.copytree(prepared_world.folder, small_disk / "w"), prepared_world._server)
    try:
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
            while filler.write(bytes(1 << 16)):
                pass
        result = world.piped(words(name))
        if name == "info":  # whose result is a list of problems
            assert "disk is full" in result.stdout
        elif result.returncode:
            assert (result.returncode, result.stderr.count("\n")) == (8, 1), result.stderr
            assert "locked" not in result.stderr  # by the command itself, which had given up an earlier attempt
    finally:
        shutil.rmtree(small_disk / "w")
        (small_disk / "filler").unlink()
