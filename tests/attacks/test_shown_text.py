"""Texts of strangers: no name of a file, a module, a base or a tag controls a terminal, a runner, a picture or a page."""

from __future__ import annotations

import json
import os
import pickle
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.cli import output
from adapterhub.cli.main import COMMANDS
from adapterhub.manifest.package_files import check_paths
from adapterhub.merging.into_base import side_files
from adapterhub_converters import display
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.conftest import Run, need_module
from tests.support.folders import adapter, base, pairs

# An escape sequence, C1, bidi, zero width, a letter without a shape, commands of runners, markup of every place.
HIDDEN = "\x1b[31m\x1b]0;t\x07\x9b2J\u202e\u200b\u3164\ufeff"
TEXT = f"{HIDDEN}a\n::stop-commands::x\r##[add-mask]e%0A##vso[x]<script>$\\frac{{x}}$[red]|`*"
MODULE = TEXT.removeprefix(HIDDEN).replace("\n", "").replace("\r", "")  # names of tensors have to be printable
NAME = TEXT.replace("/", "") + os.fsdecode(b"\xff")  # also no UTF-8
ACTIONS = {"GITHUB_ACTIONS": "true"}


def raw(text: str, *, annotations: bool = False) -> list[str]:
    """The lines of an output in which something of a stranger's came out raw."""
    raw_lines = []
    for line in text.split("\n"):
        ours = annotations and line.startswith(("::error file=", "::warning file=", "::notice file="))
        command = "##[" in line or "##vso[" in line or (line.lstrip().startswith("::") and not ours)
        if command or display.has_invisible(line):
            raw_lines.append(line)
    return raw_lines


