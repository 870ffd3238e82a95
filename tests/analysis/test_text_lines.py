"""Changed lines of two texts: right where they are aligned, and linear for any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.analysis.text_lines import changed_lines
from tests.conftest import Run
from tests.support.folders import adapter, pairs


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("a\nb\nc\n", "a\nx\nc\n", ("-b", "+x")),
        ("a\nb", "a\nb\nc", ("+c",)),
        ("a\nb\nc\nd\ne", "a\nB\nc\nD\ne", ("-b", "+B", "-d", "+D")),
        ("same", "same", ()),
        ("a\na\na", "a\na", ("-a",)),
        ("", "new", ("+new",)),
    ],
)
def test_the_lines_that_differ(old: str, new: str, lines: tuple[str, ...]) -> None:
    assert changed_lines(old, new) == lines


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_what_is_removed_and_added_is_the_difference_of_the_counts(old: list[str], new: list[str]) -> None:
    lines = changed_lines("\n".join(old), "\n".join(new))
    for letter in "abc":
        assert lines.count(f"+{letter}") - lines.count(f"-{letter}") == new.count(letter) - old.count(letter)


def test_a_change_that_is_too_long_to_align_is_one_block() -> None:
    old, new = "\n".join(f"a{n}" for n in range(50_000)), "\n".join(f"b{n}" for n in range(50_000))
    lines = changed_lines(f"head\n{old}\ntail", f"head\n{new}\ntail")
    assert (len(lines), lines[0], lines[-1]) == (100_000, "-a0", "+b49999")


@pytest.mark.parametrize("places", [("./one", "./two"), ("team/sql:v1", "team/sql:v2"), ("layout://x:v1", "./two")])
def test_diff_shows_the_lines_of_a_card_that_changed(run: Run, tmp_path: Path, places: tuple[str, str]) -> None:
    for name, text in (("one", "# SQL\n\nFirst.\n"), ("two", "# SQL\n\nSecond.\n")):
        folder = adapter(tmp_path / name, pairs(1))
        (folder / "README.md").write_text(text)
        run("push", folder, "team/sql")
    run("push", "one", "layout://x:v1")
    text = run("diff", *places).stdout
    assert "README.md:\n  - First.\n  + Second.\n" in text
    (file,) = json.loads(run("diff", *places, "--json").stdout)["files"]
    assert file["lines"] == ["-First.", "+Second."]
