"""One weight of a base, seen from a header."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """Logical shape (numpy order) and the dtype as stored (`BF16`, `Q4_1`, …)."""

    shape: tuple[int, ...]
    dtype: str
