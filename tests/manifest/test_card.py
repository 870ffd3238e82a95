"""Cards: front matter and prose of any README, and what of them completes an adapter.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.manifest import card
from adapterhub.manifest.card import Card

TEXT = "---\nlicense: mit\ntags:\n- sql\n- lora\nbase_model: org/base\n---\n# SQL\n\nWrites SQL.\n"


def test_a_card_is_its_front_matter_and_the_text_below_it() -> None:
    sql = card.parse(TEXT)
    assert (sql.values("license"), sql.values("tags"), sql.title) == (("mit",), ("sql", "lora"), "SQL")
    assert sql.prose.startswith("# SQL")
    assert card.parse(f"\ufeff{TEXT}") == sql
    assert card.base_repo(sql) == "org/base"


@pytest.mark.parametrize(
    "text", ["", "---", "---\n", "---\nlicense: [", "--- \nlicense: mit", "\0", "# T\n---\nlicense: mit\n---\n"]
)
def test_any_text_is_a_card(text: str) -> None:
    assert isinstance(card.parse(text), Card)


def test_front_matter_that_does_not_begin_the_file_is_prose() -> None:
    assert card.parse(f"\n{TEXT}") == Card(prose=f"\n{TEXT}")


def test_of_two_values_neither_counts() -> None:
    assert card.base_repo(card.parse("---\nbase_model:\n- org/a\n- org/b\n---\n")) is None


def test_a_card_is_found_by_its_usual_names_and_only_if_it_can_be_read(tmp_path: Path) -> None:
    assert card.read(tmp_path) == Card()
    (tmp_path / "model_card.md").write_text(TEXT)
    assert card.license_in(tmp_path) == "mit"
    (tmp_path / "README.md").symlink_to(tmp_path / "none.md")
    assert card.license_in(tmp_path) == "mit"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_bytes(b"-" * (card.MAX_BYTES + 1))
    assert card.read(tmp_path) == Card()  # too large a card is not passed over for another


def test_values_and_prose_are_cut() -> None:
    long = card.parse("---\ntags:\n" + "- t\n" * 500 + f"license: {'x' * 500}\n---\n" + "y" * 100_000)
    assert (len(long.values("tags")), len(long.values("license")[0]), len(long.prose)) == (100, 200, card.MAX_PROSE)


SQL_CARD = """---
license: mit
language:
- en
- "de"
tags: [text2sql, 'lora']
base_model: other/unread
---
# Text to SQL
Answers questions about café tables. C++ "quoted".
"""
SQL_FIELDS = {
    "license": ("mit",),
    "language": ("en", "de"),
    "tags": ("text2sql", "lora"),
    "base_model": ("other/unread",),
}


@pytest.mark.parametrize(
    ("text", "fields", "title"),
    [
        ("", {}, ""),
        ("# Title\ntext", {}, "Title"),
        (SQL_CARD, SQL_FIELDS, "Text to SQL"),
        ("---\na: 1 # why\nb:\n  - x: y\n  c: d\n- z\ne: |\n  text\nf: {}\ng: null\n---\n", {"a": ("1",), "b": ("z",)}, ""),
        ("---\nnever: closed", {}, ""),
    ],
)  # fmt: skip
def test_what_is_read_of_a_card(text: str, fields: dict[str, Any], title: str) -> None:
    parsed = card.parse(text)
    assert (parsed.fields, parsed.title) == (fields, title)


@given(st.text() | st.text("-:[]\n ab'\"#").map(lambda text: f"---\n{text}"))
def test_prose_is_bounded_and_no_value_is_empty_whatever_the_text(text: str) -> None:
    parsed = card.parse(text)
    assert len(parsed.prose) <= card.MAX_PROSE
    assert all(values and all(values) for values in parsed.fields.values())
