"""Read JSON of any origin with bounded depth, numbers, and memory, and write small text files.

Every JSON document that somebody else may have written is parsed here, so that none ends in a RecursionError, a MemoryError, or
a number that no other program can read. Python's decoder is strict about neither duplicate keys nor NaN, limits the depth only
by the stack that is left, and makes up to fifty bytes of objects out of one byte of text.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adapterhub_converters import linear
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError

from .open_file import open_regular

MAX_CONFIG = 16_000_000  # bytes; the largest config.json seen is under 1 MB; tokenizer.json has a limit of its own
MAX_MEMORY = 256 << 20  # bytes of the objects in a document; those of the largest config.json take 5 MB
MAX_DEPTH = 64  # levels; a config has 5, and what reads a document afterwards may recurse several frames a level

_MAX_INT = 10**308  # larger ones do not fit a float
_SURROGATE = linear.Pattern(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, limit: int = MAX_CONFIG, *, where: str | None = None, follow: bool = True) -> str:
    """Read a regular UTF-8 file of at most `limit` bytes; `follow` as in `open_regular`."""
    where = where or str(path)
    try:
        with open_regular(path, follow=follow) as file:
            # Python would allocate the whole limit; config files do not grow while they are read.
            raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except RefusedError as error:
        raise RefusedError(where, error.what, error.hint, code=error.code) from error
    except FileNotFoundError as error:
        raise NotFoundError(where, "no such file", code="no-such-file") from error
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


def parse(
    text: str | bytes,
    where: str,
    *,
    memory: int | None = MAX_MEMORY,
    pairs: Callable[[list[tuple[str, Any]]], object] | None = None,
) -> Any:
    """Parse the JSON value in `text`.

    Args:
        text: Bytes are UTF-8.
        where: The name of the document in messages.
        memory: The most that its objects may take, in bytes; None for data of the user's own choice.
        pairs: Makes each object in it from its pairs, in place of `unique`; its caller limits the memory and the depth.

    Raises:
        FormatError: It is not JSON or not UTF-8, has a duplicate key, NaN, a number too large for a float, or half a character,
            is nested more than `MAX_DEPTH` deep, or takes more than `memory`.
        LocalIOError: There is not enough memory on this machine.
    """
    text = _decoded(text, where) if isinstance(text, bytes) else text
    if memory is not None and pairs is None:
        _check_memory(text, memory, where)
    decoder = _DECODER if pairs is None else _decoder(pairs)
    try:
        document = decoder.decode(text)
        if pairs is None:
            check_values(document)
        if _SURROGATE.search(text):
            _check_characters(document)
    except RecursionError as error:
        raise FormatError(where, f"not valid JSON (nested more than {MAX_DEPTH} deep)") from error
    except MemoryError as error:
        what = "needs more memory than is free"
        raise LocalIOError(where, what, "Close other programs, or split the file", code="out-of-memory") from error
    except ValueError as error:
        raise FormatError(where, f"not valid JSON ({reason(error, text)})") from error
    return document


def parse_object(
    text: str | bytes,
    where: str,
    *,
    memory: int | None = MAX_MEMORY,
    pairs: Callable[[list[tuple[str, Any]]], object] | None = None,
) -> dict[str, Any]:
    """Parse the JSON object in `text`; the arguments and errors are those of `parse`."""
    document = parse(text, where, memory=memory, pairs=pairs)
    if not isinstance(document, dict):
        raise FormatError(where, "not a JSON object")
    return document


def read_object(path: Path, *, where: str | None = None, follow: bool = True) -> dict[str, Any]:
    """Read the JSON object in a config file; `follow` as in `open_regular`."""
    return parse_object(read_text(path, where=where, follow=follow), where or str(path))


# ---- limits


def _check_memory(text: str, memory: int, where: str) -> None:
    """Refuse a text whose objects may take more than `memory` in CPython, by counting what they begin with."""
    if len(text) * _LARGEST_RATIO > memory:
        estimate = sum(text.count(mark) * size for mark, size in _SIZES.items())
        if estimate > memory:
            raise FormatError(where, f"has too many values: they would take over {memory >> 20} MiB of memory")


# Bytes for each mark, by what was measured: 232 for an object of one key, 96 for a list of one value, 104 for a key and the
# pair it is read as, 8 for a place in a list, 24 to 32 for a number, 49 to 76 for a string in addition to its characters.
_SIZES = {"{": 120, "[": 96, ":": 112, ",": 40, '"': 28}
_LARGEST_RATIO = 60  # of those sizes to the characters that contain them; {"": is 288 for 4


def check_values(document: Any) -> None:
    """Raise ValueError for a document that is nested more than `MAX_DEPTH` deep, or has an integer too large for a float."""
    level = [document]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for container in level:
            for value in _values(container):
                kind = type(value)
                if kind is dict or kind is list:
                    inner.append(value)
                elif kind is int and not -_MAX_INT < value < _MAX_INT:
                    raise ValueError("a number is too large")
        if not inner:
            return
        level = inner
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _values(container: Any) -> Iterable[Any]:
    if type(container) is dict:
        return container.values()
    return container if type(container) is list else (container,)


def _check_characters(document: Any) -> None:
    """Raise ValueError for half of a surrogate pair, which is not text and cannot be written."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, dict):
            waiting += value
            waiting += value.values()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of an object's pairs; ValueError for a duplicate key."""
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {key[:80]!r}")
    return document


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _decoder(pairs: Callable[[list[tuple[str, Any]]], object]) -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=pairs, parse_constant=_no_constant, parse_float=_finite)


_DECODER = _decoder(unique)


def reason(error: ValueError, text: str) -> str:
    """The first line of what a parser reports about `text`, in terms of the document."""
    if text.startswith("\ufeff"):
        return "it starts with a byte order mark"
    if "integer string conversion" in str(error):  # int() refuses more than 4,300 digits
        return "a number is too large"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def canonical(document: object) -> bytes:
    """Return the one spelling of a document whose digest names it: sorted keys, no spaces, UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with its newlines unchanged."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
