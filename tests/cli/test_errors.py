"""The tables of hints name options and commands that exist."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import click
import pytest

from adapterhub.cli.errors import HINTS, OPTIONS
from adapterhub.cli.main import _EXTRAS, app, translate
from adapterhub_converters.errors import MissingExtraError
from tests.conftest import ROOT, Run
from tests.support.folders import adapter, pairs


def commands(group: click.Group, path: str = "") -> dict[str, click.Command]:
    """Every command by the words that call it."""
    context = click.Context(group)
    found_commands: dict[str, click.Command] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found_commands[f"{path}{name}"] = command
        if isinstance(command, click.Group):
            found_commands |= commands(command, f"{path}{name} ")
    return found_commands


COMMANDS = commands(app)


def options(*commands: click.Command) -> set[str]:
    """The options of commands, `--no-…` included."""
    return {name for command in commands for option in command.params for name in (*option.opts, *option.secondary_opts)}


KNOWN = options(*COMMANDS.values())


@pytest.mark.parametrize("hint", HINTS.values(), ids=HINTS)
def test_a_hint_names_options_and_commands_that_exist(hint: str) -> None:
    ours = re.sub(r"`(?!adapterhub )[^`]*`", "", hint)  # a command of somebody else's has its own
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) <= KNOWN
    for words in re.findall(r"`adapterhub ([^`]*)`", hint):
        name, *arguments = words.split()
        assert name in COMMANDS
        known_options = options(*(command for path, command in COMMANDS.items() if f"{path} ".startswith(f"{name} ")))
        assert {word for word in arguments if word.startswith("--")} <= known_options


@pytest.mark.parametrize("option", OPTIONS.values())
def test_a_parameter_has_an_option_that_exists(option: str) -> None:
    assert option.split(maxsplit=1)[0] in KNOWN


@pytest.mark.parametrize("words", ["show a", "show a/adapter_model.safetensors", "diff a a", "merge a -o x"])
def test_a_folder_without_its_config_is_told_so(run: Run, tmp_path: Path, words: str) -> None:
    adapter(tmp_path / "a", pairs(1))
    (tmp_path / "a/adapter_config.json").unlink()
    stderr = run(*words.split(), code=6).stderr
    assert stderr.startswith("error: a/adapter_config.json: is missing, and nothing else records its alpha. Restore")
    assert stderr.count("\n") == 1


def test_a_recorded_base_that_is_not_here_names_the_option_that_downloads_it(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "c", pairs(1), base_model_name_or_path="acme/tiny")
    stderr = run("run", "c", "hi", code=3).stderr
    assert "Pass --base FOLDER, or --base hf://acme/tiny, which downloads it from the Hub  [base-not-here]" in stderr


# Modules whose absence the code that imports them explains itself, or that are only imported by their own program.
_EXPLAINED = {"keyring", "pyarrow", "vllm"}


def test_a_package_that_is_not_installed_leads_to_the_extra_that_brings_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = {re.split(r"[\[<>=; ]", requirement)[0].lower().replace("-", "_") for requirement in project["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    for path in [path for root in ("adapterhub", "converters", "schemas") for path in (ROOT / root).rglob("*.py")]:
        for name in re.findall(
            r"^ *(?:import(?= \w+(?: as \w+)?$)|from(?= [\w.]+ import )) (\w+)", path.read_text(), re.MULTILINE
        ):
            if name in sys.stdlib_module_names or name.startswith("adapterhub") or name in _EXPLAINED:
                continue
            brought = {requirement.lower().replace("-", "_") for requirement in distributions.get(name, ())} & always
            assert brought or name in _EXTRAS, f"{path}: {name}"
    assert {extra for extras in _EXTRAS.values() for extra in extras} <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    ("words", "extra"), [("serve base", "serve"), ("hub start", "hub"), ("--registry x hub start", "hub"), ("train x", "hub")]
)
def test_a_module_of_several_extras_leads_to_that_of_the_command(words: str, extra: str) -> None:
    error = translate(ModuleNotFoundError("none", name="uvicorn"), words.split())
    assert error is not None
    assert error.hint == f"Run `pip install 'adapterhub[{extra}]'`"


@pytest.mark.parametrize("line", ["ctypes.CDLL('libnone.so.12')", "raise ImportError('libnone.so.12: not found')"])
def test_a_package_whose_libraries_are_missing_is_named_with_what_the_system_says(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "without_libraries.py").write_text(f"import ctypes\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((OSError, ImportError)) as caught:
        importlib.import_module("without_libraries")
    error = translate(caught.value)
    assert isinstance(error, MissingExtraError)
    assert str(error).startswith("without_libraries: is installed, but cannot be loaded (libnone.so.12: ")
    assert str(error).endswith("Install a build of it for this machine, and the libraries that it needs")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            "extract a --base b -o x",
            2,
            "extract: requires either --rank or --energy. Add --rank 32, for example  [invalid-usage]",
        ),
        (
            "search sql --file a",
            2,
            "WORDS: is not for --file and --sha256, which compare contents with every version",
        ),
        ("verify a --base b", 2, "--base, --data and --parent-key: require --recompute. Pass --recompute too"),
        ("verify a --recompute", 2, "--recompute: requires --attestations. Pass --attestations too  [conflicting-options]"),
        ("explain rank-confgi", 3, "rank-confgi: no such code. Did you mean rank-config?  [not-found]"),
        ("push a", 2, "push: Missing argument 'REF'. Name it, like `adapterhub push a team/a --registry "),
        ("push a/adapter_model.safetensors", 2, "like `adapterhub push a/adapter_model.safetensors team/a --registry "),
        ("push .", 2, "Missing argument 'REF'. Name it, like `adapterhub push . team/"),
        (
            "validate a/adapter_modl.safetensors",
            3,
            "no such file or folder, and no adapter of this name. Did you mean a/adapter_model.safetensors?  [no-such-file]",
        ),
        ("convert a/merged x.gguf --to gguf", 3, "a/merged: no such file or folder, and no adapter of this name"),
        ("show nowhere/sql", 3, "no registry there. Push the first adapter, which makes it"),
        ("convert nowhere/sql x.gguf", 3, "nowhere/sql: no such file or folder, and no registry in "),
        ("pull nowhere/sql", 3, "makes an empty one; hf://nowhere/sql means one on the Hub  [no-registry]"),
        ("pull Ada/Sql", 2, "Write ada/sql, or hf://Ada/Sql for one on the Hub  [invalid-ref]"),
        ("show Ada/Sql", 3, "A ref is like team/sql:v2, and hf://Ada/Sql one on the Hub  [no-such-file]"),
        ("convert a x.gguf", 6, "Pass --base with its folder, its GGUF file, or hf://org/model"),
        ("convert c x.gguf", 6, "Pass --base FOLDER, or --base hf://acme/tiny, which the adapter records  [base-required]"),
        ("run c hi --base acme/tiny", 3, "Write hf://acme/tiny for one on the Hub  [base-not-here]"),
        ("merge c --into acme/tiny -o out", 3, "Write hf://acme/tiny for one on the Hub  [base-not-here]"),
        ("push a team/a --metric x", 2, "--metric: 'x' is not NAME=VALUE. Write it like exact_match=0.71  [invalid-usage]"),
        ("describe a --set license=mit --set license=mit", 2, "--set: license is set twice. Leave one out  [invalid-usage]"),
        ("describe a --set base=b --set base.repo=b", 2, "--set: base.repo is set twice"),
        ("describe a --set base.repo=b --set base=b", 2, "--set: base is set twice"),
        ("pull", 2, "pull: Missing argument 'REF'. See `adapterhub pull --help`  [invalid-usage]"),
        ("copy a b", 2, "both are folders. Copy a folder with the tools of your system  [invalid-usage]"),
        ("list", 3, "none` makes an empty one  [no-registry]"),
        ("login https://hub.example/x", 2, "Write hub+https://hub.example for a hub, or hub.example for an OCI registry"),
    ],
)
def test_what_cannot_be_asked_for_is_told_in_one_line_with_what_to_write(
    run: Run, tmp_path: Path, words: str, code: int, message: str
) -> None:
    for name in ("a", "b"):
        adapter(tmp_path / name, pairs(1))
    adapter(tmp_path / "c", pairs(1), base_model_name_or_path="acme/tiny")
    stderr = run(*words.split(), "--registry", tmp_path / "none", code=code).stderr
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("words", ["list", "info", "validate adapter", "remote list", "pull oci://127.0.0.1:9/team/sql"])
def test_a_user_without_a_home_folder_is_told_to_set_one(run: Run, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.delenv("HOME", raising=False)
    env = dict.fromkeys(["XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"], "")
    unknown = "import pwd\ndef getpwuid(_):\n    raise KeyError\npwd.getpwuid = getpwuid"
    error = run(*words.split(), env=env, first=unknown, code=2).stderr
    assert error == (
        "error: HOME: is not set, and the system knows no home folder of this user. Set it to a folder  [invalid-usage]\n"
    )


@pytest.mark.parametrize(
    ("words", "variable"),
    [("remote add hub hub+http://127.0.0.1:9", "XDG_CONFIG_HOME"), ("push adapter team/a", "XDG_DATA_HOME")],
)
def test_a_home_that_cannot_be_written_to_is_told_with_the_variable_that_moves_the_folder(
    run: Run, tmp_path: Path, words: str, variable: str
) -> None:
    adapter(tmp_path / "adapter", pairs(1))
    home = tmp_path / "home"
    home.mkdir()
    for name in (".config", ".local"):
        (home / name).touch()  # a file: a folder without write permission stops no administrator
    env = {"HOME": str(home), "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
    error = run(*words.split(), env=env, code=8).stderr
    assert f"Not a directory. Set {variable} to a folder where you can write  [io-error]" in error
    assert error.count("\n") == 1
