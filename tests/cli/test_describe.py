"""`adapterhub describe`: adapter.json in place, with what was recorded in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.manifest import derive
from adapterhub.manifest.document import AdapterManifest, Training
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A base, and an adapter on it with the record of a training and a README that was edited since."""
    base(tmp_path / "base", 2)
    folder = adapter(tmp_path / "sql", pairs(2)) or tmp_path / "sql"
    derive.describe(folder, training=Training(seed=7, metrics={"heldout_loss": 1.5})).write(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# SQL\n")
    return folder


def read(folder: Path) -> AdapterManifest:
    return AdapterManifest.parse((folder / "adapter.json").read_bytes(), "")


def test_the_base_is_pinned_and_the_record_kept(run: Run, trained: Path) -> None:
    result = run("describe", "sql", "--base", "base", "--license", "Apache-2.0", "--set", "base.repo=org/base")
    assert result.stdout.startswith("renewed sql/adapter.json\n")
    described = read(trained)
    assert described.base.fingerprint
    assert (described.license, described.base.repo) == ("Apache-2.0", "org/base")
    assert described.training == Training(seed=7, metrics={"heldout_loss": 1.5})
    assert "README.md" in [entry.path for entry in described.files]
    assert run("describe", "sql", "--base", "base").stdout == "sql/adapter.json: up to date\n"
    assert "unpinned" not in run("validate", "sql", "--base", "base").stdout


def test_a_dry_run_shows_the_changes_and_writes_nothing(run: Run, trained: Path) -> None:
    before = (trained / "adapter.json").read_bytes()
    document = json.loads(run("describe", "sql", "--description", "Writes SQL.", "--dry-run", "--json").stdout)
    assert {change["key"]: change["new"] for change in document["changes"]}["description"] == "Writes SQL."
    assert {change["key"]: change["new"] for change in document["changes"]}["license"] == "mit"
    assert document["written"] is False
    assert (trained / "adapter.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--set", "licence=MIT"], 2, "unknown key licence. Did you mean license?"),  # codespell:ignore
        (["--set", "base"], 2, "--set: 'base' is not KEY=VALUE"),
        (["--set", "license=7"], 4, "license"),
        (["--base", "other"], 6, "does not fit other"),
        (["--base", "nowhere"], 3, "nowhere"),
    ],
)
def test_what_cannot_be_declared_is_refused_and_nothing_written(
    run: Run, trained: Path, tmp_path: Path, words: list[str], code: int, says: str
) -> None:
    base(tmp_path / "other", 2, size=4)
    before = (trained / "adapter.json").read_bytes()
    assert says in run("describe", "sql", *words, code=code).stderr
    assert (trained / "adapter.json").read_bytes() == before


def test_what_adapter_toml_declares_is_changed_there(run: Run, trained: Path) -> None:
    (trained / "adapter.toml").write_text('license = "MIT"\n')
    assert "adapter.toml: declares license, and takes precedence" in run("describe", "sql", "--license", "X", code=2).stderr
    run("describe", "sql", "--license", "MIT")


def test_changed_weights_keep_no_record(run: Run, trained: Path) -> None:
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 64}))
    assert (
        "sql/adapter.json: adapter_config.json has other bytes than it records. Delete adapter.json"
        in run("describe", "sql", code=4).stderr
    )


def test_a_new_manifest_is_shown_without_a_line_for_each_value_of_the_base(run: Run, tmp_path: Path) -> None:
    base(tmp_path / "base", 2)
    adapter(tmp_path / "sql", pairs(2))
    stdout = run("describe", "sql", "--base", "base", "--license", "mit").stdout
    assert "  license: mit\n" in stdout
    assert stdout.count("base.config") == 1
    assert "schema" not in stdout
