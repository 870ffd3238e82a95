"""Canonical JSON: the one text of a document, so that every program derives the same digest from the same values.

The text is that of RFC 8785 (JSON Canonicalization Scheme): keys in the order of their UTF-16 code units, numbers as ECMAScript
writes them (ECMA-262, `Number::toString`), so 32.0 is `32` and 2e-05 is `0.00002`. It is compact, as in the RFC, or indented as
by `JSON.stringify(value, null, 2)`. `schemas/SPECIFICATION.md` says which document has which form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

MAX_INTEGER = 2**53 - 1
"""The largest integer that every program reads exactly (RFC 7493, section 2.2)."""

_FIRST_EXPONENT = 10**21  # the smallest number that ECMAScript writes with an exponent


def compact(document: object) -> bytes:
    """Return the bytes of a document by RFC 8785; ValueError or TypeError for a value that JSON cannot hold exactly."""
    return "".join(_pieces(document, "", "")).encode()


def indented(document: object) -> bytes:
    """Return the same text with two spaces for each level and a newline at its end, for files that people read."""
    return "".join(_pieces(document, "\n", "  ")).encode() + b"\n"


def _pieces(value: object, newline: str, indent: str) -> Iterator[str]:
    """Yield the text of a value; `newline` is the line break with the indentation of its line, empty in the compact form."""
    inner, space = newline + indent, " " if indent else ""
    if isinstance(value, Mapping):
        separator = "{" + inner
        for key in sorted(value, key=_utf16):
            yield f"{separator}{_text(key)}:{space}"
            yield from _pieces(value[key], inner, indent)
            separator = "," + inner
        yield newline + "}" if value else "{}"
    elif isinstance(value, list | tuple):
        separator = "[" + inner
        for item in value:
            yield separator
            yield from _pieces(item, inner, indent)
            separator = "," + inner
        yield newline + "]" if value else "[]"
    else:
        yield _scalar(value)


def _utf16(key: object) -> bytes:
    if not isinstance(key, str):
        raise TypeError(f"{str(key)[:60]!r} is no text, which keys are")
    return key.encode("utf-16-be", "surrogatepass")


def _scalar(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        # ECMAScript writes a double such as 1e20 in digits: an integer whose text is such a number's is exact.
        if abs(value) > MAX_INTEGER and (abs(value) >= _FIRST_EXPONENT or str(value) != _number(float(value))):
            raise ValueError("an integer beyond 2^53 - 1, which other programs round")
        return str(int(value))
    if isinstance(value, float):
        return _number(value)
    raise TypeError(f"an object of the type {type(value).__name__}")


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


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
