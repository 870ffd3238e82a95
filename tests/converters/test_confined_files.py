"""Files below a folder that others may have filled: no operation follows a link on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import RefusedError


@pytest.fixture
def files(tmp_path: Path) -> ConfinedFiles:
    """A folder with `sub/a.txt`, next to one that is not its own."""
    for folder in ("inside/sub", "outside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(folder)
    return ConfinedFiles(tmp_path / "inside")


OPERATIONS: dict[str, Callable[[ConfinedFiles, Path], object]] = {
    "read": lambda files, folder: files.read(folder / "a.txt"),
    "create": lambda files, folder: files.create(folder / "b.txt").close(),
    "resume": lambda files, folder: files.resume(folder / "a.txt").close(),
    "remove": lambda files, folder: files.remove(folder / "a.txt"),
    "list": lambda files, folder: files.list_folder(folder),
    "move": lambda files, folder: files.move(files.root / "sub" / "a.txt", folder / "c.txt"),
    "status": lambda files, folder: files.status(folder / "a.txt"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_works_in_a_folder_and_not_through_a_link(files: ConfinedFiles, tmp_path: Path, operation: str) -> None:
    (files.root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(RefusedError, match="link"):
        OPERATIONS[operation](files, files.root / "link")
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["a.txt"]
    OPERATIONS[operation](files, files.root / "sub")


def test_a_name_is_taken_even_by_a_broken_link_but_is_no_file(files: ConfinedFiles) -> None:
    (files.root / "broken").symlink_to("nowhere")
    assert [files.exists(files.root / name) for name in ("broken", "sub", "none", "sub/a.txt/b")] == [True, True, False, False]
    assert [files.is_file(files.root / name) for name in ("broken", "sub", "sub/a.txt")] == [False, False, True]


def test_an_open_file_that_lost_its_name_is_told(files: ConfinedFiles) -> None:
    path = files.root / "sub" / "a.txt"
    with files.open(path) as file:
        assert files.still_has_name(file, path)
        path.unlink()
        assert not files.still_has_name(file, path)
        path.write_text("another")
        assert not files.still_has_name(file, path)


def test_folders_that_are_kept_open_stay_the_ones_that_were_opened(files: ConfinedFiles) -> None:
    with files.folders_kept_open():
        files.read(files.root / "sub" / "a.txt")
        (files.root / "sub").rename(files.root / "moved")
        files.create(files.root / "sub" / "b.txt").close()
    assert (files.root / "moved" / "b.txt").exists()
