"""A word that a shell completes in a clone: its files are read, nobody is asked, and the shell shows what is printed."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.adapters import Make
from tests.support.web_server import Web

LINES = ["adapterhub show ", "adapterhub pull x --remote ", "adapterhub base show ", "adapterhub login ", "adapterhub list "]


@pytest.fixture
def complete(run: Run, tmp_path: Path) -> Callable[[str], list[str]]:
    """Returns the words that bash gets for a line in the folder `clone`."""
    (tmp_path / "clone").mkdir()

    def call(line: str) -> list[str]:
        env = {
            "COMP_WORDS": line,
            "COMP_CWORD": str(line.count(" ")),
            "_ADAPTERHUB_COMPLETE": "bash_complete",
        }
        result = run(cwd=tmp_path / "clone", env=env)
        assert result.stderr == ""
        # `file,` has the shell complete paths itself: what follows is what was typed.
        return [row.partition(",")[2] for row in result.stdout.splitlines() if row and row != "file,"]

    return call


Complete = Callable[[str], list[str]]


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


def test_completion_asks_no_host(complete: Complete, tmp_path: Path, web: Web) -> None:
    url = f"oci://{web.url[7:]}/x"
    (tmp_path / "clone/adapterhub.toml").write_text(f'registry = "{url}"\nremote = "team"\n[remotes.team]\nurl = "{url}"\n')
    for line in LINES:
        complete(line)
    assert "team" in complete("adapterhub pull x --remote ")
    assert web.requests == []


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a pipe for settings": lambda clone: os.mkfifo(clone / "adapterhub.toml"),
    "a pipe for an index": lambda clone: os.mkfifo(clone / "registry.db"),
    "settings that nest": lambda clone: (clone / "adapterhub.toml").write_text("x = [" * 100_000),
    "settings without an end": lambda clone: (clone / "adapterhub.toml").symlink_to("/dev/zero"),
    "settings that are no text": lambda clone: (clone / "adapterhub.toml").write_bytes(b"\xff\xfe"),
    "a store that is a link": lambda clone: ((clone / ".adapterhub").symlink_to("/"), (clone / "registry.db").touch()),
    "a pipe in a store": lambda clone: ((clone / ".adapterhub").mkdir(), os.mkfifo(clone / ".adapterhub/oci-layout")),
    "a registry elsewhere": lambda clone: (clone / "adapterhub.toml").write_text('registry = "../elsewhere"\n'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_completion_in_a_damaged_clone_ends_and_says_nothing(
    complete: Complete, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    damage(tmp_path / "clone")
    assert [complete(line) for line in LINES] == [[]] * len(LINES)


@pytest.mark.parametrize(
    "name", ["\x1b[31mteam/evil", "team/$(touch x)", "team/x;reboot", "team/`id`", "team/x\nplain,y", "té/x"]
)
def test_no_name_in_an_index_reaches_the_shell_unless_it_is_a_word(
    complete: Complete, run: Run, make: Make, tmp_path: Path, name: str
) -> None:
    clone = tmp_path / "clone"
    run("push", make(), "team/good", "--registry", clone)
    database = sqlite3.connect(clone / "registry.db")
    database.execute("INSERT INTO names VALUES (?, 1, '', 1, 0)", (name,))
    database.execute(
        "INSERT INTO versions (name, number, digest, manifest_size, time, parents) VALUES (?, 1, 'sha256:00', 1, 't', '[]')",
        (name,),
    )
    database.commit()
    database.close()
    assert set(complete("adapterhub show ")) <= {"team/good", "team/good:v1"}


def test_no_base_reaches_the_shell_unless_it_is_a_word(complete: Complete, run: Run, tmp_path: Path) -> None:
    run("init", cwd=tmp_path / "clone")
    for name in ("$(touch x)", "\x1b[31m"):
        folder = tmp_path / "clone/.adapterhub/bases" / name
        folder.mkdir(parents=True)
        (folder / "00000001.json").write_text("{}")
    assert complete("adapterhub base show ") == []
