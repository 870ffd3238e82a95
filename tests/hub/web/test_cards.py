"""A card is text with structure, whatever its author wrote."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.hub.web import cards
from tests.hub.web.conftest import Html

ALLOWED = {"a", "blockquote", "br", "code", "em", "h3", "h4", "h5", "h6", "hr", "img", "li", "ol", "p", "pre", "s", "strong"}
ALLOWED |= {"div", "table", "tbody", "td", "th", "thead", "tr", "ul"}
ALLOWED |= {"b", "center", "details", "i", "kbd", "sub", "summary", "sup"}
ATTRIBUTES = {"href", "title", "rel", "src", "alt", "start", "tabindex", "role", "aria-label", "class"}
ATTRIBUTES |= {"align", "width", "height", "id"}

REL = 'rel="noopener noreferrer nofollow ugc"'
PIECES = [
    "<script>",
    "<div ",
    "<img ",
    'src="',
    "onload=x",
    "../",
    "notes.md",
    "loss.png",
    '">',
    "</div>",
    "<details>",
    "[a](",
    "![b](",
    "javascript:",
    "//x.org",
    ")",
    "`",
    "|",
    "\n",
    "#",
    "<!--",
    "[^1]",
    "[^1]: ",
    '<li id="x">',
]


def render(text: str) -> str:
    return str(cards.render(text, files={"loss.png", "a b.png", "notes.md"}, folder_url="/team/sql/resolve/v1"))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# Title\n\n###### Deep", "<h3>Title</h3>\n<h6>Deep</h6>\n"),
        ("<b>yes</b> <u>no</u>", "<p><b>yes</b> no</p>\n"),
        ("<!-- a\n\ncomment -->\nseen", "\n<p>seen</p>\n"),
        ('<div align="center" class="button" style="x">a<br>b</div>', '<div align="center">a<br>b</div>'),
        ('<img src="./loss.png" width="300">', '<img src="/team/sql/resolve/v1/loss.png" width="300">'),
        ('<img src="http://x.org/y.png" alt="far">', '<img alt="far">'),
        ('<img src="/team/sql/resolve/v1/../../../../api/models">', "<img>"),
        (
            "<details><summary>More</summary>\n\n**b**\n\n</details>",
            "<details><summary>More</summary>\n<p><strong>b</strong></p>\n</details>",
        ),
        ("</div></main><h1>x</h1>", "x"),
        ("![loss](./loss.png)", '<p><img src="/team/sql/resolve/v1/loss.png" alt="loss"></p>\n'),
        ("![x](<a b.png>)", '<p><img src="/team/sql/resolve/v1/a%20b.png" alt="x"></p>\n'),
        ("![x](http://x.org/y.png)", f'<p><a href="http://x.org/y.png" {REL}>x</a></p>\n'),
        ("[![badge](http://x.org/a.png)](http://x.org)", f'<p><a href="http://x.org" {REL}>badge</a></p>\n'),
        ("- [ ] one\n- [x] two", "<ul>\n<li>\u2610 one</li>\n<li>\u2611 two</li>\n</ul>\n"),
        ("[notes](notes.md)", f'<p><a href="/team/sql/resolve/v1/notes.md" {REL}>notes</a></p>\n'),
        ("```sh\nls\n```", '<pre tabindex="0"><code>ls\n</code></pre>\n'),
        ("[x](javascript:alert(1))", "<p>[x](javascript:alert(1))</p>\n"),
    ],
)
def test_markdown_becomes_these_elements(text: str, html: str) -> None:
    assert render(text) == html


def test_a_wide_table_scrolls_in_its_own_box() -> None:
    html = render("| a |\n| - |\n| b |")
    assert html.startswith('<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>')
    assert html.count("<div") == html.count("</div>") == 1


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=200)
def test_no_text_makes_another_element(text: str) -> None:
    for tag, attrs in Html(render(text)).elements:
        assert tag in ALLOWED
        assert set(attrs) <= ATTRIBUTES
        assert attrs.get("src", "/team/sql/resolve/v1/loss.png") in {
            f"/team/sql/resolve/v1/{path}" for path in ("loss.png", "a%20b.png")
        }
        assert tag != "div" or attrs.get("class", "scroll") == "scroll"
        assert not str(attrs.get("href", "")).lower().startswith(("javascript:", "data:", "vbscript:"))


def test_html_of_thousands_of_elements_is_shown_as_text() -> None:
    """The time of the sanitizer grows with the square of the depth: 0.6 s for a list 8,000 deep."""
    assert render("<ul><li>" * 5000).startswith("<p>&lt;ul&gt;&lt;li&gt;")


def test_text_of_an_attribute_does_not_become_markup() -> None:
    """A replacement in the text after the sanitizer, with nh3 before 0.3.8, made an element of the title."""
    html = render('[x](http://a "<table><img src=x onerror=alert(1)>")')
    assert "<table" not in html
    assert "<img" not in html
    assert "<div" not in html


def test_a_template_that_is_not_filled_in_is_one_line() -> None:
    card = "# Model Card\n" + "- **Developed by:** [More Information Needed]\n" * 6
    assert render(card).startswith("<details><summary>The card is a template that nobody has filled in</summary>")
    assert not render("# Card\n\n[More Information Needed]").startswith("<details>")
