"""The program as a process: one line for an error, the right exit code, nothing heavy imported, nothing left behind."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from adapterhub.cli.explained_codes import explanation
from adapterhub.cli.main import COMMANDS, app
from adapterhub_converters import errors
from tests.conftest import ROOT, Run
from tests.support.folders import adapter, base, pairs

HEAVY = {"urllib3", "torch", "transformers", "tokenizers", "matplotlib", "gguf", "peft", "safetensors", "bitsandbytes"} | {
    "huggingface_hub"
}
PATH = os.pathsep.join([str(ROOT), str(ROOT / "converters"), str(ROOT / "schemas")])


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    adapter(tmp_path / "sql", pairs(2), base_model_name_or_path="org/base")
    base(tmp_path / "base", 2)
    return tmp_path / "sql"


def loaded(run: Run, tmp_path: Path, *args: str, code: int | None = 0) -> set[str]:
    """The modules that a command has imported by the time it ends."""
    recorder = f"open({str(tmp_path / 'seen')!r}, 'w').write('\\n'.join(m.partition('.')[0] for m in sys.modules))"
    run(*args, code=code, first=f"import atexit, sys\natexit.register(lambda: {recorder})\n")
    return set((tmp_path / "seen").read_text().split())


def test_version_imports_next_to_nothing(started: Run, tmp_path: Path) -> None:
    assert not loaded(started, tmp_path, "--version") & (HEAVY | {"numpy", "rich", "click", "json", "jsonschema", "sqlite3"})


def test_no_help_imports_anything_heavy() -> None:
    """Of all commands, in one process: what none of them imports."""
    code = (
        "import sys\nfrom adapterhub.cli.main import COMMANDS, run\n"
        "for command in COMMANDS:\n    assert run([command, '--help']) == 0\n"
        f"    print(command, *sorted({HEAVY | {'numpy', 'rich', 'jsonschema'}} & {{*sys.modules}}), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": PATH}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stderr.splitlines() == [*COMMANDS]


def test_a_pull_and_a_list_import_no_numpy(run: Run, started: Run, sql: Path, tmp_path: Path) -> None:
    run("push", sql, "team/sql", cwd=tmp_path)
    for args in (["pull", "team/sql", "-o", "out"], ["list"]):
        assert not loaded(started, tmp_path, *args) & (HEAVY | {"numpy", "jsonschema", "sqlite_utils"})


def test_the_first_push_creates_the_index_without_sqlite_utils(started: Run, sql: Path, tmp_path: Path) -> None:
    assert "sqlite_utils" not in loaded(started, tmp_path, "push", str(sql), "team/sql")


def test_version_is_one_line(run: Run) -> None:
    assert run("--version").stdout == "adapterhub 0.1.0\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(run: Run, command: str) -> None:
    help_text = run(command, "--help").stdout
    assert f"$ adapterhub {command}" in help_text.partition("Example:")[2]
    assert "--json" in help_text


def test_the_documented_exit_codes_are_the_classes() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs/exit-codes.md").read_text(), re.MULTILINE)
    direct = {
        name: kind.exit_code
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.AdapterhubError) and "exit_code" in vars(kind)
    }
    assert {name: int(code) for code, name in rows} == direct


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["frobnicate"], 2, "frobnicate: no such command"),
        (["validte", "sql"], 2, "Did you mean `adapterhub validate`?"),
        (["validate"], 2, "Missing argument 'SRC...'"),
        (["validate", "sql", "--bose", "x"], 2, "No such option"),
        (["merge", "--method"], 2, "requires an argument. See `adapterhub merge --help`"),
        (["validate", "sql", "--for", "torch"], 2, "'torch' is not one of"),
        (["validate", "nope"], 3, "nope: no such file or folder, and not a ref either"),
        (["validate", "team/nope"], 3, "team/nope: no such file or folder, and no registry in "),
        (["validate", "Team/X:v1"], 2, "cannot be part of a name"),
        (["validate", "sql", "--base", "nope"], 3, "nope: no such file or folder"),
        (["validate", "sql", "--base", "sql"], 3, "not a base model"),
        (["validate", "team/a", "--registry", "nowhere"], 3, "no registry in nowhere"),
        (["show", "team/a:v01"], 2, "is not a version number"),
        (["push", "nope", "team/a"], 3, "nope: "),
        (["push", "sql", "team"], 2, "is not namespace/name"),
        (["list"], 3, "no registry there"),
        (["fsck"], 3, "no registry there"),
        (["completion", "csh"], 2, "'csh' is not one of"),
    ],
)
def test_an_error_is_one_line_and_one_code(run: Run, sql: Path, args: list[str], code: int, says: str) -> None:
    result = run(*args, code=code)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    document = json.loads(run(*args, "--json", code=code).stdout)
    assert document["error"]["exit_code"] == code
    assert [*document["error"]] == ["type", "where", "what", "hint", "exit_code", "code"]
    for code_text in (document["error"]["code"], result.stderr.removesuffix("]\n").rpartition("  [")[2]):
        assert explanation(code_text) is not None


def test_debug_adds_the_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": PATH}
    command = [sys.executable, "-m", "adapterhub", "--debug", "validate", "nope"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert "Traceback" in result.stderr


def test_a_bug_is_one_line_and_a_report(run: Run, sql: Path, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text("import adapterhub.checks as c\nc.check = lambda *a, **k: {}['x\\ny']\n")
    path = os.pathsep.join([str(hook), PATH])
    result = run("validate", "sql", env={"PYTHONPATH": path, "TMPDIR": str(tmp_path)}, code=70)
    assert result.stderr.count("\n") == 1
    (report,) = tmp_path.glob("adapterhub-crash-*.txt")
    assert str(report) in result.stderr
    assert result.stderr.endswith("[internal-error]\n")
    assert "KeyError" in report.read_text()


def test_a_reader_that_stops_reading_is_no_error(run: Run, sql: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": PATH}
    process = subprocess.Popen(
        [sys.executable, "-m", "adapterhub", "validate", str(sql), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize(("number", "code", "output"), [(signal.SIGINT, 130, b"interrupted\n"), (signal.SIGTERM, 143, b"")])
def test_a_signal_ends_it_with_a_word_at_most(tmp_path: Path, number: int, code: int, output: bytes) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import time, adapterhub.operations.source_names as names\n"
        "names.resolve = lambda *a: (print('ready', flush=True), time.sleep(60))\n"
    )
    path = os.pathsep.join([str(hook), PATH])
    process = subprocess.Popen(
        [sys.executable, "-m", "adapterhub", "validate", "x"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, complaint = process.communicate(timeout=20)
    assert (process.returncode, complaint) == (code, output)


def test_a_path_below_a_file_cannot_be_written(run: Run, sql: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("init", "file/registry", code=8)
    assert result.stderr.count("\n") == 1
    result = run("convert", "sql", "file/out", "--to", "peft", code=8)
    assert result.stderr.startswith("error: file/out: its parent is a file, not a folder")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    assert "_ADAPTERHUB_COMPLETE" in run("completion", shell).stdout
    words = {
        "COMP_WORDS": "adapterhub va",
        "COMP_CWORD": "va" if shell == "fish" else "1",
        "_ADAPTERHUB_COMPLETE": f"{shell}_complete",
    }
    assert "validate" in run(env=words).stdout


def test_completion_after_a_group_lists_its_commands(run: Run) -> None:
    def complete(*words: str) -> list[str]:
        variables = {"COMP_WORDS": " ".join(["adapterhub", *words, ""]), "COMP_CWORD": str(1 + len(words))}
        result = run(env={**variables, "_ADAPTERHUB_COMPLETE": "bash_complete"})
        assert result.stderr == ""
        return [line.partition(",")[2] for line in result.stdout.splitlines()]

    def check(group: click.Group, *words: str) -> None:
        context = click.Context(group)
        commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
        assert sorted(complete(*words)) == sorted(name for name, command in commands.items() if command and not command.hidden)
        for name, command in commands.items():
            if isinstance(command, click.Group):
                check(command, *words, name)

    check(app)
    assert "rank-config" in complete("explain")


def test_no_arguments_is_help(run: Run) -> None:
    result = run("help", "--all")
    assert all(f"  {command}" in result.stdout for command in COMMANDS)


def test_findings_are_exit_1_and_no_color_in_a_pipe(run: Run, sql: Path) -> None:
    assert run("validate", "sql", "--base", "base").stdout.endswith("ok: nothing to report\n")
    (sql / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 5, "lora_alpha": 1, "target_modules": ["q_proj"]}')
    result = run("validate", "sql", "--base", "base", code=1)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert f"error[rank-config] adapter_model.safetensors: {', '.join(names)}: rank 2, but" in result.stdout
    assert "\x1b" not in result.stdout
    assert json.loads(run("validate", "sql", "--json", code=1).stdout)["ok"] is False


def test_a_runtime_that_is_asked_for_must_apply_it(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "rs", {**pairs(2), **pairs(2, module="model.layers.{}.self_attn.v_proj")}, use_rslora=True)
    run("validate", "rs", "--for", "peft", "--for", "llama.cpp")
    result = run("validate", "rs", "--for", "sglang", "--format", "github", code=1)
    assert "title=runtime::sglang wrong: scales by alpha / r" in result.stdout


def test_results_and_messages_are_in_one_file_in_the_order_in_which_they_were_printed() -> None:
    code = "from adapterhub.cli import output; output.write('a'); output.say('b'); output.write('c')"
    environment = {**os.environ, "PYTHONPATH": PATH}
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, env=environment
    )
    assert result.stdout == "a\nb\nc\n"
