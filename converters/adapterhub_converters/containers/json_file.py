"""Reader of JSON from any origin, with bounded depth, numbers, and memory, and writer of small text files.

Every JSON document that somebody else may have written is parsed here, so that none ends in a RecursionError, a MemoryError, or
a number that no other program can read. Python's decoder accepts duplicate keys and NaN, limits the depth only by the remaining
stack, and makes up to fifty bytes of objects out of one byte of text.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

from adapterhub_converters import safe_regex
from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError

from .open_file import open_regular

MAX_CONFIG = 16_000_000  # bytes; the largest config.json seen is under 1 MB; tokenizer.json has a limit of its own
MAX_MEMORY = 256 << 20  # bytes of the objects in a document; those of the largest config.json take 5 MB
MAX_DEPTH = 64  # levels; a config has 5, and what reads a document afterwards may recurse several frames a level

_MAX_INT = 10**308  # larger ones do not fit a float
_SHORT = 1 << 16  # bytes
_SURROGATE = safe_regex.Pattern(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, limit: int = MAX_CONFIG, *, follow: bool = True) -> str:
    """Read a regular UTF-8 file of at most `limit` bytes; `follow` is as in `open_regular`."""
    location = str(path)
    try:
        with open_regular(path, follow=follow) as file:
            # Python would allocate the full limit; config files do not grow while they are read.
            raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except RefusedError as error:
        raise RefusedError(location, error.what, error.hint, code=error.code) from error
    except FileNotFoundError as error:
        raise NotFoundError(location, "no such file", code="no-such-file") from error
    except OSError as error:
        raise LocalIOError(location, error.strerror or str(error)) from error
    if len(raw) > limit:
        raise FormatError(location, f"more than {limit} bytes: not a config file")
    return _decode_utf8(raw, location)


def _decode_utf8(raw: bytes, location: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(location, "not UTF-8 text") from error


def parse(text: str | bytes, location: str, *, memory: int | None = MAX_MEMORY, nan_as_null: bool = False) -> Any:
    """Parse the JSON value in `text`.

    Args:
        text: Bytes are UTF-8.
        location: The name of the document in errors.
        memory: The maximum size of its objects in bytes; None for data of the user's own choice.
        nan_as_null: Read NaN and infinities, which tables contain where a value is missing, as null.

    Raises:
        FormatError: It is not JSON or not UTF-8, has a duplicate key, NaN, a number too large for a float, or half a surrogate
            pair, is nested more than `MAX_DEPTH` deep, or takes more than `memory`.
        LocalIOError: There is not enough memory on this machine.
    """
    text = _decode_utf8(text, location) if isinstance(text, bytes) else text
    if memory is not None:
        _check_memory(text, memory, location)
    try:
        document = (_NULL_DECODER if nan_as_null else _DECODER).decode(text)
        check_values(document)
        # The check takes a walk over the document, and hardly any has such an escape.
        if _SURROGATE.search(text):
            _check_characters(document)
    except RecursionError as error:
        raise FormatError(location, f"not valid JSON (nested more than {MAX_DEPTH} deep)") from error
    except MemoryError as error:
        problem = "needs more memory than is free"
        raise LocalIOError(location, problem, "Close other programs, or split the file", code="out-of-memory") from error
    except ValueError as error:
        raise FormatError(location, f"not valid JSON ({parse_error_text(error, text)})") from error
    return document


def parse_object(
    text: str | bytes, location: str, *, memory: int | None = MAX_MEMORY, nan_as_null: bool = False
) -> dict[str, Any]:
    """Parse the JSON object in `text`; arguments and errors are those of `parse`."""
    document = parse(text, location, memory=memory, nan_as_null=nan_as_null)
    if not isinstance(document, dict):
        raise FormatError(location, "not a JSON object")
    return document


def parse_plain_object(raw: bytes) -> dict[str, Any] | None:
    """Parse a short JSON object without escaped characters, in a quarter of the time; None for whatever needs `parse_object`.

    Not checked: its depth, the size of its numbers, and keys that occur twice, of which the last counts. For documents whose
    bytes are passed on.
    """
    if len(raw) > _SHORT or b"\\u" in raw:
        return None
    try:
        document = _PLAIN_DECODER.decode(raw.decode())
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def read_object(path: Path, *, follow: bool = True) -> dict[str, Any]:
    """Read the JSON object in a config file; `follow` is as in `open_regular`."""
    return parse_object(read_text(path, follow=follow), str(path))


# ---- limits


def _check_memory(text: str, memory: int, location: str) -> None:
    """Refuse a text whose objects may take more than `memory` in CPython, by counting the marks that they begin with."""
    if len(text) * _MAX_RATIO > memory:
        estimate = sum(text.count(mark) * size for mark, size in _SIZE_BY_MARK.items())
        if estimate > memory:
            raise FormatError(location, f"has too many values: they would take over {memory >> 20} MiB of memory")


# Measured bytes for each mark: 232 for an object of one key, 96 for a list of one value, 104 for a key and the pair it is read
# as, 8 for a place in a list, 24 to 32 for a number, 49 to 76 for a string in addition to its characters.
_SIZE_BY_MARK = {"{": 120, "[": 96, ":": 112, ",": 40, '"': 28}
_MAX_RATIO = 60  # maximum ratio of these sizes to the characters they stand for; {"": is 288 for 4


def check_values(document: Any) -> None:
    """Raise a ValueError for a document nested more than `MAX_DEPTH` deep, or with an integer too large for a float."""
    # Level by level, in place of a recursion.
    level = [document]
    for _ in range(MAX_DEPTH):
        next_level: list[Any] = []
        for container in level:
            for value in _child_values(container):
                kind = type(value)
                if kind is dict or kind is list:
                    next_level.append(value)
                elif kind is int and not -_MAX_INT < value < _MAX_INT:
                    raise ValueError("a number is too large")
        if not next_level:
            return
        level = next_level
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def _child_values(container: Any) -> Iterable[Any]:
    if type(container) is dict:
        return container.values()
    return container if type(container) is list else (container,)


def _check_characters(document: Any) -> None:
    """Raise a ValueError for half of a surrogate pair, which is not text and cannot be written."""
    # A loop rather than a recursion: the document may be as deep as the limit allows.
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, dict):
            pending += value
            pending += value.values()


def dict_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of an object's pairs; ValueError for a duplicate key."""
    document = dict(pairs)
    if len(document) != len(pairs):
        visited: set[str] = set()
        key = next(key for key, _ in pairs if key in visited or visited.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {key[:80]!r}")
    return document


def _parse_finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=dict_without_duplicates, parse_constant=_refuse_constant, parse_float=_parse_finite
)
_NULL_DECODER = json.JSONDecoder(
    object_pairs_hook=dict_without_duplicates, parse_constant=lambda _: None, parse_float=_parse_finite
)
_PLAIN_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_error_text(error: ValueError, text: str) -> str:
    """Return the first line of a parser's error about `text`, in terms of the document."""
    if text.startswith("\ufeff"):
        return "it starts with a byte order mark"
    if "integer string conversion" in str(error):  # int() refuses more than 4,300 digits
        return "a number is too large"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number; `True` is none, although Python counts it as an int."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer; `True` is none, although Python counts it as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def canonical_bytes(document: object) -> bytes:
    """Return the canonical bytes of a document whose digest names it: sorted keys, no spaces, UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with its newlines unchanged."""
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
