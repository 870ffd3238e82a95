"""What the commands do to an adapter, from the command line to the bytes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from tests.cli.test_process import HEAVY, PATH, loaded
from tests.conftest import Run, Terminal
from tests.support.folders import adapter, base, pairs, vera


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    base(tmp_path / "base", 2)
    return adapter(tmp_path / "sql", pairs(2))


def document(run: Run, *args: object, **options: Any) -> Any:
    return json.loads(run(*args, "--json", **options).stdout)


def test_the_life_of_an_adapter(run: Run, sql: Path, tmp_path: Path) -> None:
    assert document(run, "init")["created"] is True
    pushed = document(run, "push", "sql", "team/sql:prod", "--base", "base")
    assert (pushed["ref"], pushed["tags"], pushed["new"]) == ("team/sql:v1", ["latest", "prod"], True)
    assert document(run, "validate", "team/sql", "--base", "base")["reports"][0]["problems"] == []
    assert document(run, "show", "team/sql:prod")["digest"] == pushed["digest"]
    assert [row["ref"] for row in document(run, "list")["adapters"]] == ["team/sql:v1"]
    pulled = document(run, "pull", "team/sql", "-o", "out")
    assert pulled["digest"] == pushed["digest"]
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (sql / name).read_bytes()
    assert document(run, "show", "out")["digest"] == pushed["digest"]
    assert document(run, "verify", "out") == {"ok": True, "source": "out", "findings": []}
    assert document(run, "push", "out", "team/sql")["new"] is False
    assert document(run, "tag", "team/sql:v1", "blessed")["tags"] == ["blessed", "latest", "prod"]
    assert document(run, "rm", "team/sql:blessed") == {"removed": "team/sql:blessed", "kind": "tag"}
    assert document(run, "fsck") == {"ok": True, "source": str(tmp_path), "findings": []}


LIGHT = [
    ["init"], ["push", "sql", "team/b"], ["pull", "team/a", "-o", "new"], ["list"], ["list", "--tree"], ["search", "a"],
    ["search", "--file", "sql"], ["show", "team/a"], ["show", "sql"],
    ["validate", "sql", "--base", "base"], ["convert", "sql", "out", "--to", "mlx", "--base", "base"],
    ["base", "add", "tiny", "base"], ["base", "list"], ["base", "show", "base/config.json"],
    ["tag", "team/a", "x"], ["verify", "team/a"], ["fsck"], ["rm", "team/a"], ["completion", "bash"],
    ["merge", "sql", "--into", "base", "-o", "merged"], ["merge", "sql", "sql", "-o", "merged"], ["diff", "sql", "team/a"],
    ["fix", "sql"],
]  # fmt: skip


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_no_command_but_train_imports_anything_heavy(run: Run, sql: Path, tmp_path: Path, args: list[str]) -> None:
    run("push", "sql", "team/a")
    assert not loaded(run, tmp_path, *args) & (HEAVY - {"urllib3"})  # which the process that `run` forks has


def test_removing_a_name_asks_on_a_terminal_and_a_restore_undoes_it(run: Run, terminal: Terminal, sql: Path) -> None:
    run("push", "sql", "team/sql:prod")
    before = document(run, "show", "team/sql")
    for typed in ("n\n", "\n", "\x04"):
        screen = terminal("rm", "team/sql", typed=typed)
        assert "Remove team/sql with 1 version? [y/N]" in screen
        assert "nothing was removed" in screen
    assert document(run, "show", "team/sql") == before
    assert "`adapterhub restore team/sql` undoes it" in terminal("rm", "team/sql", typed="y\n")
    assert "`adapterhub restore team/sql`" in run("push", "sql", "team/sql", code=7).stderr
    assert document(run, "restore", "team/sql") == {"restored": "team/sql", "versions": [1], "lost": []}
    assert document(run, "show", "team/sql") == before
    assert "[y/N]" not in terminal("rm", "team/sql", "-y")
    assert document(run, "list")["adapters"] == []


def test_something_that_is_both_a_path_and_a_ref(run: Run, sql: Path, tmp_path: Path) -> None:
    run("push", "sql", "team/sql")
    (tmp_path / "team").mkdir()
    adapter(tmp_path / "team/sql", pairs(1))
    result = run("validate", "team/sql", code=2)
    assert "Write ./team/sql for the path, team/sql:latest for the adapter" in result.stderr
    assert document(run, "validate", "./team/sql")["reports"][0]["facts"]["modules"] == 1
    assert document(run, "validate", "team/sql:latest")["reports"][0]["facts"]["modules"] == 2


def test_a_flipped_byte_is_found_everywhere(run: Run, sql: Path, tmp_path: Path) -> None:
    run("push", "sql", "team/sql")
    run("pull", "team/sql", "-o", "out")
    files = {file["path"]: file["digest"] for file in document(run, "show", "team/sql")["manifest"]["files"]}
    blobs = tmp_path / "xdg/adapterhub/.adapterhub/blobs/sha256"
    for path in (tmp_path / "out" / peft.WEIGHTS, blobs / files[peft.WEIGHTS].removeprefix("sha256:")):
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.chmod(0o644)
        path.write_bytes(raw)
    assert "[flipped]" in run("verify", "out", code=1).stdout
    assert "[files-changed]" in run("validate", "out", code=1).stdout
    assert document(run, "verify", "team/sql", code=1)["ok"] is False
    assert document(run, "fsck", code=1)["findings"][0]["severity"] == "error"
    run("pull", "team/sql", "-o", "again", code=4)
    assert not (tmp_path / "again").exists()


def test_convert_reports_what_became_of_every_tensor(run: Run, sql: Path, tmp_path: Path) -> None:
    result = run("convert", "sql", "out", "--to", "mlx", "--base", "base")
    assert result.stdout.splitlines()[0] == "out: 4 tensors: 4 exact"
    again = document(run, "convert", "out", "back", "--to", "peft")
    assert again["worst"] == "exact"
    assert {line["loss"] for line in again["tensors"]} == {"exact"}
    assert "out: already exists" in run("convert", "sql", "out", "--to", "mlx", code=2).stderr


def test_merge_into_a_base(run: Run, sql: Path, tmp_path: Path) -> None:
    merged = document(run, "merge", "sql", "--into", "base", "--weights", "-0.5", "-o", "merged")
    assert sorted(merged["touched"]) == [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)]
    with (
        safetensors_file.SafetensorsFile(sql / peft.WEIGHTS) as factors,
        safetensors_file.SafetensorsFile(tmp_path / "merged/model.safetensors") as weights,
    ):
        stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
        delta = factors.tensor(f"{stem}B.weight") @ factors.tensor(f"{stem}A.weight")
        np.testing.assert_allclose(weights.tensor("model.layers.1.self_attn.q_proj.weight"), -0.5 * 2 * delta, rtol=1e-5)


def test_merge_reads_what_needs_the_base_with_it(run: Run, sql: Path, tmp_path: Path) -> None:
    vera(tmp_path / "vera", {"model.layers.0.self_attn.q_proj": 8}, (8, 16))
    assert list(document(run, "merge", "vera", "--into", "base", "-o", "merged")["touched"]) == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_merge_into_an_adapter_keeps_its_parents(run: Run, sql: Path, tmp_path: Path) -> None:
    run("push", "sql", "team/sql")
    merged = document(run, "merge", "team/sql", "sql", "--weights", "0.7,0.3", "-o", "both")
    assert [(parent.get("ref"), parent["weight"]) for parent in merged["parents"]] == [("team/sql:v1", 0.7), (None, 0.3)]
    assert document(run, "show", "both")["manifest"]["parents"] == merged["parents"]
    assert document(run, "validate", "both", "--base", "base")["ok"] is True


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--weights", "1,2"], "2 weights for 1 adapter. Write one for each adapter, in their order"),
        (["--weights", "much"], "is not a list of numbers"),
        (["--into", "base", "--rank", "3"], "is for a merge of adapters"),
        (["--method", "average"], "is not one of"),
    ],
)
def test_merge_usage(run: Run, sql: Path, args: list[str], says: str) -> None:
    assert says in run("merge", "sql", "-o", "out", *args, code=2).stderr


def blocker(tmp_path: Path, *modules: str) -> str:
    """A PYTHONPATH on which some modules are as if they weren't installed."""
    hook = tmp_path / "blocked"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        f"    names = {modules!r}\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in self.names:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    return os.pathsep.join([str(hook), PATH])


