"""Rows of tokens: documents share them without seeing each other, and a step takes some.

Positions begin at 0 with each document, by which transformers separates them (`masking_utils.py`,
`find_packed_sequence_indices`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .tokens import TRAINED, Tokens, ids_of

IGNORED = -100
"""The label of a position whose next token is not trained on."""
_AT_ONCE = 1 << 20  # tokens of the rows that are looked over at once


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed tokens, all int64 `(rows, sequence)`.

    Attributes:
        ids: Input tokens.
        labels: The token to predict *at* each position, or IGNORED.
        positions: Position within the document.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, numbers: np.ndarray) -> Rows:
        """Return the rows of these numbers."""
        return Rows(self.ids[numbers], self.labels[numbers], self.positions[numbers])

    def parts(self) -> Iterator[Rows]:
        """Yield these rows: they are in memory."""
        yield self

    @property
    def label_tokens(self) -> int:
        """The number of tokens with a loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def sizes(self) -> np.ndarray:
        """The tokens of each row, `lengths` of its labels."""
        return lengths(self.labels)


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows that are filled when they are taken: where their segments are among the tokens of all documents.

    Attributes:
        marked: Those tokens, as in `Tokens`.
        starts: Of segments, which are documents or parts of them, in the order of rows; `segments` are their tokens.
        bounds: The first segment of each row, and the number of all.
        sequence: Tokens in a row.
    """

    marked: np.ndarray
    starts: np.ndarray
    segments: np.ndarray
    bounds: np.ndarray
    sequence: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def take(self, numbers: np.ndarray) -> Rows:
        """Return the rows of these numbers, filled and padded."""
        shape = (len(numbers), self.sequence)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        for row, number in enumerate(numbers):
            at = 0
            for segment in range(self.bounds[number], self.bounds[number + 1]):
                size = int(self.segments[segment])
                marked = self.marked[self.starts[segment] : self.starts[segment] + size]
                end = at + size
                ids[row, at:end] = ids_of(marked)
                positions[row, at:end] = np.arange(size)
                labels[row, at : end - 1] = np.where(marked[1:] & TRAINED, ids[row, at + 1 : end], IGNORED)
                at = end
            positions[row, at:] = np.arange(self.sequence - at)
        return Rows(ids, labels, positions)

    def all(self) -> Rows:
        """Return all rows at once: 24 bytes a token."""
        return self.take(np.arange(len(self)))

    def parts(self) -> Iterator[Rows]:
        """Yield all rows in order, some at a time."""
        step = max(1, _AT_ONCE // self.sequence)
        for start in range(0, len(self), step):
            yield self.take(np.arange(start, min(start + step, len(self))))

    @property
    def sizes(self) -> np.ndarray:
        """The tokens of each row, `lengths` of its labels."""
        return np.concatenate([part.sizes for part in self.parts()])

    @cached_property
    def mean_context(self) -> float:
        """The length of the document of a token, on average over all tokens; all rows are filled for it, once."""
        return mean_context(np.concatenate([document_lengths(part) for part in self.parts()]))


def tokens_read(labels: np.ndarray) -> int:
    """Return the tokens that a step over rows reads: prompts count, and padding does not."""
    read = lengths(labels)
    return int(read.sum() + np.count_nonzero(read))  # the last token predicts nothing


def lengths(labels: np.ndarray) -> np.ndarray:
    """Return the tokens of each row of `labels` up to its last label, `(rows,)`: padding behind it changes no number."""
    labeled = labels != IGNORED
    return np.where(labeled.any(axis=1), labels.shape[1] - labeled[:, ::-1].argmax(axis=1), 0)


def mean_context(lengths_of_documents: np.ndarray) -> float:
    """Return the length of the document of a token, on average over all tokens; 0 without any."""
    sizes = lengths_of_documents.astype(np.float64)
    return float((sizes**2).sum() / sizes.sum()) if sizes.any() else 0.0


def document_lengths(rows: Rows) -> np.ndarray:
    """Return the tokens that are read of each document of `rows`, in order: padding, where no label is, is none."""
    width = rows.ids.shape[1]
    read = lengths(rows.labels)
    read = np.where(read, np.minimum(read + 1, width), 0)  # the last token predicts nothing
    starts = np.nonzero((rows.positions == 0) & (np.arange(width) < read[:, None]))
    ends = np.where(np.append(np.diff(starts[0]), 1) == 0, np.append(starts[1][1:], 0), read[starts[0]])
    return ends - starts[1]


# ---- Packing


def pack(
    tokens: Tokens, sequence: int, *, order: np.ndarray | None = None, pack_rows: bool = True, pairs: bool = False
) -> Packed:
    """Return the rows of `sequence` tokens that documents fill, those of the numbers in `order`, or all.

    Packed: each document begins a context of its own, and so does each part of running text that is longer than a row.
    Otherwise each document has a row. With `pairs`, every two documents follow each other in a row, each in half of it at
    most; a pair without anything to train on in one of them is left out.
    """
    order = np.arange(len(tokens)) if order is None else order
    if pairs:
        sides = tokens.documents["first"][order].reshape(-1, 2) < np.minimum(
            tokens.documents["length"][order].reshape(-1, 2), sequence // 2
        )
        order = order[np.repeat(sides.all(axis=1), 2)]
        sizes = np.minimum(tokens.documents["length"][order], sequence // 2)
        starts = tokens.starts[order]
    else:
        starts, sizes = _windows(tokens, order, sequence, cut=not pack_rows)
    together = 2 if pairs else 1
    units = sizes.reshape(-1, together).sum(axis=1)
    rows = _best_fit(units, sequence) if pack_rows else np.arange(len(units))
    # In a row, segments are in the order in which they came into it: the longest first.
    placed = np.argsort(-units, kind="stable") if pack_rows else np.arange(len(units))
    placed = placed[np.argsort(rows, kind="stable")]
    counts = np.bincount(rows) * together
    chosen = (placed[:, None] * together + np.arange(together)).reshape(-1)
    return Packed(tokens.marked, starts[chosen], sizes[chosen], np.concatenate([[0], np.cumsum(counts)]), sequence)


def _windows(tokens: Tokens, order: np.ndarray, sequence: int, *, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and sizes of the parts of documents that fit into a row.

    The first of each, and of running text the others too, unless `cut`.
    """
    whole = tokens.documents["length"][order]
    one = np.minimum(whole, 1)
    counts = one if cut else np.where(tokens.documents["joint"][order], one, -(whole // -sequence))
    offsets = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence
    return np.repeat(tokens.starts[order], counts) + offsets, np.minimum(np.repeat(whole, counts) - offsets, sequence)


def _best_fit(sizes: np.ndarray, sequence: int) -> np.ndarray:
    """Return the rows of units of these sizes, the longest first: each in the fullest row that has room.

    The row is found by its free tokens, not by trying all.
    """
    rows, count = np.empty(len(sizes), np.int64), 0
    with_free: defaultdict[int, list[int]] = defaultdict(list)  # as long as the units differ, not as a row is
    there_are = 0  # bit n: a row has n free tokens
    for number, size in enumerate((-np.sort(-sizes, kind="stable")).tolist()):
        fitting = there_are >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = with_free[free].pop()
            if not with_free[free]:
                there_are ^= 1 << free
        else:
            free, row = sequence, count
            count += 1
        rows[number] = row
        with_free[free - size].append(row)
        there_are |= 1 << (free - size)
    return rows


# ---- The order of rows


def sample(rows: Packed, tokens: int) -> Rows:
    """Return rows with about `tokens` tokens, evenly from all of them; all rows if they have no more."""
    count = max(1, tokens // rows.sequence)
    return rows.all() if count >= len(rows) else rows.take(np.arange(count) * len(rows) // count)


def order(rows: int, needed: int, seed: int, *, sizes: np.ndarray | None = None, together: int = 1) -> np.ndarray:
    """Return row numbers for `needed` draws: every row once, in a new order for each pass, before any is repeated.

    With their `sizes`, the rows `together` in a step have about the same length: the rows of every 50 steps are sorted by
    length, and then the steps are shuffled (transformers' `LengthGroupedSampler` leaves them sorted).
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    passes = [generator.permutation(rows) for _ in range(-(needed // -rows))]
    if sizes is not None:
        passes = [_grouped(one, sizes, together, generator) for one in passes]
    return np.concatenate(passes)[:needed]


def _grouped(numbers: np.ndarray, sizes: np.ndarray, together: int, generator: np.random.Generator) -> np.ndarray:
    size = 50 * together
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    ordered = np.concatenate([part[np.argsort(-sizes[part], kind="stable")] for part in parts])
    steps = [ordered[start : start + together] for start in range(0, len(ordered), together)]
    # An incomplete step stays last, or every step after it would be cut in two.
    whole = [steps[number] for number in generator.permutation(len(ordered) // together)]
    return np.concatenate([*whole, *steps[len(whole) :]])