@pytest.fixture
def clean(run: Run) -> Callable[..., str]:
    """Run a command line, whatever its end, and return its output, in which nothing is raw."""

    def call(*arguments: object, annotations: bool = False) -> str:
        result = run(*arguments, env=ACTIONS, code=None)
        assert result.returncode != 70, result.stderr
        assert raw(result.stdout, annotations=annotations) + raw(result.stderr) == []
        return str(result.stdout)

    return call


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An adapter with that name in that folder, for that base and on modules with that name, next to a base."""
    names = {f"base_model.model.model.layers.{n}.{MODULE}.lora_{ab}.weight": shape for n in range(2) for ab, shape in
             (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
    adapter(tmp_path / NAME, names, target_modules=[MODULE], base_model_name_or_path=TEXT, r=3, revision=TEXT)
    base(tmp_path / "base", 2)
    return tmp_path / NAME


# --- every command


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_a_name_raw_that_it_does_not_know(clean: Callable[..., str], command: str) -> None:
    for arguments in ([NAME], ["--json", NAME, NAME], [f"team/a:{TEXT}", f"oci://127.0.0.1:1/{TEXT}"], [f"--{TEXT}"]):
        clean(command, *arguments)


def test_no_command_shows_a_name_raw_that_it_knows(clean: Callable[..., str], hostile: Path, tmp_path: Path) -> None:
    need_module("matplotlib")
    path = tmp_path / "other"
    adapter(path, pairs(2), base_model_name_or_path=MODULE)
    (path / "README.md").write_text(f"---\nlicense: {json.dumps(TEXT)}\ntags: [{json.dumps(TEXT)}]\n---\n")
    clean("push", hostile, "team/a", "--force")
    clean("push", path, "team/b:prod", "--force")
    clean("merge", "team/b", "team/b", "--method", "linear", "-o", "team/both")
    assert "team/both" in clean("list")
    for options in ([], ["--json"]):
        clean("show", NAME, *options)
        clean("show", "team/b", *options)
        clean("diff", NAME, NAME, *options)
        clean("diff", NAME, path, *options)
        clean("fix", NAME, "--dry-run", *options)
        clean("list", *options)
        clean("list", "team/b", *options)
        clean("log", "team/b", *options)
        clean("tag", "team/b", "x", *options)
        clean("lineage", "team/both", *options)
        clean("search", "a", *options)
        clean("search", "--file", path, *options)
        clean("verify", "team/b", *options)
        clean("fsck", *options)
        clean("du", *options)
        clean("gc", "--dry-run", *options)
        clean("deprecate", "team/b", TEXT, *options)
        clean("show", "team/b", *options)
        clean("bundle", "team/b", "-o", f"{NAME}.tar{len(options)}", *options)
        clean("pull", "team/b", "-o", f"{NAME}.pulled{len(options)}", *options)
        clean("convert", NAME, f"{NAME}.gguf{len(options)}", "--to", "gguf", *options)
        clean("convert", path, f"{NAME}.mlx{len(options)}", "--to", "mlx", "--base", "base", *options)
        clean("base", "add", f"b{len(options)}", NAME, *options)
        clean("base", "show", NAME, *options)
        clean("remote", "add", f"r{len(options)}", f"oci://x/{TEXT}", *options)
    clean("lineage", "team/both", "--dot")


# --- the formats of validate


@pytest.mark.parametrize("style", ["text", "json", "sarif", "junit", "github"])
def test_a_report_shows_no_name_raw(clean: Callable[..., str], hostile: Path, tmp_path: Path, style: str) -> None:
    base(tmp_path / TEXT, 2)
    text = clean("validate", NAME, "--base", tmp_path / TEXT, "--format", style, annotations=style == "github")
    if style == "sarif":
        assert json.loads(text)["runs"]
    if style == "json":
        assert "##[add-mask]" in json.dumps(json.loads(text))  # the value is as it was
    if style == "junit":
        ET.fromstring(text)
    if style == "github":
        assert "::error file=" in text
        assert "%250A" in text


def test_the_uri_of_a_folder_whose_name_is_no_utf_8_has_its_bytes(run: Run, tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff")
    adapter(tmp_path / name, pairs(2), r=3)
    document = json.loads(run("validate", name, "--format", "sarif", code=1).stdout)
    locations = document["runs"][0]["results"][0]["locations"]
    assert locations[0]["physicalLocation"]["artifactLocation"]["uri"].startswith("a%FF/")


# --- the writers


def test_escape_sequences_of_others_do_not_color_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    output.write(f"{output.color('ok', 'green')}: \x1b[31mred\x1b[0m")
    assert capsys.readouterr().out == "\x1b[32mok\x1b[0m: \\x1b[31mred\\x1b[0m\n"


@pytest.mark.parametrize(
    "text", ["::error::x", "  ::debug::x", "##[error]x", "a ##[group]", "###[x]", "##vso[a]", "##teamcity[a]"]
)
def test_a_line_that_a_runner_would_obey_is_written_as_one_that_it_shows(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.write(text)
    output.say(text)
    output.write_json({text: text})
    captured = capsys.readouterr()
    assert raw(captured.out) + raw(captured.err) == []
    assert "##teamcity[" not in captured.out
    assert json.loads(captured.out.partition("\n")[2]) == {text: text}


def test_what_is_no_command_is_not_changed() -> None:
    for text in ("a::b", "# [x]", "## heading", "#[x]", "std::vector", "12:30"):
        assert output.escape_workflow_commands(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "<script>x</script>",
        "[a](http://x)",
        "![a](b)",
        "`a`",
        "a | b",
        "**a**",
        "# a",
        "http://x.y",
        "www.x.y",
        "&lt;",
        "@a",
        "_a_",
        "__a__",
    ],
)
def test_markdown_of_others_is_text(text: str) -> None:
    need_module("markdown_it")
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": True}).render(f"x {display.markdown(text)} y")
    root = ET.fromstring(html)
    assert (len(root), root.text) == (0, f"x {text} y")


def test_markdown_refers_to_no_issue_and_keeps_the_names_of_modules() -> None:
    assert display.markdown("fixes #12: self_attn.q_proj") == "fixes &#35;12: self_attn.q_proj"


def test_html_of_others_is_text() -> None:
    table = display.table([[TEXT]], head=[TEXT], caption=TEXT)
    assert "<script>" not in table
    assert not display.has_invisible(table)


def test_front_matter_keeps_every_text_as_a_value() -> None:
    need_module("yaml")
    import yaml

    values = {"a": TEXT, "b": [TEXT, "--- \n---"], "c": "Größe"}
    lines = display.front_matter(values)
    assert (lines[0], lines[-1], len(lines)) == ("---", "---", 5)
    assert yaml.safe_load("\n".join(lines[1:-1])) == values


# --- names that are packaged


@pytest.mark.parametrize(
    "char", ["\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\x85", "\x9b", "\u2028", "\u3164", "\u00ad"]
)
def test_a_file_name_with_a_character_that_nobody_sees_is_refused_and_spelled_out(run: Run, tmp_path: Path, char: str) -> None:
    adapter(tmp_path / "a", pairs(2))
    (tmp_path / "a" / f"note{char}s.txt").write_text("x")
    result = run("push", "a", "team/a", code=6)
    assert f"'note{display.printable(char)}s.txt'" in result.stderr
    assert char not in result.stderr
    with pytest.raises(RefusedError, match="has invisible characters"):
        check_paths([f"a/{char}/b.json"], "x", RefusedError)


def test_names_in_any_script_are_packaged(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "a", pairs(2))
    for name in ("Größe.txt", "日本語.txt", "עברית.txt", "😀.txt"):
        (tmp_path / "a" / name).write_text("x")
    run("push", "a", "team/a")


# --- pictures and pickles


def test_a_picture_of_too_many_kinds_has_a_limited_size(tmp_path: Path) -> None:
    need_module("matplotlib")
    from adapterhub.analysis import norms

    cells = {f"model.layers.{n}.{'x' * 5000}{kind}": 1.0 for n in range(2) for kind in range(300)}
    norms.plot(norms._arrange(cells, {}, relative=False), tmp_path / "a.png", title="t" * 1_000_000)
    width, height = np.frombuffer((tmp_path / "a.png").read_bytes()[16:24], ">u4")
    assert max(width, height) <= 10_000


def test_modules_that_make_no_table_are_listed_instead() -> None:
    from adapterhub.analysis import norms

    cells = {f"m.{n}.k{n}": 1.0 for n in range(2000)}
    arrangement = norms._arrange(cells, {}, relative=False)
    assert (arrangement.layers, len(arrangement.others)) == ((), 2000)


def test_a_picture_shows_a_formula_in_a_name_as_its_letters(run: Run, tmp_path: Path) -> None:
    need_module("matplotlib")
    module = "model.layers.{}.$\\frac{{x}}$$"
    adapter(tmp_path / "a$\\frac{x}$", pairs(2, module=module), target_modules=["x"])
    assert run("show", "a$\\frac{x}$", "--plot", "a.png").stderr == ""
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_refused_pickle_repeats_no_advice_to_load_it(run: Run, tmp_path: Path, protocol: int) -> None:
    need_module("torch")
    folder = adapter(tmp_path / "a", pairs(2))
    (folder / peft.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": _Evil()}, protocol=protocol))
    result = run("convert", "a", "b", "--to", "mlx", "--unsafe-pickle", code=None)
    assert result.returncode in (4, 6)
    assert "weights_only" not in result.stderr
    assert "torch.load" not in result.stderr


def test_a_merged_model_card_shows_the_name_of_its_base_as_text(tmp_path: Path) -> None:
    base(tmp_path / "base", 2)
    lineage = {"base": {"repo": TEXT, "revision": TEXT}, "adapters": [{"ref": TEXT, "weight": 1, "digest": "sha256:0"}]}
    text = side_files.model_card(tmp_path / "base", read_base(tmp_path / "base"), lineage, (TEXT,))
    body = text.partition("---\n\n")[2]
    assert "<script>" not in body
    assert not any(map(display.has_invisible, text.split("\n")))
