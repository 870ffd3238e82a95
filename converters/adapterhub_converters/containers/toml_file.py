"""Parse TOML of any origin in linear time, with bounded depth and numbers.

Python's parser takes time quadratic in the parts of a dotted key, recurses into nested values, and ends in a plain ValueError
for a number of more than 4,300 digits.
"""

from __future__ import annotations

import math
import tomllib
from typing import Any

from adapterhub_converters import linear
from adapterhub_converters.errors import UsageError

from . import json_file

MAX_TOML = 1 << 20  # bytes; Python's parser takes a second for them
_MAX_PARTS = 32  # of a dotted key


def parse(text: str, where: str) -> dict[str, Any]:
    """Parse a TOML document; UsageError if it is invalid, too large, nested too deeply, or has a number that JSON has not."""
    if len(text) > MAX_TOML:
        raise UsageError(where, f"more than {MAX_TOML} bytes: not a config file", code="invalid-config")
    try:
        _check_keys(text)
        document = tomllib.loads(text, parse_float=_finite)
        json_file.check_values(document)
    except RecursionError as error:
        raise UsageError(
            where, f"not valid TOML (nested more than {json_file.MAX_DEPTH} deep)", code="invalid-config"
        ) from error
    except ValueError as error:
        raise UsageError(where, f"not valid TOML ({json_file.reason(error, text)})", code="invalid-config") from error
    return document


# Strings and comments as a whole, then what separates keys.
_TOKEN = linear.Pattern(
    r'(?s)"""(?:[^"\\]|\\.|"{1,2}(?:[^"\\]|\\.))*"{3,5}'
    r"|'''(?:[^']|'{1,2}[^'])*'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"?'
    r"|'[^'\n]*'?"
    r"|#[^\n]*"
    r"|[.=,\[\]{}\n]"
)


def _check_keys(text: str) -> None:
    """Raise ValueError for a dotted key of too many parts."""
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


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def line_of(text: str, table: str, key: str) -> int | None:
    """Return the line of a key, or of the header of a table of that name; None if it is written in another way."""
    inside, wanted = "", f"{table}.{key}" if table else key
    for number, line in enumerate(text.splitlines(), 1):
        name, equals, _ = line.partition("=")
        if is_header(line) and "]" in line:
            inside = _bare(line.lstrip()[1:].partition("]")[0])
            if inside == wanted or (not table and inside.startswith(f"{key}.")):
                return number
        elif equals and (f"{inside}.{_bare(name)}" if inside else _bare(name)) == wanted:
            return number
    return None


def is_header(line: str) -> bool:
    """Return True if a line begins a table."""
    return line.lstrip().startswith("[")


def _bare(name: str) -> str:
    return name.strip().replace('"', "").replace("'", "").replace(" ", "")
