"""Text that would take a pattern that backtracks hours, in each place where a command reads a stranger's text.

The limit of a command is there to end one that hangs; it says nothing about its time.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters import peft_patterns, safe_regex, yaml_lines
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats.trainers import fused_layers
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.folders import adapter, base, pairs
from tests.support.hub_server import File, Hub, Repo

N = 900_000
ADDED = "# adapterhub: added"
READMES = {
    "a comment far away": f"---\nlicense: a{' ' * N}b\n---\n",
    "spaces after a key": f"---\nbase_model:{' ' * N}x\n---\n",
    "spaces before a key": f"---\n{' ' * N}x\n---\n",
    "hashes": f"---\nlicense: {'a #' * (N // 3)}\n---\n",
    "one list": f"---\ntags: [{',' * N}\n---\n",
    "many lines of a list": f"---\ntags:\n{'- ' * (N // 2)}\n---\n",
    "a quote that does not end": f'---\n"{"a" * N}\n---\n',
    "fences that are none": "---\n" + "--- x\n" * (N // 6),
    "beginnings without an end": "---\n" + f"{ADDED}\n" * (N // 20),
    "endings that are none": f"---\n{ADDED}\n" + "# adapterhub: end of what was added x\n" * (N // 40),
}


@pytest.fixture
def command(run: Run, tmp_path: Path) -> Run:
    """Run a command in a folder that is its user's home and has the registry."""

    def call(*words: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        result = run(*words, env={"ADAPTERHUB_REGISTRY": str(tmp_path), "HOME": str(tmp_path)}, code=code)
        assert result.returncode != 70, result.stderr
        return result

    return call


def test_a_readme_stops_neither_its_push_nor_the_registry(command: Run, tmp_path: Path) -> None:
    command("init")
    for number, text in enumerate(READMES.values()):
        folder = adapter(tmp_path / f"a{number}", pairs(2))
        (folder / "README.md").write_text(text)
        command("push", folder, f"team/a{number}")
    listed = command("list").stdout
    assert all(f"team/a{number}" in listed for number in range(len(READMES)))
    command("fsck", "--rebuild-index")
    command("fsck")


@pytest.mark.parametrize("text", READMES.values(), ids=READMES)
def test_a_card_of_a_hub(text: str) -> None:
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.remotes.hub import hub_files

    manifest = AdapterManifest.salvage({"base": {"repo": "org/base"}})
    card = hub_files.complete_card(text.encode(), manifest)
    assert hub_files.original_readme(card) == text.encode()


def test_the_readme_of_a_base_that_is_merged_into(command: Run, tmp_path: Path) -> None:
    base(tmp_path / "base")
    (tmp_path / "base/README.md").write_text(READMES["a comment far away"])
    adapter(tmp_path / "a", pairs(2))
    command("merge", "a", "--into", "base", "-o", "merged")


@pytest.mark.parametrize("line", [f"lora_r:{' ' * N}x", f"{' ' * N}x", f"lora_r: {'8 #' * (N // 3)}", "a" * N])
def test_the_options_that_a_trainer_leaves(tmp_path: Path, line: str) -> None:
    (tmp_path / "hyperparameters.yaml").write_text(f"{line}\nlora_alpha: 16 # twice r\n")
    options = fused_layers.scalars(tmp_path / "hyperparameters.yaml")
    assert fused_layers.numbers(options, alpha="lora_alpha") == {"alpha": 16.0}


@pytest.mark.parametrize("pattern", ["(" * 160 + "a" + ")+" * 160, "(" * 499 + "a" + ")" * 499, "(a|a)*" * 160 + "é"])
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "exclude_modules"])
def test_patterns_of_a_config(command: Run, tmp_path: Path, key: str, pattern: str) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    config = json.loads((folder / "adapter_config.json").read_text())
    config[key] = {pattern: 2} if key == "rank_pattern" else pattern
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for words in (
        ["validate", "a"],
        ["diff", "a", "a"],
        ["convert", "a", "out", "--to", "raw"],
        ["merge", "a", "a", "-o", "b"],
    ):
        command(*words, code=None)


