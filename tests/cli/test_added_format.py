"""A format that an installed package adds, in every command that takes an adapter.

The format is a zip archive with a suffix of its own. A command does with such a file what it does with the same adapter as a
folder of PEFT, to the last word of its output.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import click
import pytest

from adapterhub.cli.main import app
from tests.conftest import CHECKING, LEARNING, modules_for, need_module
from tests.support import forked
from tests.support.byte_tokenizer import write_tokenizer
from tests.support.folders import two_adapters

ROOT = Path(__file__).parents[2]
PACKAGE = """
from adapterhub_converters.formats import Format
FORMAT = Format("zipped", "zipped_lora.files", suffix=".zlora")
"""
FILES = """
import tempfile, zipfile
from pathlib import Path
from adapterhub_converters.formats import FORMATS
MEMBER = "lora.safetensors"
def sniff(candidate):
    if not candidate.is_file or not zipfile.is_zipfile(candidate.path):
        return False
    with zipfile.ZipFile(candidate.path) as archive:
        return archive.namelist() == [MEMBER]
def write(adapter, path, *, base=None):
    with tempfile.TemporaryDirectory() as folder:
        report = FORMATS["raw"].write(adapter, Path(folder) / MEMBER)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(MEMBER), (Path(folder) / MEMBER).read_bytes())
    return report
def read(path, *, base=None):
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        archive.extract(MEMBER, folder)
        return FORMATS["raw"].read(Path(folder) / MEMBER)
"""
CONFIG = """
[base]
path = "base"
[data]
train = ["text.jsonl"]
[lora]
r = 2
alpha = 4
targets = ["q_proj"]
[train]
steps = 2
"""
ADAPTER = "ADAPTER"
# What a training measures of the machine, and the one line that only the file has.
VARYING = re.compile(r"(memory|speed|arithmetic|step) |loading|.*a format of another package")
# Metavars of what may be an adapter on this disk.
TAKES_ADAPTER = {"SRC", "SRC...", "A", "B", "FROM"}
# Parameters with such a metavar that take something else.
TAKES_OTHER = {
    ("chat", "source"): "a ref",
    ("fsck", "source"): "a registry, or the folder of a version",
    ("pull", "bundled"): "a bundle",
}
CALLS = {
    "run source": ["run", ADAPTER, "hello", "--base", "base"],
    "eval source": ["eval", ADAPTER, "--data", "text.jsonl", "--base", "base"],
    "train start": ["train", "train.toml", "--from", ADAPTER, "-o", "out"],
    "merge source": ["merge", ADAPTER, "b", "--method", "ties", "-o", "out"],
    "rebuild adapters": ["rebuild", "merged.json", "--base", "base", "--adapter", ADAPTER, "-o", "out"],
    "convert source": ["convert", ADAPTER, "out", "--to", "mlx", "--base", "base"],
    "fix source": ["fix", ADAPTER],
    "diff a": ["diff", ADAPTER, "b"],
    "diff b": ["diff", "b", ADAPTER],
    "verify-merge adapters": ["verify-merge", "merged", "--base", "base", "--adapter", ADAPTER],
    "push source": ["push", ADAPTER, "team/new", "--base", "base"],
    "copy source": ["copy", ADAPTER, "team/new"],
    "bom source": ["bom", ADAPTER],
    "show source": ["show", ADAPTER],
    "search files": ["search", "--file", ADAPTER],
}
# Commands that are about files as they are: their words, the exit code, and what they say.
FILE_CALLS = {
    "validate given": (["validate", ADAPTER, "--base", "base"], 0, "a.zlora: zipped, r 2, 2 modules, 64 parameters, F32"),
    "scan source": (["scan", ADAPTER], 1, "error[archive] a.zlora: zip, whatever its name is"),
    "sign source": (["sign", ADAPTER, "--key", "team.key"], 3, "a.zlora: is a file. Put it in a folder"),
    "verify source": (["verify", ADAPTER], 3, "a.zlora: is a file. Put it in a folder"),
}


def adapter_parameters(group: click.Group, path: str = "") -> Iterator[str]:
    """Each parameter of a command that takes an adapter, as `command parameter`."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from adapter_parameters(command, f"{path}{name} ")
        for parameter in command.params if command else ():
            takes = (path + name, parameter.name)
            if takes == ("search", "files") or (parameter.metavar in TAKES_ADAPTER and takes not in TAKES_OTHER):
                yield f"{path}{name} {parameter.name}"


Call = Callable[..., subprocess.CompletedProcess[str]]


def environment(site: Path, folder: Path) -> dict[str, str]:
    """The environment of a command in `folder` that has the packages in `site` installed."""
    paths = [site, ROOT, ROOT / "converters", ROOT / "schemas"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "ADAPTERHUB_REGISTRY": str(folder / "registry")}
    return env | {f"XDG_{kind}_HOME": str(folder / "xdg") for kind in ("DATA", "CONFIG", "CACHE")} | {"COLUMNS": "80"}


