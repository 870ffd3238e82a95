"""Read and write small JSON config files, strictly."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError

from .open_file import open_regular

MAX_CONFIG = 16_000_000  # bytes; the largest config.json seen is under 1 MB; tokenizer.json has a limit of its own

_MAX_DIGITS = 308  # of an integer: more do not fit a float
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, limit: int = MAX_CONFIG, *, where: str | None = None, follow: bool = True) -> str:
    """Read a regular UTF-8 file of at most `limit` bytes; `follow` as in `open_regular`."""
    where = where or str(path)
    try:
        with open_regular(path, follow=follow) as file:
            # Python would allocate the whole limit; config files do not grow while they are read.
            raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except RefusedError as error:
        raise RefusedError(where, error.what, error.hint) from error
    except FileNotFoundError as error:
        raise NotFoundError(where, "no such file") from error
    except OSError as error:
        raise LocalIOError(where, error.strerror or str(error)) from error
    if len(raw) > limit:
        raise FormatError(where, f"more than {limit} bytes: not a config file")
    return _decoded(raw, where)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(where, "not UTF-8 text") from error


def parse_object(
    text: str | bytes, where: str, *, pairs: Callable[[list[tuple[str, Any]]], object] | None = None
) -> dict[str, Any]:
    """Parse the JSON object in `text`; duplicate keys, NaN, numbers too large for a float and half characters are refused.

    `pairs` makes each object in it from its pairs, in place of `unique`.
    """
    text = _decoded(text, where) if isinstance(text, bytes) else text
    try:
        document = json.loads(
            text, object_pairs_hook=pairs or unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_int
        )
        if _SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()  # half of a surrogate pair is not text and cannot be written
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FormatError(where, f"not valid JSON ({reason})") from error
    if not isinstance(document, dict):
        raise FormatError(where, "not a JSON object")
    return document


def read_object(path: Path, *, where: str | None = None, follow: bool = True) -> dict[str, Any]:
    """Read the JSON object in a config file; `follow` as in `open_regular`."""
    return parse_object(read_text(path, where=where, follow=follow), where or str(path))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of an object's pairs; ValueError for a duplicate key."""
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)[:80]!r}")
    return document


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text[:40]}… is too large")
    return int(text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with its newlines unchanged."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
