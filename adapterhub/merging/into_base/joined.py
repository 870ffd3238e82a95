"""Edits of several adapters joined by a method that is no sum, such as TIES: one edit for the rows that they all change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub_converters.adapter import Adapter, LowRankEmbedding
from adapterhub_converters.errors import RefusedError

from .edits import AddLowRank, Apply, Edit, F32Array, Within

Span = tuple[int, int] | None
"""First row and number of rows; None for all."""


class Join(Protocol):
    """A method to merge the deltas of one matrix."""

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters with parts that the method cannot merge, by name."""

    def __call__(self, target: str, terms: Sequence[Factors | None]) -> Callable[[int, int], F32Array]:
        """Return a function to the rows, from the first up to a last, of the merged matrix."""


@dataclass(frozen=True, eq=False)
class AddJoined:
    """Add what a method makes of the deltas of several adapters; None for one that does not change these rows."""

    target: str
    deltas: Sequence[AddLowRank | None]
    join: Join

    @cached_property
    def _rows(self) -> Callable[[int, int], F32Array]:
        return self.join(self.target, [None if edit is None else _factors(edit) for edit in self.deltas])

    def ready(self, dtype: np.dtype) -> Apply:
        """The sum."""
        rows = self._rows

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            tile += rows(start, start + len(tile))

        return apply


def joined(each: Sequence[Mapping[str, Sequence[Edit]]], join: Join) -> dict[str, tuple[Edit, ...]]:
    """Join the edits of every adapter, by tensor.

    Raises:
        RefusedError: An edit is no plain delta, or two adapters change different rows that overlap.
    """
    names = dict.fromkeys(name for edits in each for name in edits)
    return {name: tuple(_joined(name, [edits.get(name, ()) for edits in each], join)) for name in names}


def _joined(name: str, each: Sequence[Sequence[Edit]], join: Join) -> list[Edit]:
    spans: dict[Span, list[AddLowRank | None]] = {}
    for number, edits in enumerate(each):
        for edit in edits:
            inner, span = (edit.edit, (edit.first, edit.count)) if isinstance(edit, Within) else (edit, None)
            place = spans.setdefault(span, [None] * len(each))
            if not isinstance(inner, AddLowRank) or place[number] is not None:
                raise RefusedError(name, "an adapter does more than add one delta to it", "Merge into an adapter first")
            place[number] = inner
    _check_apart(name, spans)
    target, found = name.removesuffix(".weight"), list[Edit]()
    for span, deltas in spans.items():
        edit = AddJoined(target if span is None else f"{target}[{span[0]}]", deltas, join)
        found.append(edit if span is None else Within(edit, *span))
    return found


def _check_apart(name: str, spans: Mapping[Span, object]) -> None:
    end = 0
    for span in sorted(span or (0, 1 << 62) for span in spans):
        if span[0] < end:
            raise RefusedError(name, "the adapters change different parts of it that overlap", "Merge into an adapter first")
        end = sum(span)


def _factors(edit: AddLowRank) -> Factors:
    """The delta as the base stores it, with its scale."""
    delta = edit.delta
    swap = edit.transposed or isinstance(delta, LowRankEmbedding)
    left, right = (delta.lora_A.T, delta.lora_B.T) if swap else (delta.lora_B, delta.lora_A)
    return Factors(left.astype(np.float64) * edit.scale, right.astype(np.float64))
