"""Prices of tokens, a TOML file of the user.

currency = "EUR"                # shown with the costs

[prices."team/*"]               # the first pattern (`fnmatch`) that a version's name or the whole version matches decides
prompt = 0.20                   # for a million tokens of prompts
cached = 0.05                   # of those, for the tokens that the engine took from its cache; as `prompt` if absent
answer = 0.80                   # for a million tokens of answers
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file, toml_file
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

_NAMES = ("prompt", "cached", "answer")
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """The prices of a million tokens of prompts, of the cached part of prompts, and of answers."""

    prompt: float
    cached: float
    answer: float

    def cost(self, *, prompt_tokens: int, cached_tokens: int, answer_tokens: int) -> float:
        """Return what tokens cost; `prompt_tokens` include those from the cache."""
        uncached = prompt_tokens - cached_tokens
        return (uncached * self.prompt + cached_tokens * self.cached + answer_tokens * self.answer) / _MILLION


@dataclass(frozen=True, slots=True)
class PriceList:
    """Prices by pattern, in the order of the file."""

    prices: tuple[tuple[str, Price], ...]
    currency: str = ""

    def price_of(self, version: str) -> Price | None:
        """Return the price of a version; None if no pattern matches."""
        names = (version, version.partition("@")[0])
        return next((price for pattern, price in self.prices if any(fnmatchcase(name, pattern) for name in names)), None)


def read(path: Path) -> PriceList:
    """Read a file; UsageError for a malformed one, with the place."""
    location = str(path)
    document = toml_file.parse(json_file.read_text(path, toml_file.MAX_TOML), location)
    _check_names(document, ("currency", "prices"), location)
    currency, tables = document.get("currency", ""), document.get("prices", {})
    if not isinstance(currency, str) or len(currency) > 20 or not currency.isprintable():
        raise _invalid(f"{location}: currency", "not a short text", 'Write currency = "EUR"')
    if not isinstance(tables, dict) or not tables or not all(isinstance(table, dict) for table in tables.values()):
        raise _invalid(f"{location}: prices", "no tables of prices", 'Write [prices."team/*"]')
    return PriceList(
        tuple((pattern, _price(table, f"{location}: prices.{pattern[:80]}")) for pattern, table in tables.items()), currency
    )


def _price(table: dict[str, Any], place: str) -> Price:
    """Parse the prices of a pattern."""
    _check_names(table, _NAMES, place)
    for name in ("prompt", "answer"):
        if name not in table:
            raise _invalid(f"{place}.{name}", "is missing", "Write 0 for tokens that cost nothing")
    prompt, cached, answer = (_number(table.get(name, table["prompt"]), f"{place}.{name}") for name in _NAMES)
    return Price(prompt, cached, answer)


def _number(number: object, place: str) -> float:
    if not json_file.is_number(number) or not 0 <= number < math.inf:
        raise _invalid(place, "not a price of a million tokens", "Write a number like 0.20")
    return float(number)


def _check_names(table: dict[str, Any], allowed: tuple[str, ...], location: str) -> None:
    """Raise UsageError for a name that is not among the allowed ones."""
    for name in table:
        if name not in allowed:
            raise _invalid(f"{location}: {name[:80]}", "unknown", f"There are {', '.join(allowed)}")


def _invalid(location: str, problem: str, hint: str) -> UsageError:
    """Return the error for an invalid file."""
    return UsageError(location, problem, hint, code="invalid-config")
