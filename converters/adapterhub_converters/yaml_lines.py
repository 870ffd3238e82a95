"""The YAML of model cards and of trainers' options, line by line: `key: value`, `key: [a, b]`, and lists of `- value` lines.

Not a parser of YAML: those of others nest and follow aliases without bound, and tell numbers from text by patterns that
backtrack. What has another form is skipped; each line is looked at once, so the time is linear in the text, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterable


def key_of(line: str) -> tuple[str, str] | None:
    """Split a line without indentation, `key: value`, whose key is plain or quoted; None for a line of another form."""
    if line[:1] in ("'", '"'):
        key, _, rest = line[1:].partition(line[0])
        before, colon, value = rest.partition(":")
    else:
        before, colon, value = line.partition(":")
        key, before = before.rstrip(" \t"), ""
        if not key.replace("_", "a").replace(".", "1").replace("-", "1").isalnum() or not (key[0].isalpha() or key[0] == "_"):
            return None
    if not key or not colon or before.strip(" \t") or value[:1].strip():
        return None
    return key, value.strip()


def scalar(text: str) -> str:
    """A plain or quoted value without the comment after it; empty for null, maps and blocks."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        end = len(text) - 1 if text.endswith(text[0]) else text.find(text[0], 1)
        return text[1:end] if end > 0 else ""
    at = text.find("#")
    while at > 0 and not text[at - 1].isspace():
        at = text.find("#", at + 1)
    if at > 0:
        text = text[:at].rstrip()
    return "" if text[:1] in tuple("{[|>&*!#") or text in ("null", "~") or ": " in text else text


def mapping(lines: Iterable[str]) -> dict[str, list[str]]:
    """The values under each key that is not indented; none for a key with a value of another form."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for line in lines:
        if pair := key_of(line):
            key, value = pair
            inner = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
            found[key] = values = [item for item in map(scalar, inner) if item]
        elif (item := line.lstrip()).startswith("-") and item[1:2].isspace():
            values += filter(None, [scalar(item[1:])])
        elif line[:1].strip():
            values = []  # of no key
    return found
