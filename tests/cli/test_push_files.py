"""`adapterhub push` of a folder as a trainer left it, and as somebody edited it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from adapterhub.manifest import derive
from adapterhub.manifest.document import AdapterManifest, Training
from adapterhub_converters.formats import convert
from tests.conftest import Run
from tests.manifest.test_package_files import LEFT_OUT, PACKAGED, fill
from tests.support.adapters import Make
from tests.support.folders import adapter, base, pairs


@pytest.fixture
def trained(make: Make) -> Path:
    """An adapter with the record of a training."""
    folder = make("sql")
    derive.describe(folder, training=Training(seed=7, metrics={"heldout_loss": 1.5})).write(folder)
    return folder


def pulled(run: Run, ref: str, folder: Path) -> AdapterManifest:
    run("pull", ref, "-o", folder)
    return AdapterManifest.parse((folder / "adapter.json").read_bytes(), "")


def test_a_folder_of_a_trainer_is_pushed_with_one_note(run: Run, make: Make, tmp_path: Path) -> None:
    fill(make("sql"))
    done = run("push", "sql", "team/sql")
    (note,) = [line for line in done.stderr.splitlines() if "left out" in line]
    assert note.startswith("left out: .gitattributes, checkpoint-10/, ")
    assert note.endswith(" and 3 more")
    run("pull", "team/sql", "-o", "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*PACKAGED, "adapter.json"}


@pytest.mark.parametrize("words", [("push", "PATH", "team/sql"), ("show", "PATH"), ("bom", "PATH"), ("diff", "PATH", "PATH")])
def test_a_file_that_is_no_adapter_or_has_another_name_is_named_itself(
    run: Run, tmp_path: Path, words: tuple[str, ...]
) -> None:
    convert.convert(adapter(tmp_path / "sql", pairs(1)), tmp_path / "sql.gguf", to="gguf", base=base(tmp_path / "base", 1))
    (tmp_path / "sql.gguf").rename(tmp_path / "weights")
    (tmp_path / "notes.txt").write_text("mine")

    def error(path: str, code: int) -> str:
        return run(*(path if word == "PATH" else word for word in words), code=code).stderr

    what = "an adapter in the format gguf, whose name ends in neither .safetensors nor .gguf"
    assert error("./weights", 6) == f"error: ./weights: {what}. Rename it, or convert it to PEFT  [refused]\n"
    assert error("./notes.txt", 4).startswith("error: notes.txt: not an adapter of a known format. Name ")


def test_validate_reports_what_push_will_leave_out_and_refuse(run: Run, make: Make) -> None:
    folder = fill(make("sql"))
    report = json.loads(run("validate", "sql", "--json").stdout)
    assert "left-out" in json.dumps(report)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02pickled")
    assert "not-packaged" in run("validate", "sql", code=None).stdout
    assert "a pickle can run code" in run("push", "sql", "team/sql", code=6).stderr
    assert "a pickle can run code" in run("push", "sql", "team/sql", "--force", code=6).stderr
    run("push", "sql", "team/sql", "--exclude", "*.bin")
    assert len(LEFT_OUT) > 6


def test_an_edited_card_keeps_the_record_of_the_training(run: Run, trained: Path, tmp_path: Path) -> None:
    run("push", "sql", "team/sql")
    (trained / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (trained / "tokenizer.json").write_text("{}")
    assert "wrong" not in run("validate", "sql").stdout
    run("push", "sql", "team/sql")
    made = pulled(run, "team/sql:v2", tmp_path / "out")
    assert made.training == Training(seed=7, metrics={"heldout_loss": 1.5})
    assert made.license == "mit"
    assert {"README.md", "tokenizer.json"} <= {entry.path for entry in made.files}
    assert run("search", "--license", "mit").stdout.count("team/sql:v2") == 1
    assert json.loads(run("show", "team/sql:v2", "--json").stdout)["manifest"]["license"] == "mit"


def test_changed_weights_need_force_and_lose_the_record_with_a_word(
    run: Run, trained: Path, make: Make, tmp_path: Path
) -> None:
    other = make("other", 3)
    (trained / "adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    assert "files-changed" in run("push", "sql", "team/sql", code=6).stderr
    done = run("push", "sql", "team/sql", "--force")
    assert "files-changed" in done.stderr
    assert "record" in done.stderr
    assert pulled(run, "team/sql", tmp_path / "out").training is None


def _config(folder: Path, **keys: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def _tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


BROKEN: dict[str, tuple[Callable[[Path], object], bool]] = {
    "values that are no numbers": (
        lambda folder: _tensors(folder, lambda tensors: next(iter(tensors.values())).fill(np.nan)),
        True,
    ),
    "a wrong rank": (lambda folder: _config(folder, r=64), True),
    "half of a pair": (lambda folder: _tensors(folder, lambda tensors: tensors.pop(next(iter(tensors)))), False),
    "an unknown tensor": (lambda folder: _tensors(folder, lambda tensors: tensors.update({"foo.bar": np.ones(2)})), False),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), False),
    "a config that is not JSON": (lambda folder: (folder / "adapter_config.json").write_text("{,"), False),
    "a pointer of Git LFS": (
        lambda folder: (folder / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        False,
    ),
    "half a file": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 300), False),
    "pickled weights": (lambda folder: (folder / "adapter_model.bin").write_bytes(b"PK\3\4"), False),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("to", [(), ("--to", "mlx")], ids=["as it is", "converted"])
def test_force_is_offered_only_where_it_works(run: Run, make: Make, what: str, to: tuple[str, ...]) -> None:
    breaks, works = BROKEN[what]
    breaks(make("sql"))
    refused = run("push", "sql", "team/sql", *to, code=None)
    assert refused.returncode
    done = run("push", "sql", "team/sql", *to, "--force", code=None)
    assert ("--force" in refused.stderr) == (done.returncode == 0)
    assert to or works is (done.returncode == 0)
    assert ("stored despite" in done.stderr) == (done.returncode == 0)
