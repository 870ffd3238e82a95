"""Ages and times as options take them: `12h`, `7d`, `2w`, or a date."""

from __future__ import annotations

import datetime
import time

from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError

_AGE = safe_regex.Pattern(r"([0-9]{1,5})([hdw])")
_SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}


def parse_age(option: str, text: str) -> int:
    """Return the seconds of an age."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(option, f"{text[:40]!r} is not an age", "Write it like 12h, 7d or 2w")
    return int(match[1]) * _SECONDS[match[2]]


def parse_since(text: str, now: float | None = None) -> int:
    """Return the time, in seconds of Unix time, that an age or a date such as `2026-11-30` (UTC) means."""
    if _AGE.fullmatch(text):
        return int(time.time() if now is None else now) - parse_age("", text)
    try:
        day = datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UsageError(text[:40], "is neither an age nor a date", "Write it like 7d, 12h, 2w or 2026-11-30") from error
    return int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp())
