"""What changed between two versions: answered from digests where they are equal, from the weights where they are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adapterhub.operations.diff import diff
from adapterhub.operations.push import push
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.adapter_files import PEFT_WEIGHTS
from adapterhub_converters.errors import IntegrityError
from tests.cli.test_commands import document
from tests.conftest import Run
from tests.support.folders import adapter, pairs

CARD = "---\nlicense: mit\n---\n# SQL\n"


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "a", pairs(3))
    shutil.copytree("a", "b")
    Path("b/README.md").write_text(CARD)
    adapter(tmp_path / "c", pairs(3), lambda _, array: array * 2, lora_alpha=8)
    return Workspace(registry=tmp_path / "registry")


def pushed(workspace: Workspace, *folders: str) -> list[str]:
    return [str(push(folder, "team/sql", workspace=workspace).ref) for folder in folders]


def lose_weights(workspace: Workspace, ref: str) -> None:
    """Remove the weights from the store, so that whoever reads them fails."""
    with Registry.open(workspace.folder()) as registry:
        version = registry.resolve(Ref.parse(ref))
        (weights,) = (layer.digest for layer in registry.files(version) if layer.path == PEFT_WEIGHTS)
        registry.store.blob_path(weights).unlink()


def test_equal_digests_of_versions_answer_without_their_bytes(workspace: Workspace) -> None:
    ref = pushed(workspace, "a")[0]
    lose_weights(workspace, ref)
    for first, second in ((ref, "team/sql:latest"), ("a", ref)):
        difference = diff(first, second, workspace=workspace)
        assert (difference.same_version, difference.identical, difference.change, difference.files, difference.facts) == (
            True,
            True,
            0.0,
            (),
            (),
        )


def test_equal_weights_and_config_answer_without_their_bytes(workspace: Workspace) -> None:
    first, second = pushed(workspace, "a", "b")
    lose_weights(workspace, first)
    difference = diff(first, second, workspace=workspace)
    assert (difference.same_version, difference.identical, difference.modules) == (False, True, ())
    assert [(file.path, file.status) for file in difference.files] == [("README.md", "added")]
    assert [(fact.key, fact.old, fact.new) for fact in difference.facts] == [("license", None, "mit")]
    assert repr(difference) == "<Difference team/sql:v1 -> team/sql:v2: 1 file, 1 fact>"


def test_other_weights_are_compared_and_their_facts_are_listed(workspace: Workspace) -> None:
    first, second = pushed(workspace, "a", "c")
    difference = diff(first, second, workspace=workspace)
    assert difference.count("changed") == 3
    assert [(fact.key, fact.old, fact.new) for fact in difference.facts] == [("alpha", 4, 8)]
    assert [file.path for file in difference.files] == ["adapter_config.json", PEFT_WEIGHTS]
    assert not difference.same
    lose_weights(workspace, second)
    with pytest.raises(IntegrityError):
        diff(first, second, workspace=workspace)


def test_a_version_at_an_address_is_the_same_as_in_the_registry(workspace: Workspace) -> None:
    ref = pushed(workspace, "a")[0]
    address = "layout://sql.tar:v1"
    push(ref, address, workspace=workspace)
    assert diff(address, ref, workspace=workspace).same_version
    assert diff(address, "b", workspace=workspace).identical


def test_an_adapter_json_of_other_weights_is_ignored_and_reported(workspace: Workspace) -> None:
    ref = pushed(workspace, "a")[0]
    with Registry.open(workspace.folder()) as registry:
        registry.pull(Ref.parse(ref), Path("d"))
    shutil.copyfile("c/" + PEFT_WEIGHTS, "d/" + PEFT_WEIGHTS)
    notes: list[str] = []
    difference = diff(ref, "d", workspace=Workspace(registry=workspace.folder(), tell=notes.append))
    assert difference.count("changed") == 3
    assert "its adapter.json is not about these files" in notes[0]


def test_the_command_lists_files_and_facts_where_the_function_is_the_same(run: Run, workspace: Workspace) -> None:
    stdout = run("diff", "a", "b", "--exit-code").stdout
    assert [" ".join(line.split()) for line in stdout.splitlines()] == [
        "a -> b: the same function; 1 file and 1 fact differ",
        "",
        "FILE CHANGE A B",
        "README.md added - 27 B",
        "",
        "FACT A B",
        "license - mit",
    ]
    difference = document(run, "diff", "a", "b")
    assert (difference["same_version"], difference["same"], difference["facts"]) == (
        False,
        True,
        [{"key": "license", "a": None, "b": "mit"}],
    )
    assert (difference["files"][0]["path"], difference["files"][0]["a"], difference["files"][0]["b"]["size"]) == (
        "README.md",
        None,
        27,
    )
    assert difference["digests"]["a"] != difference["digests"]["b"]