def test_nesting_beyond_what_can_be_compiled_is_refused_anywhere() -> None:
    def deep(depth: int) -> None:
        if depth:
            deep(depth - 1)
        else:
            peft_patterns.fullmatch("(" * 480 + "é" + ")" * 480, "é", "x")

    for depth in range(0, 900, 100):
        try:
            deep(depth)
        except (FormatError, RefusedError, RecursionError):  # the last of our own depth here
            continue


@pytest.mark.parametrize(
    "challenge", ["Bearer" + " " * 60_000 + "!", 'Bearer a="' + "\\" * 15_000, "Bearer " + "a," * 8_000, "a" * 16_000]
)
def test_a_challenge(challenge: str) -> None:
    from adapterhub.remotes.oci import challenges

    challenges.parse([challenge])


def test_challenges_are_read_as_they_are_meant() -> None:
    from adapterhub.remotes.oci import challenges

    header = 'Basic realm="x", Bearer realm="https://a/t" , service = "a \\"b\\"", scope=pull, Negotiate'
    assert challenges.parse([header]) == {
        "basic": {"realm": "x"},
        "bearer": {"realm": "https://a/t", "service": 'a "b"', "scope": "pull"},
        "negotiate": {},
    }


@pytest.mark.parametrize("link", [" " * 60_000 + "<", "<" * 60_000 + ">", f"<a>{' ' * 60_000};rel"])
def test_a_link_to_no_next_page(link: str) -> None:
    from adapterhub.http.urls import next_page

    assert next_page(link, "http://a/", "a") is None


@pytest.mark.parametrize(
    "name",
    [
        "module." * 100_000,
        "base_model.model." * 50_000,
        ".base_layer" * 90_000,
        "1." * N,
        ".lora_A" * 90_000,
        "_blocks." * 90_000,
    ],
)
def test_names_of_tensors(command: Run, tmp_path: Path, name: str) -> None:
    folder = adapter(tmp_path / "a", pairs(2))
    tensors = {name: np.zeros((2, 8), np.float32)}
    header: Any = {name: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}}
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + tensors[name].tobytes())
    for words in (["validate", "a"], ["convert", "a", "out", "--to", "raw"]):
        command(*words, code=None)


def test_front_matter_is_read_as_yaml_is() -> None:
    lines = [
        "license: mit # as ever",
        "'tags': [a, \"b c\"]",
        "base_model:",
        "- org/a#1",
        "- 'x'",
        "x:",
        "  y: 1",
        "title: a: b",
    ]
    assert yaml_lines.mapping(lines) == {
        "license": ["mit"], "tags": ["a", "b c"], "base_model": ["org/a#1", "x"], "x": [], "title": [],
    }  # fmt: skip


def test_half_a_pair_of_surrogates_matches_no_pattern() -> None:
    assert safe_regex.Pattern(".*").fullmatch("\ud800") is None


def test_a_hub_with_such_a_card_does_not_end_the_registry_it_is_copied_to(command: Run, tmp_path: Path, hub: Hub) -> None:
    command("init")
    folder = adapter(tmp_path / "a", pairs(2))
    (folder / "README.md").write_text(READMES["a comment far away"])
    files = {path.name: File(path.read_bytes()) for path in folder.iterdir()}
    repo = hub.repos["evil/a"] = Repo()
    repo.branches["main"] = repo.add(files, "one", None)
    command("copy", f"hub+{hub.url}/evil/a", "team/a")
    assert "team/a" in command("list").stdout
    command("fsck")


@pytest.mark.parametrize("words", [("validate", "sql"), ("push", "sql", "team/sql")])
@pytest.mark.parametrize("text", ["[" * 65_000, "*a\n" * 257])
def test_an_ignore_file_of_patterns_without_bound_is_refused(
    command: Run, tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    write_adapter(tmp_path / "sql")
    (tmp_path / "sql" / ".adapterhubignore").write_text(text)
    assert "more than 256 patterns, or one of more than 256 characters" in command(*words, code=4).stderr


@pytest.mark.parametrize("patterns", [["[" * N], ["a"] * 257])
def test_a_policy_of_patterns_without_bound_is_refused(command: Run, tmp_path: Path, patterns: list[str]) -> None:
    write_adapter(tmp_path / "sql")
    (tmp_path / "adapterhub.toml").write_text(f"[policy]\nallow = {json.dumps(patterns)}\n")
    assert "at most 256 characters" in command("push", "sql", "team/sql", code=2).stderr
