"""Canonical JSON: the one text of a document, so that every program derives the same digest from the same values.

The text is that of RFC 8785 (JSON Canonicalization Scheme): keys in the order of their UTF-16 code units, numbers as ECMAScript
writes them (ECMA-262, `Number::toString`), so 32.0 is `32` and 2e-05 is `0.00002`. It is compact, as in the RFC, or indented as
by `JSON.stringify(value, null, 2)`. `schemas/SPECIFICATION.md` says which document has which form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from json.encoder import encode_basestring

MAX_INTEGER = 2**53 - 1
"""The largest integer that every program reads exactly (RFC 7493, section 2.2)."""

_FIRST_EXPONENT = 10**21  # the smallest number that ECMAScript writes with an exponent


def compact(document: object) -> bytes:
    """Return the bytes of a document by RFC 8785; ValueError or TypeError for a value that JSON cannot hold exactly."""
    pieces: list[str] = []
    _append(pieces, document, "", "")
    return "".join(pieces).encode()


def indented(document: object) -> bytes:
    """Return the same text with two spaces for each level and a newline at its end, for files that people read."""
    pieces: list[str] = []
    _append(pieces, document, "\n", "  ")
    return "".join(pieces).encode() + b"\n"


def _append(pieces: list[str], value: object, newline: str, indent: str) -> None:
    """Append the text of a value; `newline` is the line break with the indentation of its line, empty in the compact form."""
    if isinstance(value, str):
        pieces.append(encode_basestring(value))
    elif isinstance(value, list | tuple):
        inner, separator = newline + indent, "["
        for item in value:
            pieces.append(separator + inner)
            _append(pieces, item, inner, indent)
            separator = ","
        pieces.append(newline + "]" if value else "[]")
    elif isinstance(value, Mapping):
        inner, separator, colon = newline + indent, "{", ": " if indent else ":"
        for key in sorted(value, key=_utf16):
            pieces.append(f"{separator}{inner}{encode_basestring(key)}{colon}")
            _append(pieces, value[key], inner, indent)
            separator = ","
        pieces.append(newline + "}" if value else "{}")
    else:
        pieces.append(_scalar(value))


def _utf16(key: object) -> bytes:
    if not isinstance(key, str):
        raise TypeError(f"{str(key)[:60]!r} is no text, which keys are")
    return key.encode("utf-16-be", "surrogatepass")


def _scalar(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        # ECMAScript writes a double such as 1e20 in digits: an integer whose text is such a number's is exact.
        if abs(value) > MAX_INTEGER and (abs(value) >= _FIRST_EXPONENT or str(value) != _number(float(value))):
            raise ValueError("an integer beyond 2^53 - 1, which other programs round")
        return str(int(value))
    if isinstance(value, float):
        return _number(value)
    raise TypeError(f"an object of the type {type(value).__name__}")


def _number(value: float) -> str:
    """Return a finite number as ECMAScript does: the shortest digits that read back, with an exponent only if it is large."""
    if not math.isfinite(value):
        raise ValueError(f"{value}, which is no number of JSON")
    mantissa, _, exponent = repr(abs(value)).partition("e")
    integer, _, fraction = mantissa.partition(".")
    all_digits = integer + fraction
    digits = all_digits.lstrip("0")
    # The place of the decimal point, counted from the first digit that is not 0.
    point = len(integer) + int(exponent or 0) - (len(all_digits) - len(digits))
    digits = digits.rstrip("0")
    sign = "-" if value < 0 else ""
    if not digits:
        return "0"  # also of -0
    if 0 < point <= 21:
        before, after = digits[:point].ljust(point, "0"), digits[point:]
        return f"{sign}{before}.{after}" if after else sign + before
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    power = point - 1
    return f"{sign}{digits[0]}{'.' if digits[1:] else ''}{digits[1:]}e{'+' if power > 0 else '-'}{abs(power)}"
