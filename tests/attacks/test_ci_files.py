"""Files of a pull request against the action and the hook that check it: no name hides another or becomes an option."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_ci import acted
from tests.cli.test_process import PATH
from tests.conftest import ROOT, need_module, need_program
from tests.support.folders import adapter, base, pairs


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A folder with an adapter that has errors."""
    (tmp_path / "adapters").mkdir()
    adapter(tmp_path / "adapters/bad", pairs(2), r=3)
    return tmp_path


@pytest.mark.parametrize("pattern", ["adapters/*", "adapters/b?d", "adapters/[b]ad"])
def test_a_folder_called_like_the_pattern_hides_nothing(bad: Path, pattern: str) -> None:
    adapter(bad / pattern, pairs(2))
    result = acted(bad, PATHS=pattern)
    assert result.returncode == 1
    assert "::error file=adapters/bad/" in result.stdout


def test_a_line_without_pattern_is_the_name_itself(bad: Path) -> None:
    adapter(bad / "adapters/a b", pairs(2))
    adapter(bad / "a\\b", pairs(2))
    assert acted(bad, PATHS="adapters/a b\na\\b").returncode == 0


def test_a_folder_named_like_an_option_is_a_folder(tmp_path: Path) -> None:
    adapter(tmp_path / "--help", pairs(2), r=3)
    adapter(tmp_path / "good", pairs(2))
    result = acted(tmp_path, PATHS="*e*p\ngood")
    assert result.returncode == 1
    assert "::error file=--help/" in result.stdout


def test_no_name_of_a_folder_is_a_command_of_the_runner(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("::stop-commands::x", "##[add-mask]e", "a%0A::add-mask::b", "a\n::add-mask::c"):
        adapter(tmp_path / "in" / name, pairs(2), r=3)
    result = acted(tmp_path, PATHS="in/*")
    started = [line.split(" ")[0] for line in result.stdout.splitlines() if line.lstrip().startswith("::")]
    assert set(started) == {"::error", "::warning"}
    assert "##[" not in result.stdout
    assert "%250A" in result.stdout


def test_a_file_named_like_an_option_of_the_hook_is_checked_as_a_file(tmp_path: Path) -> None:
    need_module("pre_commit")
    need_module("yaml")
    git = need_program("git")
    import yaml

    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    base(tmp_path / "other")
    name = f"--base={tmp_path.name}-lora.gguf"
    adapter(tmp_path / "sql", pairs(2))
    (tmp_path / name).write_bytes(b"no GGUF")
    local = {**hook, "language": "system", "entry": f"{shlex.quote(sys.executable)} -m {hook['entry']}"}
    config = {"repos": [{"repo": "local", "hooks": [local]}]}
    (tmp_path / ".pre-commit-config.yaml").write_text(yaml.safe_dump(config))
    subprocess.run([git, "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([git, "add", "--", ".pre-commit-config.yaml", "sql", name], cwd=tmp_path, check=True)
    environment = {**os.environ, "PYTHONPATH": PATH, "PRE_COMMIT_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pre_commit", "run"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert name in result.stdout
    assert "2 adapters: 1 not ok" in result.stdout
