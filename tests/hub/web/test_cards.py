"""A card is text with structure, whatever its author wrote."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.hub.web import cards
from tests.hub.web.conftest import Html

ALLOWED = {"a", "blockquote", "br", "code", "em", "h3", "h4", "h5", "h6", "hr", "img", "li", "ol", "p", "pre", "s", "strong"}
ALLOWED |= {"div", "table", "tbody", "td", "th", "thead", "tr", "ul"}
ATTRIBUTES = {"href", "title", "rel", "src", "alt", "start", "tabindex", "role", "aria-label", "class"}

REL = 'rel="noopener noreferrer nofollow ugc"'
PIECES = ["<script>", "[a](", "![b](", "javascript:", "//x.org", ")", "`", "|", "\n", "#", "<!--"]


def render(text: str) -> str:
    return str(cards.render(text, files={"loss.png", "a b.png", "notes.md"}, folder_url="/team/sql/resolve/v1"))


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# Title\n\n###### Deep", "<h3>Title</h3>\n<h6>Deep</h6>\n"),
        ("<b>no</b>", "<p>&lt;b&gt;no&lt;/b&gt;</p>\n"),
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
    found = render("| a |\n| - |\n| b |")
    assert found.startswith('<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>')
    assert found.count("<div") == found.count("</div>") == 1


@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@settings(max_examples=200)
def test_no_text_makes_another_element(text: str) -> None:
    for tag, attrs in Html(render(text)).elements:
        assert tag in ALLOWED
        assert set(attrs) <= ATTRIBUTES
        assert tag != "img" or str(attrs["src"]).startswith("/team/sql/resolve/v1/")
        assert not str(attrs.get("href", "")).lower().startswith(("javascript:", "data:", "vbscript:"))


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
