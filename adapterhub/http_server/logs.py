"""Log lines as JSON: one object a line, with what a request's line knows as fields of its own: the record's `fields`.

No line has a query, which may have a signature, or a body. Whatever looks like a token is blotted out all the same, since a
client may have written one into a path.
"""

from __future__ import annotations

import datetime
import json
import logging

from adapterhub_converters import linear
from adapterhub_converters.display import printable

_TOKEN = linear.Pattern(r"hf_[A-Za-z0-9]{16,}")


def blotted(text: str) -> str:
    """A text without tokens, except for the first characters of one, by which lists name it."""
    return _TOKEN.sub(lambda found: f"{found[0][:8]}…", text)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        found = {"time": moment.replace("+00:00", "Z"), "level": record.levelname.lower(), "message": record.getMessage()}
        found |= getattr(record, "fields", {})
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return blotted(json.dumps(found, ensure_ascii=False))


class PlainLines(logging.Formatter):
    """A line to read."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record, and the lines of its traceback."""
        return "\n".join(printable(blotted(line)) for line in super().format(record).split("\n"))


def to_stderr(name: str, *, as_json: bool) -> None:
    """Write the lines of a logger, and of those below it, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
