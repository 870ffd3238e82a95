"""The texts of a request, in none of which a NUL is allowed: those of its address, headers, forms and JSON objects.

PostgreSQL stores no text with a NUL, SQLite does, and other programs end a text there: a hub could compare one text and keep
another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs

from starlette.types import Scope

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import UsageError

_NUL = "\0"


def check_scope(scope: Scope) -> None:
    """Check the address and the headers of a request, whose path is decoded. UsageError for a NUL."""
    in_headers = any(b"\0" in value for _, value in scope["headers"])
    if _NUL in scope["path"] or b"%00" in scope["query_string"] or b"\0" in scope["query_string"] or in_headers:
        raise _nul_error("request")


def check_texts(texts: Iterable[str], location: str) -> None:
    """Check texts that arrive in another way, such as the fields of a form with files. UsageError for a NUL."""
    if any(_NUL in text for text in texts):
        raise _nul_error(location)


def parse_object(raw: bytes, location: str, *, memory: int = json_file.MAX_MEMORY) -> dict[str, Any]:
    """Parse a JSON object, which takes at most `memory` bytes. FormatError for anything else, UsageError for a NUL."""
    document = json_file.parse_object(raw, location, memory=memory)
    # JSON has a NUL as this escape only, which may also be a backslash before u0000.
    if b"\\u0000" in raw:
        check_texts(_texts(document), location)
    return document


def parse_form(raw: bytes, max_fields: int) -> dict[str, list[str]]:
    """Parse a form, which may have several values for a field. UsageError for a NUL, or too many fields."""
    try:
        fields = parse_qs(raw.decode("utf-8", "replace"), max_num_fields=max_fields)
    except ValueError as error:
        raise UsageError("form", f"more than {max_fields:,} fields") from error
    check_texts((text for key, values in fields.items() for text in (key, *values)), "form")
    return fields


def _texts(document: Any) -> Iterable[str]:
    """Yield the texts in a JSON document, those of its keys too."""
    pending = [document]  # no recursion: a document may be as deep as its parser allows
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value


def _nul_error(location: str) -> UsageError:
    return UsageError(location, "has a NUL character", "Leave it out")
