"""Footnotes of a card: numbered by their references, below the text, and nothing else of a page."""

from __future__ import annotations

import pytest

from adapterhub.hub.web import footnotes
from tests.hub.web.test_cards import REL, render


def note(number: int, text: str) -> str:
    """A note as it is rendered."""
    return f'<li id="note-{number}">{text} <a href="#note-{number}-reference" {REL}>\u21a9</a></li>\n'


def reference(number: int, *, is_first: bool = True) -> str:
    """A reference to a note as it is rendered."""
    ident = f' id="note-{number}-reference"' if is_first else ""
    return f'<sup{ident}><a href="#note-{number}" {REL}>{number}</a></sup>'


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a[^1]\n\n[^1]: *why*", f"<p>a{reference(1)}</p>\n<hr>\n<ol>\n{note(1, '<em>why</em>')}</ol>\n"),
        (
            "[^b]: two\n[^a]: one\n\nx[^a] y[^b] z[^a]",
            f"<p>x{reference(1)} y{reference(2)} z{reference(1, is_first=False)}</p>\n<hr>\n<ol>\n"
            + note(1, "one")
            + note(2, "two")
            + "</ol>\n",
        ),
        ("x[^a]\n\n[^a]: one\nline[^b]\n\n[^b]: two", None),
        ("no note[^9]", "<p>no note[^9]</p>\n"),
        ("[^9]: no reference\n\nx", "<p>x</p>\n"),
        ("`[^1]`\n\n[^1]: why", "<p><code>[^1]</code></p>\n"),
        ("    [^1]: code", '<pre tabindex="0"><code>[^1]: code\n</code></pre>\n'),
        ("x[^1]\n\n[^1]: <script>alert(1)</script>", None),
    ],
)
def test_a_note_is_below_the_text_and_linked_both_ways(text: str, html: str | None) -> None:
    rendered = render(text)
    if html is None:
        assert rendered.startswith(f"<p>x{reference(1)}</p>\n<hr>\n<ol>\n")
        assert "<script" not in rendered
    else:
        assert rendered == html


def test_a_note_that_refers_to_itself_or_to_another_ends() -> None:
    rendered = render("x[^a]\n\n[^a]: see [^b] and [^a]\n\n[^b]: see [^a]")
    assert rendered.count("<li") == 2


def test_ids_are_of_notes_alone() -> None:
    assert render('<sup id="main">a</sup><sup id="note-1">b</sup>') == '<p><sup>a</sup><sup id="note-1">b</sup></p>\n'
    assert footnotes.is_id("note-12-reference")
    assert not footnotes.is_id("note-1x")


def test_notes_are_bounded_in_number() -> None:
    rendered = render("".join(f"x[^{number}]\n\n[^{number}]: y\n\n" for number in range(300)))
    assert rendered.count("<li") == 200
