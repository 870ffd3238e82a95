"""Log lines as JSON: one object per line, with the fields of a request's record (`fields`) as fields of its own.

No line has a query, which may include a signature, or a body. Whatever looks like a token is redacted as well, because a client
may have put one into a path.
"""

from __future__ import annotations

import datetime
import json
import logging

from adapterhub_converters import safe_regex
from adapterhub_converters.display import printable

_BEGIN = "hf_"  # of a token
_TOKEN = safe_regex.Pattern(_BEGIN + r"[A-Za-z0-9]{16,}")


def redact_tokens(text: str) -> str:
    """Return a text with each token cut to its first characters, by which lists name it."""
    return _TOKEN.sub(lambda match: f"{match[0][:8]}…", text) if _BEGIN in text else text


class JsonLines(logging.Formatter):
    """A formatter of log records: one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        timestamp = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        fields = {"time": timestamp.replace("+00:00", "Z"), "level": record.levelname.lower(), "message": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        # Redact the finished line: a token may be in any field, and in the traceback.
        return redact_tokens(json.dumps(fields, ensure_ascii=False))


class PlainLines(logging.Formatter):
    """A formatter of log records as plain text."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, with the lines of its traceback."""
        return "\n".join(printable(redact_tokens(line)) for line in super().format(record).split("\n"))


def log_to_stderr(name: str, *, as_json: bool) -> None:
    """Write the log lines of a logger and its children to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
