"""The fields of a JSON object that a hub sent, each read as a value of one type, and the kinds of errors that it names.

A value of another type is a FormatError. Texts may contain anything, as in an adapter.json; commands show them as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from adapterhub.digest import Digest, is_hex
from adapterhub.ref import RefError, is_tag, parse_name
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    UsageError,
)

T = TypeVar("T")
ERROR_KINDS: Mapping[str, type[AdapterhubError]] = {
    "not-found": NotFoundError,
    "conflict": ConflictError,
    "refused": RefusedError,
    "integrity": IntegrityError,
    "usage": UsageError,
}
"""The `kind` of an error in an answer, and its class; the first that fits."""
DENIED = "denied"
"""The `kind` of an error about a role that the client lacks."""
_MAX_NUMBER = 2**53  # JSON numbers are exact up to there in every program


class Fields:
    """The fields of a JSON object that another program sent; each method raises FormatError for a value of the wrong type."""

    def __init__(self, value: object, location: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(location, "the hub's answer is not of its API")
        self.values, self.location = value, location

    def error(self, key: str) -> FormatError:
        """Return the error for a field that is missing or not valid."""
        return FormatError(self.location, f"the hub's answer has no valid {key!r}")

    def value(self, key: str, *kinds: type) -> Any:
        """Return the value of a field, which is of one of `kinds`."""
        value = self.values.get(key)
        # Not isinstance: `true` is no number, although Python counts it as one.
        if type(value) not in kinds:
            raise self.error(key)
        return value

    def text(self, key: str) -> str:
        """Return a text."""
        return str(self.value(key, str))

    def optional_text(self, key: str) -> str | None:
        """Return a text; None for null."""
        value: str | None = self.value(key, str, type(None))
        return value

    def count(self, key: str) -> int:
        """Return a number that counts something: an integer, not negative."""
        value: int = self.value(key, int)
        if not 0 <= value < _MAX_NUMBER:
            raise self.error(key)
        return value

    def optional_count(self, key: str) -> int | None:
        """Return a count; None for null or without the field."""
        return None if self.values.get(key) is None else self.count(key)

    def optional_number(self, key: str) -> float | None:
        """Return a number; None for null."""
        value: float | None = self.value(key, int, float, type(None))
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts."""
        return self._items(key, str)

    def counts(self, key: str) -> tuple[int, ...]:
        """Return a list of integers."""
        return self._items(key, int)

    def _items(self, key: str, kind: type[T]) -> tuple[T, ...]:
        items = self.value(key, list)
        if any(type(item) is not kind for item in items):
            raise self.error(key)
        return tuple(items)

    def objects(self, key: str) -> Iterator[Fields]:
        """Yield the fields of each object of a list."""
        yield from (Fields(item, self.location) for item in self.value(key, list))

    def object(self, key: str) -> Fields:
        """Return the fields of an object."""
        return Fields(self.values.get(key), self.location)

    def name(self, key: str) -> str:
        """Return the name of an adapter."""
        try:
            return parse_name(self.text(key), self.location)
        except RefError as error:
            raise self.error(key) from error

    def digest(self, key: str) -> Digest:
        """Return a digest."""
        digest = self.text(key)
        if not digest.startswith("sha256:") or not is_hex(digest[7:]):
            raise self.error(key)
        return digest

    def tags(self, key: str) -> tuple[str, ...]:
        """Return a list of tags."""
        tags = self.texts(key)
        if not all(map(is_tag, tags)):
            raise self.error(key)
        return tags
