"""Parser of TOML from any origin, in linear time, with bounded depth and numbers.

Python's parser takes time quadratic in the parts of a dotted key, recurses into nested values, and ends in a plain ValueError
for a number of more than 4,300 digits.
"""

from __future__ import annotations

import math
from typing import Any

from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError

from . import json_file

MAX_TOML = 1 << 20  # bytes; Python's parser takes a second for them
_MAX_PARTS = 32  # of a dotted key


def parse(text: str, location: str) -> dict[str, Any]:
    """Parse a TOML document.

    Raises:
        UsageError: It is invalid, too large, nested too deeply, or has a number that JSON cannot express.
    """
    if len(text) > MAX_TOML:
        raise UsageError(location, f"more than {MAX_TOML} bytes: not a config file", code="invalid-config")
    import tomllib  # late: most folders have no such file

    try:
        # Before parsing: `tomllib` takes time quadratic in the parts of a key.
        _check_keys(text)
        document = tomllib.loads(text, parse_float=_parse_finite)
        json_file.check_values(document)
    except RecursionError as error:
        raise UsageError(
            location, f"not valid TOML (nested more than {json_file.MAX_DEPTH} deep)", code="invalid-config"
        ) from error
    except ValueError as error:
        raise UsageError(
            location, f"not valid TOML ({json_file.parse_error_text(error, text)})", code="invalid-config"
        ) from error
    return document


# Strings and comments, each as one token, then the characters that separate keys.
_TOKEN = safe_regex.Pattern(
    r'(?s)"""(?:[^"\\]|\\.|"{1,2}(?:[^"\\]|\\.))*"{3,5}'
    r"|'''(?:[^']|'{1,2}[^'])*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"?'
    r"|'[^'\n]*'?"
    r"|#[^\n]*"
    r"|[.=,\[\]{}\n]"
)


def _check_keys(text: str) -> None:
    """Raise a ValueError for a dotted key of too many parts."""
    if text.count(".") < _MAX_PARTS:
        return
    parts, line = 1, 1
    for token in _TOKEN.finditer(text):
        mark = token[0]
        line += mark.count("\n")
        if mark == ".":
            parts += 1
            if parts > _MAX_PARTS:
                raise ValueError(f"a key of more than {_MAX_PARTS} parts (at line {line})")
        elif mark in "=,[]{}\n":
            parts = 1


def _parse_finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def line_of(text: str, table: str, key: str) -> int | None:
    """Return the line of a key, or of the header of a table with that name; None if it is written in another form."""
    current_table, full_key = "", f"{table}.{key}" if table else key
    for number, line in enumerate(text.splitlines(), 1):
        name, equals, _ = line.partition("=")
        if is_header(line) and "]" in line:
            current_table = _strip_quotes(line.lstrip()[1:].partition("]")[0])
            if current_table == full_key or (not table and current_table.startswith(f"{key}.")):
                return number
        elif equals and (f"{current_table}.{_strip_quotes(name)}" if current_table else _strip_quotes(name)) == full_key:
            return number
    return None


def is_header(line: str) -> bool:
    """Return whether a line begins a table."""
    return line.lstrip().startswith("[")


def _strip_quotes(name: str) -> str:
    """Return a key without quotes and spaces."""
    return name.strip().replace('"', "").replace("'", "").replace(" ", "")
