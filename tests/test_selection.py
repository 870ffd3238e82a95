"""Which test files `make test` runs, on a small repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import selection
from tests.support.import_graph import ROOT

FILES = {
    "pyproject.toml": "",
    "README.md": "",
    "docs/merge.md": "",
    "adapterhub/__init__.py": "",
    "adapterhub/digest.py": "",
    "adapterhub/store/__init__.py": "",
    "adapterhub/store/store.py": "def read():\n    from .. import digest\n",
    "adapterhub/store/schema.sql": "",
    "adapterhub/sharing.py": "from adapterhub.store.store import read\n",
    "adapterhub/cli/commands/push.py": "from adapterhub import sharing\n",
    "adapterhub/cli/commands/train.py": "",
    "adapterhub/cli/commands/verify_merge.py": "",
    "tests/conftest.py": 'from tests.support import forked\nIMPORTING_TORCH = {"train"}\n',
    "tests/support/forked.py": "",
    "tests/support/tiny.py": "",
    "tests/store/conftest.py": "",
    "tests/store/test_store.py": "from adapterhub.store import store\n",
    "tests/cli/test_push.py": 'def test_push(run): run("push", "./a")\n',
    "tests/cli/test_train.py": 'def test_train(run): run("train")\n',
    "tests/cli/test_card.py": 'def test_card(folder): (folder / "README.md").write_text("")\n',
    "tests/cli/test_readme.py": 'TEXT = (ROOT / "README.md").read_text()\n',
    "tests/cli/test_proof.py": 'def test_proof(run): run("verify-merge")\n',
    "tests/cli/test_code.py": 'CODE = "import adapterhub.sharing"\nfrom tests.support.tiny import model\n',
    "tests/docs/test_pages.py": "",
    "tests/merging/test_page.py": 'PAGE = "docs/merge.md"\n',
    "tests/peers/test_push.py": 'def test_push(run): run("push", "./a")\n',
    **{f"tests/other/test_{number}.py": "" for number in range(12)},
}


def _git(root: Path, *args: str) -> None:
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *name, *args], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CI", raising=False)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    _git(tmp_path, "init", "--initial-branch", "main")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--message", "first")
    _git(tmp_path, "switch", "--create", "topic")
    return tmp_path


def _selected(root: Path, *changed: str) -> set[str] | None:
    for name in changed:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{FILES.get(name, '')}\n# changed\n")
    files = selection.select(root).files
    return None if files is None else {file.removeprefix("tests/") for file in files}


@pytest.mark.parametrize(
    ("changed", "selected"),
    [
        ("tests/cli/test_push.py", {"cli/test_push.py"}),
        ("tests/cli/test_new.py", {"cli/test_new.py"}),
        ("tests/support/tiny.py", {"cli/test_code.py"}),
        ("tests/store/conftest.py", {"store/test_store.py"}),
        ("adapterhub/cli/commands/push.py", {"cli/test_push.py"}),
        ("adapterhub/cli/commands/verify_merge.py", {"cli/test_proof.py"}),
        ("adapterhub/sharing.py", {"cli/test_push.py", "cli/test_code.py"}),
        ("adapterhub/store/store.py", {"store/test_store.py", "cli/test_push.py", "cli/test_code.py"}),
        ("adapterhub/digest.py", {"store/test_store.py", "cli/test_push.py", "cli/test_code.py"}),
        ("adapterhub/store/schema.sql", {"store/test_store.py", "cli/test_push.py", "cli/test_code.py"}),
        ("docs/merge.md", {"docs/test_pages.py", "merging/test_page.py"}),
        ("README.md", {"cli/test_readme.py"}),
        ("adapterhub/cli/commands/train.py", {"cli/test_train.py"}),
    ],
)
def test_a_change_selects_the_tests_that_reach_it(repository: Path, changed: str, selected: set[str]) -> None:
    assert _selected(repository, changed) == selected


def test_steps_that_select_too_much_are_left_out_but_not_the_mirrored_tests(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MAX_SHARE", 1 / 11)
    assert _selected(repository, "adapterhub/store/store.py") == {"store/test_store.py"}
    assert _selected(repository, "adapterhub/sharing.py") == {"cli/test_code.py", "store/test_store.py"}


def test_commits_of_the_branch_and_files_that_it_removes_count(repository: Path) -> None:
    _git(repository, "rm", "adapterhub/sharing.py")
    _git(repository, "commit", "--message", "second")
    assert _selected(repository) == {"cli/test_push.py", "cli/test_code.py"}


def test_the_core_is_always_selected(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CORE", {"tests/other/test_1.py": "a reason", "tests/other/test_99.py": "not here"})
    assert _selected(repository, "LICENSE") == {"other/test_1.py"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ([], "nothing differs from the merge base"),
        (["pyproject.toml"], "pyproject.toml changed"),
        (["tests/conftest.py"], None),
        (["tests/support/forked.py"], None),
    ],
)
def test_all_are_selected_where_nothing_or_what_all_share_changed(
    repository: Path, changed: list[str], reason: str | None
) -> None:
    count = len([name for name in FILES if "/test_" in name and "peers" not in name])
    assert len(_selected(repository, *changed) or range(count)) == count
    line = f"selected {count} test files; 0 are left to `make test-all`"
    assert selection.select(repository).line == (f"all test files: {reason}" if reason else line)


def test_all_are_selected_where_ci_is_set_or_no_merge_base_exists(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "README.md").write_text("changed")
    _git(repository, "branch", "--move", "main", "other")
    assert selection.select(repository) == selection.Selection(None, "all test files: no merge base with another branch")
    monkeypatch.setenv("CI", "true")
    assert selection.select(repository) == selection.Selection(None, "all test files: CI is set")


def test_every_file_of_the_core_exists() -> None:
    assert [file for file in selection.CORE if not (ROOT / file).is_file()] == []