def start(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command as its users do, in a Python of its own."""
    command, env = [sys.executable, "-m", "adapterhub", *words], environment(site, folder)
    result = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    return result


def whole_base(folder: Path) -> None:
    """Make a base that can be asked and trained on."""
    for name in ("torch", "transformers", "matplotlib"):
        need_module(name)
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package, the adapters `a` and `b`, `a.zlora`, and what the commands need."""
    folder = tmp_path_factory.mktemp("prepared")
    info = "zipped_lora-1.0.dist-info"
    for name, text in {
        "zipped_lora/__init__.py": PACKAGE,
        "zipped_lora/files.py": FILES,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: zipped-lora\nVersion: 1.0\n",
        f"{info}/entry_points.txt": "[adapterhub.formats]\nzipped = zipped_lora:FORMAT\n",
    }.items():
        path = folder / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    whole_base(folder / "base")
    two_adapters(folder)
    (folder / "text.jsonl").write_text('{"text": "hello there"}\n')
    (folder / "train.toml").write_text(CONFIG)
    for words in (
        ("init", "registry"),
        ("convert", "a", "a.zlora"),
        ("push", "a", "team/known"),
        ("key", "generate", "team"),
        ("merge", "a", "--into", "base", "-o", "merged"),
        ("merge", "a", "--into", "base", "--recipe-only", "-o", "merged.json"),
    ):
        result = start(folder / "site", folder, *words)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def call(prepared: Path) -> Iterator[Call]:
    """Run a command as `start` does, but forked from a process that has imported the command line and the package."""
    site = prepared / "site"
    if sys.platform != "linux":
        yield functools.partial(start, site)
        return
    with contextlib.ExitStack() as stack:
        servers = {modules: forked.Forked(environment(site, prepared), modules, stack) for modules in (CHECKING, LEARNING)}

        def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
            result = servers[modules_for([*words])].run(words, folder, environment(site, folder))
            assert "Traceback" not in result.stderr
            return result

        yield run


@pytest.fixture
def world(prepared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(prepared, tmp_path / "world")


def test_every_command_that_takes_an_adapter_is_walked() -> None:
    assert sorted(adapter_parameters(app)) == sorted([*CALLS, *FILE_CALLS])


@pytest.mark.parametrize("name", CALLS)
def test_a_command_takes_the_file_as_it_takes_the_folder(prepared: Path, tmp_path: Path, call: Call, name: str) -> None:
    outcomes = []
    for adapter_path in ("a", "a.zlora"):
        folder = shutil.copytree(prepared, tmp_path / "world")
        result = call(folder, *(adapter_path if word == ADAPTER else word for word in CALLS[name]))
        texts = [
            "\n".join(line for line in text.splitlines() if not VARYING.match(line)).replace("a.zlora", "a")
            for text in (result.stdout, result.stderr)
        ]
        outcomes.append((result.returncode, *texts))
        shutil.rmtree(folder)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] in (0, 1), outcomes[0]


@pytest.mark.parametrize("name", FILE_CALLS)
def test_a_command_about_files_takes_the_file_as_it_is(world: Path, call: Call, name: str) -> None:
    words, code, text = FILE_CALLS[name]
    result = call(world, *("a.zlora" if word == ADAPTER else word for word in words))
    assert (result.returncode, text in result.stdout + result.stderr) == (code, True), result.stdout + result.stderr


def test_a_push_says_that_it_stores_peft(world: Path, call: Call) -> None:
    result = call(world, "push", "a.zlora", "team/new")
    assert result.stderr == "a.zlora is in zipped, a format of another package: what is stored is PEFT\n"
    assert call(world, "pull", "team/new", "-o", "back").returncode == 0
    for item in (world / "a").iterdir():
        assert item.name == "adapter_config.json" or (world / "back" / item.name).read_bytes() == item.read_bytes()


def test_a_merge_of_such_files_is_rebuilt_from_what_was_pushed(world: Path, call: Call) -> None:
    assert call(world, "convert", "b", "b.zlora").returncode == 0
    for name in "ab":
        assert call(world, "push", f"{name}.zlora", f"team/{name}").returncode == 0
    assert call(world, "merge", "a.zlora", "b.zlora", "-o", "team/both").returncode == 0
    assert "every byte matches" in call(world, "rebuild", "team/both").stdout


def test_the_formats_are_listed_with_what_it_can_do(world: Path, call: Call) -> None:
    row = json.loads(call(world, "convert", "--list", "--json").stdout)["formats"][-1]
    back = row.pop("back")
    assert row == {"name": "zipped", "files": ["NAME.zlora"], "reads": True, "writes": True, "base": False}
    assert set(back.values()) == {"bytes"}


def test_a_zip_that_no_format_recognizes_is_a_pickle(world: Path, call: Call) -> None:
    with ZipFile(world / "other.zlora", "w", ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    result = call(world, "show", "other.zlora")
    assert result.returncode == 6
    assert "other.zlora: a pickle can run code when it is loaded" in result.stderr
