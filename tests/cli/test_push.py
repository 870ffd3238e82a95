"""`adapterhub push`: a folder as a trainer left it and as somebody edited it; its reason, tags, results and author."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

ADA = {"ADAPTERHUB_AUTHOR": "Ada"}


@pytest.fixture
def sql(tmp_path: Path) -> Path:
    return adapter(tmp_path / "sql", pairs(2))


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
    result = run("push", "sql", "team/sql")
    (note,) = [line for line in result.stderr.splitlines() if "left out" in line]
    assert note.startswith("left out: .gitattributes, checkpoint-10/, ")
    assert note.endswith(" and 2 more")
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

    reason = "an adapter in the format gguf, whose name ends in neither .safetensors nor .gguf"
    assert error("./weights", 6) == f"error: ./weights: {reason}. Rename it, or convert it to PEFT  [refused]\n"
    assert error("./notes.txt", 4).startswith("error: notes.txt: not an adapter of a known format. Name ")


def test_validate_reports_what_push_will_leave_out_and_refuse(run: Run, make: Make) -> None:
    folder = fill(make("sql"))
    [report] = json.loads(run("validate", "sql", "--json").stdout)["reports"]
    assert "left-out" in json.dumps(report)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02pickled")
    assert "not-packaged" in run("validate", "sql", code=None).stdout
    assert "a pickle can run code" in run("push", "sql", "team/sql", code=6).stderr
    assert "a pickle can run code" in run("push", "sql", "team/sql", "--force", code=6).stderr
    run("push", "sql", "team/sql", "--exclude", "*.bin")
    assert len(LEFT_OUT) > 6


def test_an_edited_card_keeps_the_record_of_the_training(run: Run, trained: Path, tmp_path: Path) -> None:
    assert "sql: no license is recorded" in run("push", "sql", "team/sql").stderr
    (trained / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (trained / "tokenizer.json").write_text("{}")
    assert "wrong" not in run("validate", "sql").stdout
    assert "license" not in run("push", "sql", "team/sql").stderr
    manifest = pulled(run, "team/sql:v2", tmp_path / "out")
    assert manifest.training == Training(seed=7, metrics={"heldout_loss": 1.5})
    assert manifest.license == "mit"
    assert {"README.md", "tokenizer.json"} <= {entry.path for entry in manifest.files}
    assert run("search", "--license", "mit").stdout.count("team/sql:v2") == 1
    assert json.loads(run("show", "team/sql:v2", "--json").stdout)["manifest"]["license"] == "mit"


def test_a_trained_adapter_without_the_name_of_its_base_is_pushed_with_a_note(run: Run, trained: Path) -> None:
    assert "no base is recorded" not in run("push", "sql", "team/sql").stderr
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    (trained / "README.md").write_text("# Mine\n")
    (trained / "adapter.json").unlink()
    derive.describe(trained, training=Training(seed=7)).write(trained)
    assert "sql: no base is recorded by name" in run("push", "sql", "team/sql").stderr
    (trained / "README.md").write_text("---\nbase_model: org/base\n---\n# Mine\n")
    assert "no base is recorded" not in run("push", "sql", "team/sql").stderr


def test_changed_weights_need_force_and_lose_the_record_with_a_word(
    run: Run, trained: Path, make: Make, tmp_path: Path
) -> None:
    other_folder = make("other", 3)
    (trained / "adapter_model.safetensors").write_bytes((other_folder / "adapter_model.safetensors").read_bytes())
    assert "files-changed" in run("push", "sql", "team/sql", code=6).stderr
    result = run("push", "sql", "team/sql", "--force")
    assert "files-changed" in result.stderr
    assert "record" in result.stderr
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


@pytest.mark.parametrize("broken_kind", BROKEN)
@pytest.mark.parametrize("to", [(), ("--to", "mlx")], ids=["as it is", "converted"])
def test_force_is_offered_only_where_it_works(run: Run, make: Make, broken_kind: str, to: tuple[str, ...]) -> None:
    breaks, works = BROKEN[broken_kind]
    breaks(make("sql"))
    refused = run("push", "sql", "team/sql", *to, code=None)
    assert refused.returncode
    result = run("push", "sql", "team/sql", *to, "--force", code=None)
    assert ("--force" in refused.stderr) == (result.returncode == 0)
    assert to or works is (result.returncode == 0)
    assert ("stored despite" in result.stderr) == (result.returncode == 0)


# ---- what is pushed with it


def log(run: Run, ref: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(run("log", ref, "--json").stdout)["entries"]
    return entries


@pytest.mark.usefixtures("sql")
def test_the_log_shows_the_message_and_the_author_of_a_push(run: Run) -> None:
    run("push", "sql", "team/sql", "-m", "twice the data", env=ADA)
    (entry,) = log(run, "team/sql")
    assert (entry["op"], entry["message"], entry["author"]) == ("push", "twice the data", "Ada")
    stdout = run("log", "team/sql").stdout
    assert "Ada" in stdout
    assert "twice the data" in stdout


@pytest.mark.usefixtures("sql")
def test_a_user_may_be_named_by_git_or_not_at_all(run: Run) -> None:
    run("push", "sql", "team/sql", env={"GIT_AUTHOR_NAME": "Grace"})
    run("tag", "team/sql", "prod", env={"GIT_AUTHOR_NAME": "Grace", "ADAPTERHUB_AUTHOR": ""})
    assert [entry["author"] for entry in log(run, "team/sql")] == [None, "Grace"]


@pytest.mark.usefixtures("sql")
def test_one_push_moves_several_tags(run: Run) -> None:
    document = json.loads(run("push", "sql", "team/sql", "--tag", "prod", "--tag", "1.0.0", "--json").stdout)
    assert (document["ref"], document["tags"]) == ("team/sql:v1", ["1.0.0", "latest", "prod"])
    assert "tagged stage (its bytes were there)" in run("push", "sql", "team/sql", "--tag", "stage", "-m", "try it").stdout
    assert [(entry["op"], entry["tags"], entry["message"]) for entry in log(run, "team/sql")] == [
        ("tag", ["stage"], "try it"),
        ("push", ["latest", "prod", "1.0.0"], None),
    ]
    assert "a push assigns" in run("push", "sql", "team/sql", "--tag", "v3", code=2).stderr
    assert "nothing has changed, so the message is not recorded" in run("push", "sql", "team/sql", "-m", "again").stderr


@pytest.mark.usefixtures("sql")
def test_results_of_other_programs_are_logged_shown_and_searched(run: Run) -> None:
    run("push", "sql", "team/sql", "--metric", "exact_match=0.71", "--metric", "bleu=31")
    assert "reported: bleu 31, exact_match 0.71" in run("log", "team/sql").stdout
    assert "reported: bleu 31" in run("show", "team/sql").stdout
    for name in ("exact_match", "reported_exact_match"):
        assert "team/sql:v1" in run("search", "--metric", f"{name}>0.7").stdout
    run("push", "sql", "team/sql", "--metric", "exact_match=0.5")
    assert "no matches" in run("search", "--metric", "reported_exact_match>0.7").stderr


@pytest.mark.usefixtures("sql")
@pytest.mark.parametrize("text", ["exact_match", "exact_match=high", "exact_match=nan", "=1", "a:b=1"])
def test_what_is_not_a_metric_is_refused_before_anything_is_stored(run: Run, tmp_path: Path, text: str) -> None:
    assert run("push", "sql", "team/sql", "--metric", text, code=2).stderr.count("\n") == 1
    assert "no registry there" in run("list", "--registry", str(tmp_path / "xdg/adapterhub"), code=3).stderr


@pytest.mark.usefixtures("sql")
def test_a_log_elsewhere_has_messages_and_authors_and_what_has_no_log_refuses_them(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    address = f"file://{tmp_path}/bucket/team/sql"
    run("push", "sql", address, "-m", "twice the data", "--tag", "prod", env=ADA)
    assert [(entry["op"], entry["message"], entry["author"]) for entry in log(run, address)] == [
        ("tag", None, "Ada"),
        ("push", "twice the data", "Ada"),
    ]
    layout = f"layout://{tmp_path}/x.tar:v1"
    unkept = "error: --message: an image layout keeps no messages. Leave it out  [invalid-parameter]\n"
    assert run("push", "sql", layout, "-m", "why", code=2).stderr == unkept
    message = "--expect: an image layout cannot compare and move a tag in one step. Leave out --expect  [expect-unsupported]"
    assert run("push", "sql", layout, "--expect", "absent", code=2).stderr == f"error: {message}\n"
    assert "--metric: an object store keeps no metrics" in run("push", "sql", address, "--metric", "a=1", code=2).stderr


@pytest.mark.usefixtures("sql")
def test_the_registry_that_a_push_creates_is_named(run: Run, tmp_path: Path) -> None:
    created = run("push", "sql", "team/sql").stderr
    assert "created the registry " in created
    folder = created.partition("created the registry ")[2].splitlines()[0]
    assert (Path(folder) / "registry.db").is_file()
    assert "created" not in run("push", "sql", "team/sql").stderr
    run("init", "other")
    assert f"no adapters yet in {tmp_path / 'other'}" in run("list", "--registry", str(tmp_path / "other")).stderr


@pytest.mark.usefixtures("sql")
def test_latest_stays_at_the_newest_version_and_a_push_of_older_bytes_says_so(run: Run, tmp_path: Path) -> None:
    adapter(tmp_path / "newer", pairs(3))
    run("push", "sql", "team/sql")
    run("push", "newer", "team/sql")
    result = run("push", "sql", "team/sql")
    assert result.stdout.startswith("already there: team/sql:v1 ")
    assert "team/sql:latest stays at the newer version" in result.stderr


@pytest.mark.usefixtures("sql")
def test_an_author_of_any_length_in_a_log_of_others_is_shown_as_a_harmless_line(run: Run, tmp_path: Path) -> None:
    run("init", "r")
    run("push", "sql", "team/sql", "--registry", "r", env=ADA)
    (entry,) = (tmp_path / "r/.adapterhub/refs/team/sql").iterdir()
    written = json.loads(entry.read_bytes()) | {"author": "\x1b[31m" + "a" * 100_000}
    entry.chmod(0o644)
    entry.write_text(json.dumps(written))
    (tmp_path / "r/registry.db").unlink()
    stdout = run("log", "team/sql", "--registry", "r").stdout
    assert "\x1b" not in stdout
    assert max(map(len, stdout.splitlines())) < 400


@pytest.mark.usefixtures("sql")
def test_the_first_push_makes_the_registry(run: Run, tmp_path: Path) -> None:
    run("push", "sql", "team/sql", "--registry", "deep/there")
    assert (tmp_path / "deep/there/registry.db").is_file()
    run("push", "sql", "team/sql")
    assert (tmp_path / "xdg/adapterhub/registry.db").is_file()


@pytest.mark.usefixtures("sql")
def test_a_moved_ref_is_a_conflict(run: Run, tmp_path: Path) -> None:
    first = json.loads(run("push", "sql", "team/sql:prod", "--json").stdout)
    other_folder = adapter(tmp_path / "other", pairs(2), lambda _, array: array * 2)
    run("push", other_folder, "team/sql:prod", "--expect", first["digest"])
    result = run("push", "sql", "team/sql:prod", "--expect", first["digest"], code=7)
    assert "error: team/sql:prod: moved in the meantime: it is sha256:" in result.stderr
    assert f", not {first['digest']}. Review that version, then try again  [conflict]\n" in result.stderr


@pytest.mark.usefixtures("sql")
def test_push_refuses_to_pin_a_base_that_does_not_fit(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "deep", 3)
    result = run("push", "sql", "team/sql", "--base", "deep", code=6)
    assert "base-deeper" in result.stderr
    assert not (tmp_path / "xdg").exists()
