"""Ages and dates, as options take them."""

from __future__ import annotations

import pytest

from adapterhub.cli import ages
from adapterhub_converters.errors import UsageError

HOUR, DAY = 3600, 86400


@pytest.mark.parametrize(
    ("text", "seconds"), [("7d", 3 * DAY), ("2h", 10 * DAY - 2 * HOUR), ("1w", 3 * DAY), ("1970-01-03", 2 * DAY)]
)
def test_a_begin_is_an_age_or_a_date(text: str, seconds: int) -> None:
    assert ages.parse_since(text, 10 * DAY) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "yesterday", "2026-13-01", "-1d", "7d7d"])
def test_any_other_begin_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither an age nor a date"):
        ages.parse_since(text, 0)


@pytest.mark.parametrize("text", ["", "7", "2026-11-30", "1y"])
def test_an_age_is_no_date(text: str) -> None:
    with pytest.raises(UsageError, match="--ttl: .* is not an age"):
        ages.parse_age("--ttl", text)
