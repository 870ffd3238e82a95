"""An output appears whole or not at all, over nothing that is no earlier output, and what killed runs left is put right."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import LocalIOError, OutputExistsError, UsageError


def write_adapter(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("folder", [True, False])
def test_an_output_appears_at_the_end_or_nothing_stays(tmp_path: Path, folder: bool) -> None:
    def write(error: type[Exception] | None = None) -> None:
        with atomic.pending_output(tmp_path / "out", folder=folder) as pending:
            (pending / "a.txt" if folder else pending).write_text("x")
            assert not (tmp_path / "out").exists()
            if error:
                raise error

    with pytest.raises(ZeroDivisionError):
        write(ZeroDivisionError)
    assert names(tmp_path) == []
    write()
    assert names(tmp_path) == ["out"]


def test_what_somebody_made_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with atomic.pending_output(tmp_path / "out", folder=False) as pending:
            pending.write_text("ours")
            (tmp_path / "out").write_text("theirs")

    with pytest.raises(OutputExistsError):
        write()
    assert (tmp_path / "out").read_text() == "theirs"


def test_a_disk_error_names_the_output_and_not_the_hidden_folder(tmp_path: Path) -> None:
    with pytest.raises(LocalIOError, match="out: No space left") as caught, atomic.pending_output(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "partial" not in str(caught.value)


def test_only_an_earlier_output_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    out = write_adapter(tmp_path / "out", "old")
    with atomic.pending_output(out, replace=True) as pending:
        write_adapter(pending, "new")
    assert (out / "adapter_config.json").read_text() == "new"

    def write_model() -> None:
        with atomic.pending_output(out, replace=True) as pending:
            (pending / "config.json").write_text("{}")

    with pytest.raises(UsageError, match="is an adapter, and would be replaced by a model"):
        write_model()
    assert names(out) == ["adapter_config.json"]
    for name, problem in ((".git", "contains .git"), ("", "is not an earlier output")):
        mine = tmp_path / f"mine{name}"
        (mine / (name or "notes")).mkdir(parents=True)
        with pytest.raises(UsageError, match=problem):
            atomic.check_free(mine, replace=True)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(UsageError, match="is a link"):
        atomic.check_free(tmp_path / "link", replace=True)


def test_a_file_that_stays_the_same_is_kept(tmp_path: Path) -> None:
    out = write_adapter(tmp_path / "out")
    (out / "adapter_model.safetensors").write_text("old")
    same, changed = ((out / name).stat().st_ino for name in ("adapter_config.json", "adapter_model.safetensors"))
    with atomic.pending_output(out, replace=True) as pending:
        write_adapter(pending)
        (pending / "adapter_model.safetensors").write_text("new")
    assert (out / "adapter_config.json").stat().st_ino == same
    assert (out / "adapter_model.safetensors").stat().st_ino != changed


def test_an_output_that_a_killed_run_moved_aside_comes_back(tmp_path: Path) -> None:
    write_adapter(tmp_path / ".out.old-abc", "old")
    with pytest.raises(OutputExistsError):
        atomic.check_free(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_what_a_killed_run_left_goes_and_what_a_running_one_has_stays(tmp_path: Path) -> None:
    for name in ("abc", "def"):
        write_adapter(tmp_path / f".out.partial-{name}")
    lock = atomic.lock_folder(tmp_path / ".out.partial-def")
    assert lock is not None
    with atomic.scratch_folder(tmp_path / "out"):
        assert not (tmp_path / ".out.partial-abc").exists()
    os.close(lock)
    assert names(tmp_path) == [".out.partial-def"]
