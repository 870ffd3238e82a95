"""A line-by-line reader for the YAML of model cards and of trainers' options.

It reads `key: value`, `key: [a, b]`, and lists of `- value` lines. It is not a YAML parser: those nest and follow aliases
without bound, and tell numbers from text by patterns that backtrack. Lines of any other form are skipped; each line is read
once, so the time is linear in any text.
"""

from __future__ import annotations

from collections.abc import Iterable


def key_of(line: str) -> tuple[str, str] | None:
    """Split an unindented line, `key: value`, whose key is plain or quoted; return None for a line of another form."""
    if line[:1] in ("'", '"'):
        key, _, remainder = line[1:].partition(line[0])
        before_colon, colon, value = remainder.partition(":")
    else:
        before_colon, colon, value = line.partition(":")
        key, before_colon = before_colon.rstrip(" \t"), ""
        if not key.replace("_", "a").replace(".", "1").replace("-", "1").isalnum() or not (key[0].isalpha() or key[0] == "_"):
            return None
    if not key or not colon or before_colon.strip(" \t") or value[:1].strip():
        return None
    return key, value.strip()


def scalar(text: str) -> str:
    """Return a plain or quoted value without the comment after it; empty for null, maps and blocks."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        end = len(text) - 1 if text.endswith(text[0]) else text.find(text[0], 1)
        return text[1:end] if end > 0 else ""
    hash_at = text.find("#")
    while hash_at > 0 and not text[hash_at - 1].isspace():
        hash_at = text.find("#", hash_at + 1)
    if hash_at > 0:
        text = text[:hash_at].rstrip()
    return "" if text[:1] in tuple("{[|>&*!#") or text in ("null", "~") or ": " in text else text


def mapping(lines: Iterable[str]) -> dict[str, list[str]]:
    """Return the values under each key that is not indented; no values for a key with a value of another form."""
    values_by_key: dict[str, list[str]] = {}
    values: list[str] = []
    for line in lines:
        if pair := key_of(line):
            key, value = pair
            inner = value[1:-1].split(",") if value.startswith("[") and value.endswith("]") else [value]
            values_by_key[key] = values = [item for item in map(scalar, inner) if item]
        elif (item := line.lstrip()).startswith("-") and item[1:2].isspace():
            values += filter(None, [scalar(item[1:])])
        elif line[:1].strip():
            values = []  # indented items below this line belong to no key that is read
    return values_by_key
