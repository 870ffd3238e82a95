"""Limits of the tokens of a key in a day and in a month of the calendar (UTC)."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

from adapterhub_converters.containers.json_file import is_integer
from adapterhub_converters.lazy_dataclass import dataclass

from .openai_errors import BUSY, ProblemError

NAMES = ("tokens_per_day", "tokens_per_month")
_MAX_TOKENS = 10**15  # tokens


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, slots=True)
class CalendarBudget:
    """The tokens that a key may use; 0 for no limit."""

    per_day: int = 0
    per_month: int = 0

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> CalendarBudget | None:
        """Read the limits of a key; None if it has none. ValueError with the name of a malformed one."""
        for name in NAMES:
            count = table.get(name, 1)
            if not is_integer(count) or not 0 < count <= _MAX_TOKENS:
                raise ValueError(name)
        per_day, per_month = (table.get(name, 0) for name in NAMES)
        return cls(per_day, per_month) if per_day or per_month else None

    def check(self, day_tokens: int, month_tokens: int, now: Callable[[], datetime.datetime] = _now) -> None:
        """Raise ProblemError if the tokens of this day or of this month are used up, with the seconds until the next."""
        if self.per_month and month_tokens >= self.per_month:
            # From the 28th, four days on are in the next month.
            next_month = (now().replace(day=28) + datetime.timedelta(days=4)).replace(day=1)
            raise _used_up(self.per_month, "this month", next_month, now())
        if self.per_day and day_tokens >= self.per_day:
            raise _used_up(self.per_day, "today", now() + datetime.timedelta(days=1), now())


def _used_up(limit: int, period: str, next_day: datetime.datetime, now: datetime.datetime) -> ProblemError:
    begin = next_day.replace(hour=0, minute=0, second=0, microsecond=0)
    seconds = int((begin - now).total_seconds()) + 1
    return ProblemError(429, f"More than {limit} tokens {period} (UTC)", code=BUSY, seconds=seconds)
