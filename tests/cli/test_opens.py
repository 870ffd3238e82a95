"""Every command opens each file of an adapter at most twice, in every format."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_converters.formats import FORMATS, WRITTEN, convert
from tests.conftest import Run
from tests.converters import trained
from tests.converters.trained import LLAMA
from tests.support import images
from tests.support.opens import opens

IMAGE = {"kohya", "diffusers"}
# A and B are adapters of the format, OUT a path for a result.
COMMANDS = [
    "validate A",
    "show A",
    "scan A",
    "search --file A",
    "bom A",
    "push A team/a",
    "diff A B",
    "merge A B -o OUT",
    "merge A B -o team/merged",
    "convert A team/converted --to peft",
]
BY_FORMAT = {
    "described": [*COMMANDS, "describe A", "verify A", "fix A -o OUT", "convert A OUT --to mlx"],
    "described-mlx": ["validate A", "convert A OUT --to mlx", "convert A OUT --to peft"],
    "peft": [*COMMANDS, "describe A", "fix A -o OUT"],
    "mlx": [*COMMANDS, "describe A", "convert A OUT --to mlx"],
    **{name: [*COMMANDS, f"convert A OUT --to {name}"] for name in ("gguf", "kohya", "raw")},
    # They are read as the others are: by a reader of one file.
    **{name: ["validate A", "push A team/a"] for name in ("diffusers", "torchtune", "litgpt", "megatron")},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns a folder with two adapters of a format, `a` and `b`."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, letter in enumerate("ab"):
        trained.folder(trained.full("q_proj", seed=seed), folder / f"peft-{letter}")
        images.peft_folder(folder / f"image-{letter}", images.SDXL)

    @functools.cache
    def write(name: str) -> Path:
        (folder / name).mkdir()
        for letter in "ab":
            plain, target = (
                folder / f"{'image' if name in IMAGE else 'peft'}-{letter}",
                folder / name / f"{letter}{_suffix(name)}",
            )
            if name == "described":
                shutil.copytree(plain, target)
            elif name == "described-mlx":
                convert.convert(plain, target, to="mlx", base=LLAMA)
            else:
                convert.convert(plain, target, to=name, base=None if name in IMAGE else LLAMA)
        return folder / name

    return write


def _suffix(name: str) -> str:
    return FORMATS[name].suffix if name in FORMATS else ""


@pytest.mark.parametrize("name", BY_FORMAT)
def test_no_command_opens_a_file_of_an_adapter_more_than_twice(
    name: str, adapters: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    run("--registry", tmp_path / "registry", "init", tmp_path / "registry")
    shutil.copytree(adapters(name), tmp_path / "source")
    for letter in "ab" if name.startswith("described") else "":
        run("describe", tmp_path / "source" / letter)
    crowded = {}
    for number, command in enumerate(BY_FORMAT[name]):
        source = tmp_path / str(number)
        shutil.copytree(tmp_path / "source", source)
        paths = {letter.upper(): source / f"{letter}{_suffix(name)}" for letter in "ab"} | {"OUT": tmp_path / f"out-{number}"}
        words = ["--registry", tmp_path / "registry", *(paths.get(word, word) for word in command.split())]
        counts = opens(run, tmp_path, source, *words, code=3 if command == "search --file A" else 0)
        assert counts, command
        if max(counts.values()) > 2:
            crowded[command] = counts
    assert crowded == {}


def test_every_format_is_counted() -> None:
    assert {*WRITTEN, "described", "described-mlx"} == {*BY_FORMAT}
