"""A YAML document of a stranger as a JSON value: bounded in depth, without aliases, with the scalars of JSON.

PyYAML's own loaders follow aliases, so that a few lines become gigabytes, and read `no` as false and `1:30` as 90. Here only
its parser is used (yaml.org/spec/1.2.2, "JSON Schema"): a plain scalar is null, a boolean or a number if JSON has it so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

_MAX_DEPTH = json_file.MAX_DEPTH
_MAX_NUMBER = 40  # characters


def parse(text: str, location: str) -> Any:
    """Parse the only document of a YAML text.

    Raises:
        FormatError: It is not YAML, has an alias, a tag or a duplicate key, is nested too deep, or has several documents.
    """
    import yaml  # late: most commands read no YAML

    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        return _Reader(events, location).document()
    except yaml.YAMLError as error:
        problem, mark = getattr(error, "problem", None) or type(error).__name__, getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        raise FormatError(location, f"not valid YAML ({problem}{place})") from error


class _Reader:
    """A builder of values from the events of a parser."""

    def __init__(self, events: Iterator[Any], location: str) -> None:
        self._events, self._location = events, location

    def document(self) -> Any:
        """Return the value of the only document; None for an empty text."""
        next(self._events)
        if type(next(self._events)).__name__ == "StreamEndEvent":
            return None
        value = self._value(next(self._events), 0)
        next(self._events)
        if type(next(self._events)).__name__ != "StreamEndEvent":
            raise FormatError(self._location, "has several YAML documents", "Write one list")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        kind, line = type(event).__name__, event.start_mark.line + 1
        if kind == "AliasEvent" or getattr(event, "tag", None) or getattr(event, "anchor", None):
            raise FormatError(self._location, f"line {line} has an alias, an anchor or a tag", "Write the value out")
        if depth > _MAX_DEPTH:
            raise FormatError(self._location, f"nested more than {_MAX_DEPTH} deep")
        if kind == "ScalarEvent":
            return _scalar(event.value) if event.implicit[0] and not event.style else event.value
        if kind == "SequenceStartEvent":
            return [self._value(item, depth + 1) for item in self._until("SequenceEndEvent")]
        values: dict[str, Any] = {}
        for key in self._until("MappingEndEvent"):
            if type(key).__name__ != "ScalarEvent" or key.value in values:
                problem = f"line {key.start_mark.line + 1} has a key that is not text, or is there twice"
                raise FormatError(self._location, problem)
            values[key.value] = self._value(next(self._events), depth + 1)
        return values

    def _until(self, end: str) -> Iterator[Any]:
        while type(event := next(self._events)).__name__ != end:
            yield event


def _scalar(text: str) -> Any:
    """Return a plain scalar as JSON has it, or as text."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if len(text) <= _MAX_NUMBER and (text[0].isdigit() or text[0] == "-"):
        try:
            return json_file.parse(text, "")
        except FormatError:
            return text
    return text
