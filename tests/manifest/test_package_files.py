"""Which files of a folder belong to an adapter, and what becomes of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.manifest.package_files import MAX_PATTERN, MAX_PATTERNS, Selection, listing, survey
from adapterhub_converters.errors import FormatError, RefusedError
from tests.support.adapters import Make

# What a Trainer leaves next to an adapter, and what people put there.
LEFT_OUT = (
    ".gitattributes", "checkpoint-10/", "notes.ipynb", "optimizer.pt", "rng_state.pth", "scheduler.pt", "train.py",
    "training_args.bin",
)  # fmt: skip
# The last is the config of axolotl, LLaMA-Factory or trl.
PACKAGED = (
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "trainer_state.json", "LICENSE"),
    "config.yaml",
)


def fill(folder: Path) -> Path:
    """Write the files of a finished training."""
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10/optimizer.pt").write_bytes(b"\x80\x02pickled")
    for name in (*LEFT_OUT, "tokenizer.json", "trainer_state.json", "LICENSE", "config.yaml"):
        if not name.endswith("/"):
            (folder / name).write_text("{}")
    return folder


def test_what_a_trainer_leaves_is_left_out_by_name(make: Make) -> None:
    packaged = listing(fill(make()))
    assert packaged.files == tuple(sorted(PACKAGED))
    assert packaged.skipped == tuple(sorted(LEFT_OUT))


def test_a_version_of_others_may_contain_nothing_else(make: Make) -> None:
    with pytest.raises(RefusedError):
        listing(fill(make()), strict=True)


def test_pickled_weights_are_refused_even_next_to_others(make: Make) -> None:
    folder = make()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02pickled")
    with pytest.raises(RefusedError, match="a pickle can run code"):
        listing(folder)


def test_a_pickle_without_weights_is_refused(make: Make) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "weights.pt").write_bytes(b"\x80\x02pickled")
    with pytest.raises(RefusedError, match="a pickle can run code"):
        listing(folder)


@pytest.mark.parametrize(
    ("selection", "excluded"),
    [
        (Selection(exclude=("trainer_state.json",)), {"trainer_state.json"}),
        (Selection(exclude=("*.json",)), {"adapter_config.json", "tokenizer.json", "trainer_state.json"}),
        (Selection(include=("*.md",)), {"tokenizer.json", "trainer_state.json", "LICENSE", "config.yaml"}),
        (
            Selection(include=("*.json",), exclude=("t*",)),
            {"README.md", "tokenizer.json", "trainer_state.json", "LICENSE", "config.yaml"},
        ),
    ],
)
def test_patterns_choose_among_the_files_that_can_be_packaged(make: Make, selection: Selection, excluded: set[str]) -> None:
    assert set(listing(fill(make()), selection=selection).files) == set(PACKAGED) - excluded


def test_an_ignore_file_excludes_as_the_option_does(make: Make) -> None:
    folder = fill(make())
    (folder / "logs").mkdir()
    (folder / "logs/a.json").write_text("{}")
    (folder / ".adapterhubignore").write_text("# of the trainer\n\ntrainer_state.json\nlogs/\n")
    packaged = listing(folder)
    assert set(packaged.files) == set(PACKAGED) - {"trainer_state.json"}
    assert {"logs/a.json", ".adapterhubignore"} <= set(packaged.skipped)


@pytest.mark.parametrize("text", ["x\n" * (MAX_PATTERNS + 1), "x" * (MAX_PATTERN + 1)])
def test_an_ignore_file_has_a_limited_number_of_patterns_of_limited_length(make: Make, text: str) -> None:
    folder = make()
    (folder / ".adapterhubignore").write_text(text)
    with pytest.raises(FormatError) as error:
        listing(folder)
    assert error.value.where == f"{folder}/.adapterhubignore"
    assert error.value.what == "more than 256 patterns, or one of more than 256 characters"
    assert error.value.hint == "Write one pattern for many files, such as logs/ or *.json"


def test_no_link_is_part_of_an_adapter_unless_it_is_excluded(make: Make, tmp_path: Path) -> None:
    folder = make()
    (folder / "more.json").symlink_to(tmp_path / "elsewhere.json")
    assert survey(folder)[2][0][0] == "more.json"
    with pytest.raises(RefusedError, match="symbolic link"):
        listing(folder)
    listing(folder, selection=Selection(exclude=("more.json",)))
