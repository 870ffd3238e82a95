"""`adapterhub chat`: a conversation with a tiny model, in a pipe and at a terminal, whose adapter changes on the way."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.cli.views import answer_columns
from adapterhub.cli.views.answer_columns import OneByOne, SideBySide
from tests.conftest import LEARNING, Run, _environment, need_module
from tests.support import serving
from tests.support.forked import Forked
from tests.support.hub_models import cached
from tests.support.serving import Models

if sys.platform != "linux":
    pytest.skip("needs fork", allow_module_level=True)
Piped = Callable[..., subprocess.CompletedProcess[str]]
ALONE = object()  # among the options: without --base
P = "the quick brown fox "
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    for module in ("torch", "transformers", "peft", "prometheus_client"):
        need_module(module)
    built_models = serving.make_models(tmp_path_factory.mktemp("models"), adapters=2)
    serving.registry(built_models.folder / "registry", built_models, 2).close()
    return built_models


def words(models: Models, *options: object) -> list[str]:
    fixed = ["chat", "--registry", models.folder / "registry", "--engine", "torch", "--max-tokens", 12]
    base = () if ALONE in options else ("--base", models.base)
    return [str(word) for word in (*fixed, *base, *options) if word != ALONE]


@pytest.fixture(scope="module")
def server(servers: Callable[..., Forked]) -> Forked:
    """A server of processes that has imported torch."""
    return servers(*LEARNING)


@pytest.fixture
def piped(models: Models, server: Forked, tmp_path: Path) -> Piped:
    """A chat whose lines are those of a file, as in a pipe."""

    def call(text: str, *options: object, code: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        (tmp_path / "typed").write_text(text)
        with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err, open(tmp_path / "typed") as typed:
            streams = out.fileno(), err.fileno(), typed.fileno()
            exit_code = server.exit_code(
                words(models, *options), models.folder, _environment(models.folder, env), streams=streams
            )
        result = subprocess.CompletedProcess([], exit_code, (tmp_path / "out").read_text(), (tmp_path / "err").read_text())
        assert result.returncode == code, result.stderr
        assert "\x1b" not in result.stdout + result.stderr
        return result

    return call


# ---- in a pipe


def test_lines_are_turns_and_what_was_said_goes_along(piped: Piped, models: Models) -> None:
    """The second turn is asked for with the first one's answer, by another adapter."""
    result = piped(f"{P}\n\n/adapter team/a1\nand?\n", "team/a0:prod", "--json")
    document = json.loads(result.stdout)
    first, second = document["turns"]
    [first_answer], [second_answer] = first["answers"], second["answers"]
    assert (document["base"], document["engine"], first["prompt"]) == ("base", "torch", P)
    assert first_answer["version"].startswith("team/a0@sha256:")
    assert second_answer["version"].startswith("team/a1@sha256:")
    assert first_answer["text"] == models.answer(CHAT.format(P), 0, ends=True)
    assert second_answer["text"] == models.answer(
        CHAT.format(P) + first_answer["text"] + "<|im_end|>\n" + CHAT.format("and?"), 1, ends=True
    )
    assert 0 < first_answer["tokens"] <= 12


def test_two_answer_one_after_the_other_as_plain_text(piped: Piped, models: Models) -> None:
    result = piped(f"{P}\n", "team/a0", "--compare", "base", "--system", "")
    alone, base = (models.answer(CHAT.format(P), number, ends=True) for number in (0, None))
    assert result.stdout == f"team/a0:\n{alone}\nbase:\n{base}\n"
    assert "token" in result.stderr
    assert result.stderr.count("team/a0@sha256:") == 2  # as it begins, and after its answer


