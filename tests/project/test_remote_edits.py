"""Changes of remotes in a settings file change nothing else in it."""

from __future__ import annotations

import multiprocessing
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub import user_files
from adapterhub.project import remote_edits, settings_file
from adapterhub_converters.errors import UsageError
from tests.project.test_settings_file import WHOLE


def test_a_change_leaves_comments_and_all_else(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    old = settings_file.parse(WHOLE, path)
    same = remote_edits.with_changes(WHOLE, path, remotes=old.remotes, remote=old.remote)
    assert same == WHOLE
    with_new_remote = remote_edits.with_changes(WHOLE, path, remotes={**old.remotes, "new": "oci://new.example"}, remote="new")
    assert with_new_remote == WHOLE.replace('"team"', '"new"', 1) + '\n[remotes.new]\nurl = "oci://new.example"\n'
    less = remote_edits.with_changes(WHOLE, path, remotes={"free": "oci://free.example"}, remote=None)
    assert "# read by everybody\n[remotes.free]" in less
    assert "team]" not in less
    assert (
        remote_edits.with_changes("", path, remotes={"a": "oci://x"}, remote="a")
        == 'remote = "a"\n\n[remotes.a]\nurl = "oci://x"\n'
    )


_NAMES = st.sampled_from(["a", "b", "team-1", "X_y"])


@given(st.lists(st.tuples(_NAMES, st.sampled_from(["", "oci://x", "oci://y/z"]), st.booleans())))
def test_any_series_of_changes_ends_in_the_requested_state(steps: list[tuple[str, str, bool]]) -> None:
    path, text = Path("x.toml"), "# mine\nregistry = 'here' # kept\n\n# rules\n[policy]\nmax_rank = 3 # low\n"
    remotes: dict[str, str] = {}
    remote = None
    for name, url, default in steps:
        remotes = {**remotes, name: url} if url else {key: value for key, value in remotes.items() if key != name}
        remote = name if default and url else remote if remote in remotes else None
        text = remote_edits.with_changes(text, path, remotes=remotes, remote=remote)
        document = tomllib.loads(text)
        assert {key: value["url"] for key, value in document.get("remotes", {}).items()} == remotes
        assert document.get("remote") == remote
        assert all(f"# {word}" in text for word in ("mine", "kept", "rules", "low"))


@pytest.mark.parametrize(
    "text", ["remotes = {team = {url = 'oci://x'}}", "[remotes]\nteam = {url = 'oci://x'}\nfree = {url = 'oci://y'}"]
)
def test_what_is_written_in_another_way_is_left_to_its_owner(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="Edit it by hand"):
        remote_edits.with_changes(text, tmp_path / "x", remotes={"free": "oci://y"}, remote=None)


def _add_remotes(path: Path) -> None:
    for _ in range(20):
        user_files.change(path, lambda text: text + "x")


def test_two_processes_lose_no_change_of_each_other(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_add_remotes, args=(tmp_path / "x",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (tmp_path / "x").read_text() == "x" * 40
