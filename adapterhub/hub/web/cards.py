"""Model cards as harmless HTML: Markdown, with a little HTML in it, sanitized, and with nothing loaded from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from markupsafe import Markup, escape

from . import footnotes

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.rules_core import StateCore
    from markdown_it.token import Token

_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_TAGS = {
    *("a", "b", "blockquote", "br", "center", "code", "details", "div", "em", "h3", "h4", "h5", "h6", "hr", "i", "img", "kbd"),
    *("li", "ol", "p", "pre", "s", "strong", "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
_ATTRIBUTES = {
    "a": {"href", "title"},
    "div": {"align", "class", "tabindex", "role", "aria-label"},
    "img": {"src", "alt", "title", "width", "height"},
    "li": {"id"},
    "ol": {"start"},
    "p": {"align"},
    "pre": {"tabindex"},
    "sup": {"id"},
}
_ALIGNMENTS = ("left", "center", "right")
# A card with more of these shows its HTML as text: the time of the sanitizer grows with the square of the depth.
_MARKUP, _MAX_MARKUP = "<", 2000
_TASKS = {"[ ] ": "\N{BALLOT BOX} ", "[x] ": "\N{BALLOT BOX WITH CHECK} ", "[X] ": "\N{BALLOT BOX WITH CHECK} "}
_UNFILLED, _MAX_UNFILLED = "[More Information Needed]", 5  # what a template has in place of facts, and how often a card may
# Anything wider than the page scrolls in its own box, which must be reachable by keyboard (tabindex). These are written before
# the sanitizer has read the text: a replacement after it could make markup of what was the text of an attribute.
_PRE, _WIDE_PRE = "<pre>", '<pre tabindex="0">'
_BOX_ATTRIBUTES = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Table"}
_BOX = "<div " + " ".join(f'{name}="{value}"' for name, value in _BOX_ATTRIBUTES.items()) + ">"


def render(text: str, *, files: Collection[str], folder_url: str) -> Markup:
    """Return a card as HTML, with its headings below those of the page.

    Args:
        text: Markdown; of the HTML in it, what cards are usually written with counts, and comments are left out.
        files: Paths of the adapter's files; pictures among them are shown, any others become links.
        folder_url: The URL of the folder with the files.
    """
    import nh3  # imported late, like markdown_it: many hubs serve only programs

    env: dict[str, Any] = {"files": files, "where": folder_url}
    parser = _parser(with_html=text.count(_MARKUP) <= _MAX_MARKUP)
    html = parser.render(text, env)
    html += footnotes.notes(parser, env)
    clean = nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        attribute_filter=functools.partial(_checked_attribute, env),
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow ugc",
    )
    if text.count(_UNFILLED) > _MAX_UNFILLED:
        clean = f"<details><summary>The card is a template that nobody has filled in</summary>{clean}</details>"
    return Markup(clean)  # noqa: S704 - sanitized


def _checked_attribute(env: Mapping[str, Any], tag: str, name: str, value: str) -> str | None:
    """Return the value of an attribute, which may be the author's; None to leave it out."""
    if name == "src":
        path = unquote(value).removeprefix(f"{env['where']}/").removeprefix("./")
        return _address(env, path) if path in env["files"] and path.lower().endswith(_IMAGES) else None
    if name == "id":
        return value if footnotes.is_id(value) else None
    if name == "align":
        return value if value in _ALIGNMENTS else None
    if tag == "div":
        return value if _BOX_ATTRIBUTES.get(name) == value else None
    if name in ("width", "height"):
        return value if value.isdecimal() and len(value) <= 4 else None
    return value


@functools.cache
def _parser(*, with_html: bool) -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": with_html}).enable(["table", "strikethrough"])
    footnotes.enable(parser)
    parser.add_render_rule("image", _image)
    parser.add_render_rule("heading_open", _heading)
    parser.add_render_rule("heading_close", _heading)
    for name in ("link_open", "link_close"):
        parser.add_render_rule(name, _link)
    parser.core.ruler.push("tasks", _mark_tasks)
    for name in ("fence", "code_block"):
        parser.add_render_rule(name, _code)
    for name in ("table_open", "table_close"):
        parser.add_render_rule(name, _table)
    return parser


def _mark_tasks(state: StateCore) -> None:
    """Put a box in place of the brackets of tasks: items of lists that begin with `[ ]` or `[x]`."""
    for item, paragraph, inline in zip(state.tokens, state.tokens[1:], state.tokens[2:], strict=False):
        if (item.type, paragraph.type, inline.type) == ("list_item_open", "paragraph_open", "inline") and inline.children:
            first = inline.children[0]
            first.content = _TASKS.get(first.content[:4], first.content[:4]) + first.content[4:]


def _image(_: RendererHTML, tokens: Sequence[Token], index: int, _options: Any, env: MutableMapping[str, Any]) -> str:
    """Render a picture among the adapter's own files, or a link to one elsewhere; within a link, its description."""
    source, alt = str(tokens[index].attrs.get("src", "")), tokens[index].content
    path = unquote(source).removeprefix("./")
    if path in env["files"] and path.lower().endswith(_IMAGES):
        return f'<img src="{escape(_address(env, path))}" alt="{escape(alt)}">'
    description = escape(alt or "picture")
    return description if env.get("in_link") else f'<a href="{escape(source)}">{description}</a>'


def _heading(_: RendererHTML, tokens: Sequence[Token], index: int, _options: Any, _env: MutableMapping[str, Any]) -> str:
    level = min(6, int(tokens[index].tag[1]) + 2)
    return f"<h{level}>" if tokens[index].nesting > 0 else f"</h{level}>\n"


def _code(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: MutableMapping[str, Any]) -> str:
    render = renderer.fence if tokens[index].type == "fence" else renderer.code_block
    return render(tokens, index, options, env).replace(_PRE, _WIDE_PRE, 1)


def _table(_: RendererHTML, tokens: Sequence[Token], index: int, _options: Any, _env: MutableMapping[str, Any]) -> str:
    return f"{_BOX}<table>\n" if tokens[index].nesting > 0 else "</table></div>\n"


def _link(renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: MutableMapping[str, Any]) -> str:
    """Render a link; one to a file of the adapter gets that file's address."""
    env["in_link"] = tokens[index].nesting > 0  # no link has another one in it
    path = unquote(str(tokens[index].attrs.get("href", ""))).removeprefix("./")
    if path in env["files"]:
        tokens[index].attrs["href"] = _address(env, path)
    return renderer.renderToken(tokens, index, options, env)


def _address(env: Mapping[str, Any], path: str) -> str:
    return f"{env['where']}/{quote(path)}"
