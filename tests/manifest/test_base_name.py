"""What can be the name of a base on the Hub, and where it is taken from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from adapterhub import checks
from adapterhub.manifest import derive
from adapterhub.manifest.base_name import public_repo
from adapterhub_converters.errors import AdapterhubError
from tests.conftest import Run
from tests.support.folders import adapter, base, pairs


@pytest.mark.parametrize("name", ["gpt2", "org/model", "Qwen/Qwen3-0.6B", "_org/a.b-c"])
def test_a_name_on_the_hub_is_recorded(name: str) -> None:
    assert public_repo(name) == name


@pytest.mark.parametrize(
    "path",
    [None, "", ".", "./model", "../model", "/srv/model", "~/model", "C:\\model", "C:/model", "a/b/c", "org/model/",
     "org//model", "out/checkpoint-500",
     "checkpoint-500", "org/a--b", "org/a..b", "org/model.git", "org/model.", "-org/model", "a" * 97],
)  # fmt: skip
def test_a_path_is_not_recorded(path: str | None) -> None:
    assert public_repo(path) is None


@pytest.mark.parametrize(
    ("config", "card", "folder", "name"),
    [
        ("org/config", "org/card", "org/base", "org/config"),
        ("/srv/model", "org/card", "org/base", "org/card"),
        (None, "org/card", None, "org/card"),
        (None, "/srv/model", "org/base", "org/base"),
        ("./model", None, "org/base", "org/base"),
        ("./model", None, "../model", None),
        (None, None, None, None),
    ],
)
def test_a_base_is_named_by_the_config_then_the_card_then_its_own_record(
    tmp_path: Path, config: str | None, card: str | None, folder: str | None, name: str | None
) -> None:
    path = adapter(tmp_path / "a", pairs(2), base_model_name_or_path=config)
    if card:
        (path / "README.md").write_text(f"---\nbase_model: {card}\n---\n")
    spec = dataclasses.replace(base(tmp_path / "b"), repo=folder)
    assert derive.describe(path, base=spec).base.repo == name
    report = checks.check(path, base=spec, unpublished=True)
    assert ("no-base-name" in report.counted()) == (name is None)
    assert report.ok
    assert name is not None or not checks.check(path, base=spec, unpublished=True, strict=True).ok


@pytest.mark.parametrize(
    ("declared", "config", "card", "trained"),
    [
        ("org/declared", "org/config", "org/card", "org/declared"),
        (None, "org/config", "org/card", "org/config"),
        (None, "/srv/config", "org/card", "org/card"),
        (None, None, "org/card", "org/card"),
    ],
)
def test_a_base_is_compared_by_the_name_that_a_push_records(
    tmp_path: Path, declared: str | None, config: str | None, card: str, trained: str
) -> None:
    path = adapter(tmp_path / "a", pairs(2), base_model_name_or_path=config)
    (path / "README.md").write_text(f"---\nbase_model: {card}\n---\n")
    if declared:
        (path / "adapter.toml").write_text(f'[base]\nrepo = "{declared}"\n')
    recorded = derive.describe(path).base.repo
    spec = dataclasses.replace(base(tmp_path / "b"), repo="org/other")
    [problem] = [problem for problem in checks.check(path, base=spec).problems if problem.code == "base-name-differs"]
    assert problem.expected == recorded == trained
    same = dataclasses.replace(spec, repo=trained)
    assert "base-name-differs" not in checks.check(path, base=same).counted()


@pytest.mark.parametrize(("value", "word"), [('"./model"', "./model"), ('"/srv/model"', "/srv/model"), ("5", "5"), ('""', "")])
def test_only_a_name_can_be_declared(tmp_path: Path, value: str, word: str) -> None:
    path = adapter(tmp_path / "a", pairs(2))
    (path / "adapter.toml").write_text(f"[base]\nrepo = {value}\n")
    with pytest.raises(AdapterhubError, match="base.repo") as error:
        derive.describe(path)
    assert error.value.where == f"{path}/adapter.toml"
    assert word in error.value.what
    assert error.value.code == "invalid-config"


def test_the_file_that_declares_a_wrong_type_is_named(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", pairs(2))
    (path / "adapter.toml").write_text("license = 5\n")
    with pytest.raises(AdapterhubError, match="license") as error:
        derive.describe(path)
    assert "adapter.toml" in error.value.where
    assert "adapter.json" not in str(error.value)


def test_a_base_without_a_name_is_one_problem_and_is_noted_where_it_is_pushed(run: Run, tmp_path: Path) -> None:
    """As trl saves it: the path of the base in the config and in the card."""
    path = adapter(tmp_path / "a", pairs(2), base_model_name_or_path="/srv/models/tiny")
    (path / "README.md").write_text("---\nbase_model: /srv/models/tiny\n---\n")
    report = checks.check(path, unpublished=True)
    assert [code for code in report.counted() if "base-name" in code] == ["no-base-name"]
    assert "a: no base is recorded by name" in run("push", "a", "team/a").stderr
    run("describe", "a", "--set", "base=acme/tiny")
    assert not [code for code in checks.check(path, unpublished=True).counted() if code == "no-base-name"]
    assert run("push", "a", "team/a").stderr == ""
    assert json.loads(run("show", "team/a", "--json").stdout)["manifest"]["base"]["repo"] == "acme/tiny"


def test_a_name_that_is_a_folder_here_is_noted(run: Run, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    base(tmp_path / "models" / "tiny", 2)
    path = adapter(tmp_path / "a", pairs(2), base_model_name_or_path="models/tiny")  # as trl writes it
    (path / "README.md").write_text("---\nbase_model: acme/tiny\n---\n")
    checked = run("validate", "a").stdout
    assert "[local-base-name] adapter_config.json: base_model_name_or_path: models/tiny is a folder here" in checked
    assert "hint: Write its name on its hub, like acme/tiny of the card" in checked
    assert (
        "a: models/tiny is recorded as the name of its base on the Hub, and is a folder here"
        in run("push", "a", "team/a").stderr
    )
    other_folder = adapter(tmp_path / "b", pairs(2), base_model_name_or_path="acme/tiny")
    assert "local-base-name" not in run("validate", other_folder).stdout
    assert run("push", "b", "team/b").stderr == ""
