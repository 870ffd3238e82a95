"""Footnotes of Markdown, as GitHub writes them: `[^1]` in a text, and `[^1]: words` in a paragraph of its own.

A note is one paragraph. The notes that are referred to are numbered by their first reference, and follow the text.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub_converters import safe_regex

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.renderer import RendererHTML
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

_DEFINITION = safe_regex.Pattern(r"\[\^([^\]\s^\[]{1,100})\]:[ \t]+(.*)")
_REFERENCE = safe_regex.Pattern(r"\[\^([^\]\s^\[]{1,100})\]")
_MAX_REFERENCE = 103  # characters
_MAX_NOTES = 200  # of a text; references to any others stay as they are written
_ID = safe_regex.Pattern(r"note-[0-9]{1,3}(-reference)?")


def enable(parser: MarkdownIt) -> None:
    """Teach a parser to read footnotes; `notes` renders them."""
    parser.block.ruler.before("reference", "footnote", _definition, {"alt": ["paragraph", "reference"]})
    parser.inline.ruler.before("link", "footnote", _reference)
    parser.add_render_rule("footnote", _number)


def notes(parser: MarkdownIt, env: MutableMapping[str, Any]) -> str:
    """Return the notes of a text that was rendered with `env`; empty without any."""
    items: list[str] = []
    # A note may refer to another, which is then numbered after those before it.
    numbers: dict[str, int] = env.get("numbers", {})
    while len(items) < len(numbers):
        label = list(numbers)[len(items)]
        number = len(items) + 1
        text = parser.renderInline(env["notes"][label], env)
        items.append(f'<li id="note-{number}">{text} <a href="#note-{number}-reference">\N{LEFTWARDS ARROW WITH HOOK}</a></li>')
    return "<hr>\n<ol>\n{}\n</ol>\n".format("\n".join(items)) if items else ""


def is_id(text: str) -> bool:
    """Return whether a text is the id of a note or of a reference to one."""
    return bool(_ID.fullmatch(text))


def _definition(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Take a definition out of the text."""
    if state.is_code_block(start):
        return False
    match = _DEFINITION.fullmatch(state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]])
    if not match or len(state.env.get("notes", ())) >= _MAX_NOTES:
        return False
    if silent:
        return True
    words, line = [match[2]], start + 1
    while line < end and not state.isEmpty(line):
        text = state.getLines(line, line + 1, 0, False).strip()
        if _DEFINITION.fullmatch(text):
            break
        words.append(text)
        line += 1
    state.env.setdefault("notes", {}).setdefault(match[1], "\n".join(words))
    state.line = line
    return True


def _reference(state: StateInline, silent: bool) -> bool:
    match = _REFERENCE.match(state.src[state.pos : state.pos + _MAX_REFERENCE])
    if not match or match[1] not in state.env.get("notes", ()):
        return False
    if not silent:
        numbers = state.env.setdefault("numbers", {})
        is_first = match[1] not in numbers
        token = state.push("footnote", "", 0)
        token.meta = {"number": numbers.setdefault(match[1], len(numbers) + 1), "is_first": is_first}
    state.pos += len(match[0])
    return True


def _number(_: RendererHTML, tokens: Sequence[Token], index: int, _options: Any, _env: MutableMapping[str, Any]) -> str:
    number = tokens[index].meta["number"]
    link = f'<a href="#note-{number}">{number}</a>'
    return f'<sup id="note-{number}-reference">{link}</sup>' if tokens[index].meta["is_first"] else f"<sup>{link}</sup>"