def test_training_without_the_extra_names_what_to_install(run: Run, sql: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "c.toml").write_text('[base]\npath = "base"\n[data]\ntrain = ["data.jsonl"]\n')
    result = run("train", "c.toml", "-o", "out", env={"PYTHONPATH": blocker(tmp_path, "torch")}, code=9)
    assert result.stderr.count("\n") == 1
    assert "adapterhub[train]" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_merge_that_has_to_find_where_a_template_ends_answers_names_what_to_install(
    run: Run, sql: Path, tmp_path: Path
) -> None:
    tokens = {"1": {"content": "<|end|>", "special": True}, "2": {"content": "</s>", "special": True}}
    config = {"added_tokens_decoder": tokens, "eos_token": "</s>"}
    (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(config))
    merge, without = ("merge", "sql", "--into", "base", "-o", "out"), {"PYTHONPATH": blocker(tmp_path, "jinja2")}
    (sql / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}</s>{% endfor %}")
    run(*merge, "--dry-run", env=without)
    (sql / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}<|end|>{% endfor %}")
    result = run(*merge, env=without, code=9)
    assert result.stderr.count("\n") == 1
    assert "jinja2" in result.stderr
    assert "pip install 'adapterhub[" in result.stderr
    assert not (tmp_path / "out").exists()
    run(*merge)
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": [1]}


