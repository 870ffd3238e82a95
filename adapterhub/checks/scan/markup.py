"""Script and embedded content in texts that people open: cards, pictures in SVG, and headers of weights.

Pages that clean what they show drop all of this (`hub.web.cards` does); a notebook, a chat window or a browser may not.
"""

from __future__ import annotations

import html
from collections.abc import Iterator

from adapterhub.checks.report import Problem
from adapterhub_converters import safe_regex

_ELEMENT = safe_regex.Pattern(
    r"(?i)<\s*(?:[a-z]+:)?(script|iframe|object|embed|applet|form|meta|base|frame|frameset|portal|foreignobject)(?:[\s/>]|$)"
)
_HANDLER = safe_regex.Pattern(r"(?i)<[a-z][^<>]{0,500}[\s/\"'](on[a-z]{3,30}|srcdoc|formaction)\s*=")
_SCHEME = safe_regex.Pattern(
    r"(?i)(?:\]\(\s*<?|\]:\s*<?|(?:href|src|action|data|poster|background)\s*=\s*[\"']?|<)\s*"
    r"("
    + "|".join(r"[\s\x00-\x1f]*".join(scheme) for scheme in ("javascript", "vbscript", "livescript"))
    + r"|data\s*:\s*(?:text/html|application/xhtml|image/svg))[^\n]{0,40}"
)
_ENTITY = safe_regex.Pattern(r"(?i)<!(ENTITY|DOCTYPE[^>]{0,200}\[)|<\?(xml-stylesheet|php)")
_DIGITS = safe_regex.Pattern(r"&#[0-9]{8,}")
# Turned direction, zero width, tags that spell out hidden words; not characters that join emoji or vary their look.
_INVISIBLE = {
    0x180E, 0x200B, *range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x2070), 0xFFF9, 0xFFFA, 0xFFFB,
    *range(0xE0000, 0xE0080),
}  # fmt: skip


def active_content(text: str) -> Iterator[str]:
    """Yield what would run or load something if `text` were shown unchanged, one of each kind."""
    # Browsers decode entities before they act, so `&#106;avascript:` must match as well.
    decoded = text if "&" not in text else f"{text}\n{html.unescape(_DIGITS.sub(_short, text))}"
    for pattern, kind in (
        (_ELEMENT, "the element"),
        (_HANDLER, "the attribute"),
        (_SCHEME, "an address that begins with"),
        (_ENTITY, "the declaration"),
    ):
        if match := pattern.search(decoded):
            yield f"{kind} {next(filter(None, match.groups())).lower()[:40]}"


def _short(reference: safe_regex.Match) -> str:
    """Return a character reference without leading zeros and excess digits: Python parses no number with thousands of them."""
    return "&#" + reference[0][2:].lstrip("0")[:8]


def without_code(text: str) -> str:
    """Return a Markdown text without its fenced blocks of code, in which markup is shown and does nothing (CommonMark 4.5)."""
    lines, fence = [], ""
    for line in text.splitlines(keepends=True):
        stripped = line.strip(" ")
        mark = stripped[:3] if len(line) - len(line.lstrip(" ")) < 4 and stripped[:3] in ("```", "~~~") else ""
        if not fence and mark:
            fence = stripped[: len(stripped) - len(stripped.lstrip(mark[0]))]
        elif fence:
            if stripped.startswith(fence) and not stripped.strip().strip(fence[0]):
                fence = ""
        else:
            lines.append(line)
    return "".join(lines)


def invisible_characters(path: str, text: str, key: str = "") -> Iterator[Problem]:
    """Yield a problem with the first invisible characters of a text, as code points."""
    characters = (
        () if text.isascii() else dict.fromkeys(char for char in text.removeprefix("\ufeff") if ord(char) in _INVISIBLE)
    )
    if characters:
        first = ", ".join(f"U+{ord(char):04X}" for char in list(characters)[:3])
        yield Problem("invisible-text", path, key, f"has invisible characters: {first}")