@pytest.mark.parametrize(
    ("options", "text", "code", "message"),
    [
        (("base",), "/adaptr team/a1\n", 2, "/adaptr: no such command. Did you mean /adapter?"),
        (("base",), "/adapter\n", 2, "/adapter: needs the name of an adapter. Write /adapter team/sql:v3, or /base for none"),
        (("team/a0",), "/adapter ./a0\n", 2, "./a0: is a path, and no adapter in the registry has this name. Push it first: `"),
        (("./none",), "", 3, "./none: no such file or folder, and not a ref either. "),
        (("team/none",), "", 3, "team/none: no such adapter. "),
        (("team/a0", "--compare", "team/none"), "", 3, "team/none: no such adapter. "),
        (("base",), "/adapter team/none\n", 3, "team/none: no such adapter. "),
        (("team/a0", "--engine", "vllm", "--engine-url", "http://127.0.0.1:9"), "", 8, "vllm: does not answer"),
    ],
)
def test_what_goes_wrong_ends_a_pipe(piped: Piped, options: tuple[object, ...], text: str, code: int, message: str) -> None:
    errors = [line for line in piped(text, *options, code=code).stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_the_base_is_the_one_that_the_adapter_records(piped: Piped, run: Run, models: Models, tmp_path: Path) -> None:
    """A ref without a base, a base alone, and a name that could be either."""
    adapter, store = tmp_path / "a0", ("--registry", tmp_path / "registry")
    shutil.copytree(models.adapter(0), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    run("push", adapter, "team/a0", *store)
    failed = piped("", "team/a0", ALONE, *store, code=2)
    assert "records no base by name. Pass --base with its folder" in failed.stderr  # a path means nothing elsewhere
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/tiny"}))
    run("push", adapter, "team/a0", *store)
    cached(tmp_path / "hub", "org/tiny", models.base)
    hub_env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    result = piped("hello\n", "team/a0", ALONE, *store, "--json", env=hub_env)
    assert "base: org/tiny, which the adapter records\n" in result.stderr
    assert json.loads(result.stdout)["turns"][0]["answers"][0]["version"].startswith("team/a0@sha256:")
    alone = json.loads(piped("hello\n", "org/tiny", ALONE, *store, "--json", env=hub_env).stdout)
    assert alone["turns"][0]["answers"][0]["version"] == alone["base"] == "org/tiny"
    run("push", adapter, "org/tiny", *store)
    assert "Write hf://org/tiny for the model" in piped("", "org/tiny", ALONE, *store, env=hub_env, code=2).stderr


def test_a_folder_answers_without_being_stored_and_so_do_versions_beside_it(
    piped: Piped, models: Models, tmp_path: Path
) -> None:
    """A version that is blended or compared with a folder keeps its name, and the registry of the user stays as it was."""
    store, answers = models.folder / "registry", [models.answer(CHAT.format(P), number, ends=True) for number in range(2)]
    before = sorted(path.name for path in store.rglob("*"))
    conversation = json.loads(piped(f"{P}\n", "./a0", "--compare", "team/a1:prod", "--json").stdout)
    folder, version = conversation["turns"][0]["answers"]
    assert [folder["text"], version["text"]] == answers
    assert folder["version"].startswith("local/a0@sha256:")
    assert version["version"].startswith("team/a1@sha256:")
    conversation = json.loads(piped(f"/adapter ./a1\n{P}\n/adapter team/a0*1\n{P}\n", "a0", "--json").stdout)
    assert conversation["turns"][0]["answers"][0]["text"] == answers[1]
    assert conversation["turns"][1]["answers"][0]["version"].startswith("team/a0@sha256:")
    assert sorted(path.name for path in store.rglob("*")) == before
    # The base that the folder records, without --base.
    shutil.copytree(models.adapter(0), tmp_path / "a0")
    config = json.loads((tmp_path / "a0/adapter_config.json").read_text()) | {"base_model_name_or_path": "org/tiny"}
    (tmp_path / "a0/adapter_config.json").write_text(json.dumps(config))
    cached(tmp_path / "hub", "org/tiny", models.base)
    conversation = json.loads(
        piped(f"{P}\n", tmp_path / "a0", ALONE, "--json", env={"HF_HUB_CACHE": str(tmp_path / "hub")}).stdout
    )
    assert conversation["turns"][0]["answers"][0]["text"] == answers[0]


# ---- at a terminal


class Terminal:
    """A chat at a terminal, whose screen is what was written so far."""

    def __init__(self, server: Forked, models: Models, *options: object, **variables: str) -> None:
        self._end, end = pty.openpty()
        self.screen, self.over = bytearray(), False
        self._news = threading.Condition()
        environment = _environment(models.folder, {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "", **variables})
        self.process, self._ended = server.start(words(models, *options), models.folder, environment, streams=(end, end, end))
        os.close(end)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while piece := os.read(self._end, 65536):
                with self._news:
                    self.screen += piece
                    self._news.notify()

    def says(self, text: str, *, since: int = 0) -> int:
        """Wait for a text, and return the place behind it."""
        with self._news:
            assert self._news.wait_for(lambda: text in self._text(since), 120), self._text(since)
            return since + self._text(since).index(text) + len(text)

    def _text(self, since: int) -> str:
        return self.screen.decode(errors="replace")[since:]

    def type(self, text: str) -> None:
        os.write(self._end, text.encode())

    def interrupt_input(self) -> None:
        """Press Ctrl-C once the prompt waits: CPython forgets a signal that comes between the two, until the next key."""
        state = Path(f"/proc/{self.process}/task/{self.process}/stat")
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)
        os.kill(self.process, signal.SIGINT)

    def ends(self) -> tuple[int, str]:
        code, self.over = self._ended(), True
        self._reader.join()
        os.close(self._end)
        return code, self.screen.decode().replace("\r\n", "\n")


@pytest.fixture
def terminal(server: Forked, models: Models) -> Iterator[Any]:
    terminals: list[Terminal] = []

    def start(*options: object, **variables: str) -> Terminal:
        terminals.append(Terminal(server, models, *options, **variables))
        return terminals[-1]

    yield start
    for opened in terminals:
        if not opened.over:
            os.kill(opened.process, signal.SIGKILL)


def test_two_columns_and_a_switch_in_mid_conversation(terminal: Any, models: Models) -> None:
    chat = terminal("team/a0:prod", "--compare", "base")
    at = chat.says("> ", since=chat.says("/help lists"))
    chat.type(f"{P}\r")
    at = chat.says("> ", since=chat.says("token", since=at))
    chat.type("/adaptr team/a1\r")
    at = chat.says("> ", since=chat.says("Did you mean /adapter?", since=at))
    chat.type("/adapter \x16\x1b[2J\r")  # after ^V, a character that would have been a key
    at = chat.says("> ", since=chat.says(" \\x1b[2J: ", since=at))
    chat.type("/adapter team/a1\r")
    at = chat.says("> ", since=chat.says("team/a1@sha256:", since=at))
    chat.type("/compare\r")
    at = chat.says("> ", since=chat.says("team/a1 alone", since=at))
    chat.type("and?\r")
    at = chat.says("> ", since=chat.says("token", since=at))
    chat.type("\x04")
    code, screen = chat.ends()
    assert code == 0
    last = [line.rpartition("\r")[2] for line in screen.split("\n")]  # what a line is redrawn to
    [head] = [line for line in last if "team/a0:prod" in line and " │ " in line]
    answered = last[last.index(head) + 1]
    alone, base = (models.answer(CHAT.format(P), number, ends=True) for number in (0, None))
    assert [cell.strip() for cell in answered.split(" │ ")] == [alone.strip(), base.strip()]
    [facts] = [line for line in last if "│" in line and "@sha256:" in line]
    digest = facts.partition("@sha256:")[2].partition(",")[0]
    assert len(digest) == 12
    assert all(answer_columns.cells(line) < 100 for line in last if "│" in line and "\x1b" not in line)


def test_a_narrow_dumb_terminal_gets_one_after_the_other_without_escapes(terminal: Any, models: Models) -> None:
    chat = terminal("team/a0", "--compare", "base", TERM="dumb", COLUMNS="60", NO_COLOR="1")
    chat.says("> ", since=chat.says("/help lists"))
    chat.type(f"{P}\r")
    at = chat.says("> ", since=chat.says("base, ", since=chat.says("base:")))
    chat.type("/help\r")
    chat.says("> ", since=chat.says("//TEXT", since=at))
    chat.type("/exit\r")  # as in other programs; /quit is listed
    code, screen = chat.ends()
    assert code == 0
    assert "\x1b" not in screen
    lines = screen.split("\n")
    alone, base = (models.answer(CHAT.format(P), number, ends=True) for number in (0, None))
    assert lines[lines.index("team/a0:") + 1] == alone
    assert lines[lines.index("base:") + 1] == base
    assert all(len(line) <= 60 for line in lines if " " in line.strip())


def test_ctrl_c_ends_an_answer_and_then_the_chat(terminal: Any) -> None:
    chat = terminal("team/a0", "--compare", "base", "--max-tokens", 1900)
    chat.says("> ", since=chat.says("/help lists"))
    chat.type("hello\r")
    chat.says("\r", since=chat.says("│", since=chat.says("│")))  # a row is being drawn
    os.kill(chat.process, signal.SIGINT)
    at = chat.says("> ", since=chat.says("stopped"))
    chat.type("/compare\r")
    chat.says("> ", since=chat.says("team/a0 alone", since=at))
    chat.interrupt_input()
    code, screen = chat.ends()
    assert code == 0
    assert "Traceback" not in screen


# ---- what is drawn

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x9bd\u202ee\tf"


def test_control_characters_of_a_model_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    columns = SideBySide(["\x1b[2J", "b"], 80)
    for side in (0, 1):
        columns.show(side, HOSTILE)
        columns.end(side, HOSTILE)
    notes: list[str] = []
    below = OneByOne(["\x1b[2J", "b"], notes.append)
    for side in (1, 0):
        below.show(side, HOSTILE)
        below.end(side, "")
    out = capsys.readouterr().out
    assert not {*out} & {"\x1b", "\x07", "\x9b", "\u202e", "\t"}
    assert "\\x1b[2J" in out
    assert "b\\rc" in out


def test_columns_grow_together_and_the_longer_one_goes_on_alone(capsys: pytest.CaptureFixture[str]) -> None:
    columns = SideBySide(["left", "right"], 23)  # two columns of 9
    columns.show(0, "one two three four ")
    columns.show(1, "eins")
    columns.show(0, "five\n  six\n")
    columns.end(1, "done")
    columns.end(0, "")
    rows = [line.rpartition("\r")[2].rstrip() for line in capsys.readouterr().out.split("\n")]
    bar = " │ " if " │ " in rows[0] else " | "
    assert [tuple(cell.rstrip() for cell in row.split(bar.rstrip(" "))) for row in rows[:5]] == [
        ("left", " right"),
        ("one two", " eins"),
        ("three", " done"),
        ("four five", ""),
        ("  six", ""),
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("abcdefgh", ["abcdefgh"]),
        ("abcdefghi", ["abcdefgh", "i"]),
        ("abcd efgh ij", ["abcd", "efgh ij"]),
        ("  abcd efgh", ["  abcd", "efgh"]),
        ("漢字漢字漢", ["漢字漢字", "漢"]),
        ("e\u0301" * 8, ["e\u0301" * 8]),
    ],
)
def test_lines_are_broken_between_words_by_the_cells_that_characters_take(text: str, lines: list[str]) -> None:
    assert answer_columns.wrap_cells(text, 8) == lines


def test_a_long_line_is_broken_in_linear_work() -> None:
    lines = answer_columns.wrap_cells("x" * 300_000, 8)
    assert len(lines) == 37_500
    assert {*lines} == {"x" * 8}