def test_the_rest_works_without_the_extras(run: Run, sql: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": blocker(tmp_path, *HEAVY)}
    run("validate", "sql", "--base", "base", env=environment)
    run("push", "sql", "team/sql", env=environment)
    run("convert", "team/sql", "out", "--to", "mlx", "--base", "base", env=environment)


FULL: list[list[str]] = [
    ["push", "bigger", "team/big"],
    ["convert", "big", "out", "--to", "mlx", "--base", "base"],
    ["pull", "team/there", "-o", "out"],
]


@pytest.mark.parametrize("args", FULL, ids=" ".join)
def test_a_full_disk_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, args: list[str]) -> None:
    base(tmp_path / "base", 2, size=256)
    adapter(tmp_path / "big", pairs(2, r=64, size=(256, 256)), r=64)
    run("push", "big", "team/there", "--registry", "reg")
    adapter(tmp_path / "bigger", pairs(2, r=65, size=(256, 256)), r=65)
    before = files_in(tmp_path), document(run, "list", "--registry", "reg")
    result = subprocess.run(
        [sys.executable, "-m", "adapterhub", *args, "--registry", "reg"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": PATH},
        preexec_fn=limit(100_000),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 8, result.stderr
    assert result.stderr.count("\n") == 1
    assert (files_in(tmp_path), document(run, "list", "--registry", "reg")) == before
    run("fsck", "--registry", "reg")


def files_in(folder: Path) -> list[str]:
    """All that lies in a folder but for the store, whose blobs nothing points to are harmless."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(path for path in paths if not path.startswith("reg/"))


def limit(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes, as on a disk that is full."""

    def set_limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return set_limit


def test_color_is_for_terminals_that_want_it(terminal: Terminal, sql: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[32mok" in terminal("validate", "sql")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in terminal("validate", "sql")


def test_disk_usage_tells_a_base_that_is_pinned_from_one_that_is_only_named(run: Run, sql: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "other", pairs(2), base_model_name_or_path="org/base")
    adapter(tmp_path / "pinned", pairs(2), base_model_name_or_path="org/base")
    run("describe", "pinned", "--base", "base", "--set", "base.repo=org/base")
    run("push", "pinned", "team/pinned")
    run("push", "other", "team/other")
    assert {"org/base (not pinned)", "org/base (sha256"} <= {line.partition(":")[0] for line in run("du").stdout.splitlines()}


def test_the_lines_of_a_card_that_changed_between_two_versions_are_shown(run: Run, sql: Path) -> None:
    card = sql / "README.md"
    for text in ("# SQL\n\nTwo tables.\n", "# SQL\n\nThree tables.\n"):
        card.write_text(text)
        run("push", sql, "team/card")
    lines = run("diff", "team/card:v1", "team/card:v2").stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("  ") and "tables" in line] == [
        ["-", "Two", "tables."],
        ["+", "Three", "tables."],
    ]


def test_the_token_of_an_ordinary_user_is_not_listed_as_one_of_an_admin(run: Run, tmp_path: Path) -> None:
    run("hub", "user", "add", "bo", "--registry", tmp_path)
    listed = run("hub", "token", "list", "--registry", tmp_path).stdout
    assert "as the account" in listed
    assert "admin" not in listed
