"""git-lfs itself at a hub: what it pushes is there for those who may write, and it gets what versions have."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.ref import Ref
from tests.conftest import need_program
from tests.hub.conftest import Running
from tests.hub.sending import WEIGHTS, Sending, commit_of

pytestmark = pytest.mark.peer


def test_git_lfs_pushes_a_file_that_becomes_a_version_and_pulls_it(
    hub: Running, adapter: Callable[..., Path], tmp_path: Path
) -> None:
    need_program("git-lfs")
    folder, sending = adapter(1), Sending(hub.url, hub.token)
    sending.ask("POST", "/api/repos/create", {"organization": "team", "name": "sql"})
    places = {"GIT_CONFIG_GLOBAL": str(tmp_path / "config"), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}

    def git(at: Path, *words: str) -> None:
        result = subprocess.run(
            ["git", "-C", at, *words], check=False, capture_output=True, text=True, env={**os.environ, **places}
        )
        assert result.returncode == 0, result.stderr

    def address(password: str) -> str:
        return f"{hub.url.replace('://', f'://alice:{password}@' if password else '://')}/team/sql.git/info/lfs"

    mine, between, other_clone = tmp_path / "mine", tmp_path / "between.git", tmp_path / "other"
    for path, options in ((mine, ()), (between, ("--bare",))):
        path.mkdir()
        git(path, "init", "--quiet", "--initial-branch=main", *options)
    for key, value in (("user.name", "Alice"), ("user.email", "a@example.org"), ("lfs.locksverify", "false")):
        git(mine, "config", "--global", key, value)
    git(mine, "lfs", "install", "--skip-repo")
    git(mine, "config", "lfs.url", address(hub.token))
    git(mine, "lfs", "track", WEIGHTS)
    shutil.copy(folder / WEIGHTS, mine)
    git(mine, "add", ".")
    git(mine, "commit", "--quiet", "-m", "weights")
    git(mine, "push", "--quiet", str(between), "main")
    assert sending.commit("team/sql", commit_of(folder)).status == 200
    with hub.registry() as registry:
        assert registry.resolve(Ref("team/sql")).number == 1
    git(tmp_path, "clone", "--quiet", "--config", f"lfs.url={address('')}", str(between), str(other_clone))
    assert (other_clone / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
