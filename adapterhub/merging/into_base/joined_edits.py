"""Edits of several adapters joined by a method that is not a sum, such as TIES: one edit of the rows that they all change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from adapterhub.analysis.low_rank import Factors
from adapterhub_converters.adapter import Adapter, LowRankEmbedding
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import AddLowRank, Apply, Edit, F32Array, Within

Span = tuple[int, int] | None
"""First row and number of rows; None for all."""


class Join(Protocol):
    """A method that merges the deltas of one matrix."""

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters with parts that the method cannot merge; the error names the part."""

    def __call__(self, target: str, terms: Sequence[Factors | None]) -> Callable[[int, int], F32Array]:
        """Return a function that computes rows, from a first to a last, of the merged matrix."""


@dataclass(frozen=True, eq=False)
class AddJoined:
    """Add a method's merge of the deltas of several adapters; None for an adapter that does not change these rows."""

    target: str
    deltas: Sequence[AddLowRank | None]
    join: Join

    @cached_property
    def _rows(self) -> Callable[[int, int], F32Array]:
        return self.join(self.target, [None if edit is None else _factors(edit) for edit in self.deltas])

    def ready(self, dtype: np.dtype) -> Apply:
        """Return the addition."""
        rows = self._rows

        def apply(tile: F32Array, start: int, scratch: F32Array) -> None:
            tile += rows(start, start + len(tile))

        return apply


def join_edits(edits_by_adapter: Sequence[Mapping[str, Sequence[Edit]]], join: Join) -> dict[str, tuple[Edit, ...]]:
    """Join the edits of all adapters, by tensor.

    Raises:
        RefusedError: An edit is not a plain delta, or two adapters change different rows that overlap.
    """
    names = dict.fromkeys(name for edits in edits_by_adapter for name in edits)
    return {name: tuple(_join_tensor(name, [edits.get(name, ()) for edits in edits_by_adapter], join)) for name in names}


def _join_tensor(name: str, edits_by_adapter: Sequence[Sequence[Edit]], join: Join) -> list[Edit]:
    """Return the joined edits of one tensor, one for each range of rows."""
    spans: dict[Span, list[AddLowRank | None]] = {}
    for number, edits in enumerate(edits_by_adapter):
        for edit in edits:
            inner, span = (edit.edit, (edit.first, edit.count)) if isinstance(edit, Within) else (edit, None)
            span_deltas = spans.setdefault(span, [None] * len(edits_by_adapter))
            if not isinstance(inner, AddLowRank) or span_deltas[number] is not None:
                raise RefusedError(name, "an adapter does more than add one delta to it", "Merge into an adapter first")
            span_deltas[number] = inner
    _refuse_overlaps(name, spans)
    target, joined_edits = name.removesuffix(".weight"), list[Edit]()
    for span, deltas in spans.items():
        edit = AddJoined(target if span is None else f"{target}[{span[0]}]", deltas, join)
        joined_edits.append(edit if span is None else Within(edit, *span))
    return joined_edits


def _refuse_overlaps(name: str, spans: Mapping[Span, object]) -> None:
    """Refuse ranges that overlap without being equal: the method needs all deltas of a range at once."""
    end = 0
    for span in sorted(span or (0, 1 << 62) for span in spans):
        if span[0] < end:
            raise RefusedError(name, "the adapters change different parts of it that overlap", "Merge into an adapter first")
        end = sum(span)


def _factors(edit: AddLowRank) -> Factors:
    """Return the delta as the base stores it, with its scale."""
    delta = edit.delta
    swap = edit.transposed or isinstance(delta, LowRankEmbedding)
    left, right = (delta.lora_A.T, delta.lora_B.T) if swap else (delta.lora_B, delta.lora_A)
    return Factors(left.astype(np.float64) * edit.scale, right.astype(np.float64))
