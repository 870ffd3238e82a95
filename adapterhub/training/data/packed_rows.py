"""Rows of tokens, which documents share without seeing each other, and from which each step takes some.

Positions start at 0 in each document, which is how transformers separates them (`masking_utils.py`,
`find_packed_sequence_indices`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from adapterhub_converters.lazy_dataclass import dataclass

from .token_arrays import TRAINED, Tokens, ids_of

IGNORED = -100
"""The label of a position whose next token is not trained on."""
_TOKENS_AT_ONCE = 1 << 20  # in the rows that `parts` yields together


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed tokens in memory, all int64 `(rows, sequence)`.

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
        """Return the rows with these numbers."""
        return Rows(self.ids[numbers], self.labels[numbers], self.positions[numbers])

    def parts(self) -> Iterator[Rows]:
        """Yield these rows, all at once: they are in memory anyway."""
        yield self

    @property
    def label_tokens(self) -> int:
        """The number of tokens with a loss."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows that are filled only when they are taken, from segments of the tokens of all documents.

    Attributes:
        marked: The tokens of all documents, as in `Tokens`.
        starts: The start of each segment, a document or a part of one, in the order of rows; `segments` are their lengths.
        bounds: The number of the first segment of each row, followed by the number of segments.
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
        """Return the rows with these numbers, filled and padded."""
        shape = (len(numbers), self.sequence)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        for row_number, number in enumerate(numbers):
            place = 0
            for segment in range(self.bounds[number], self.bounds[number + 1]):
                size = int(self.segments[segment])
                marked = self.marked[self.starts[segment] : self.starts[segment] + size]
                end = place + size
                ids[row_number, place:end] = ids_of(marked)
                positions[row_number, place:end] = np.arange(size)
                labels[row_number, place : end - 1] = np.where(marked[1:] & TRAINED, ids[row_number, place + 1 : end], IGNORED)
                place = end
            # Padding is a document of its own, so that it does not attend to the others.
            positions[row_number, place:] = np.arange(self.sequence - place)
        return Rows(ids, labels, positions)

    def all(self) -> Rows:
        """Return all rows at once, which takes 24 bytes per token."""
        return self.take(np.arange(len(self)))

    def parts(self) -> Iterator[Rows]:
        """Yield all rows in order, about a million tokens at a time."""
        step = max(1, _TOKENS_AT_ONCE // self.sequence)
        for start in range(0, len(self), step):
            yield self.take(np.arange(start, min(start + step, len(self))))

    @cached_property
    def mean_context(self) -> float:
        """The length of a token's document, averaged over all tokens. Computed once, by filling all rows."""
        return mean_context(np.concatenate([document_lengths(batch) for batch in self.parts()]))


def tokens_read(labels: np.ndarray) -> int:
    """Return the number of tokens that a step over rows reads: prompts count, padding does not."""
    read = lengths(labels)
    return int(read.sum() + np.count_nonzero(read))  # plus the last token of each row, which is read and has no label


def lengths(labels: np.ndarray) -> np.ndarray:
    """Return the number of tokens of each row of `labels` up to its last label, `(rows,)`; padding does not change it."""
    labeled = labels != IGNORED
    return np.where(labeled.any(axis=1), labels.shape[1] - labeled[:, ::-1].argmax(axis=1), 0)


def mean_context(lengths_of_documents: np.ndarray) -> float:
    """Return the length of a token's document, averaged over all tokens; 0 without tokens."""
    sizes = lengths_of_documents.astype(np.float64)
    return float((sizes**2).sum() / sizes.sum()) if sizes.any() else 0.0


def document_numbers(rows: Rows) -> np.ndarray:
    """Return the number of each token's document in its row, `(rows, tokens)`."""
    return np.cumsum(rows.positions == 0, axis=1) - 1


def document_lengths(rows: Rows) -> np.ndarray:
    """Return the number of tokens read of each document of `rows`, in order; padding, which has no labels, does not count."""
    width = rows.ids.shape[1]
    read = lengths(rows.labels)
    read = np.where(read, np.minimum(read + 1, width), 0)  # the last token is read and has no label
    starts = np.nonzero((rows.positions == 0) & (np.arange(width) < read[:, None]))
    ends = np.where(np.append(np.diff(starts[0]), 1) == 0, np.append(starts[1][1:], 0), read[starts[0]])
    return ends - starts[1]


# ---- Packing


def pack(
    tokens: Tokens, sequence: int, *, order: np.ndarray | None = None, pack_rows: bool = True, pairs: bool = False
) -> PackedRows:
    """Return rows of `sequence` tokens, filled with the documents in `order`, or with all.

    Packed, each document starts a context of its own, and so does each part of running text that is longer than a row.
    Otherwise each document has its own row. With `pairs`, every two documents follow each other in a row, each in at most half
    of it. Documents and pairs without a label (`has_labels`) are left out.
    """
    order = np.arange(len(tokens)) if order is None else order
    labeled = has_labels(tokens.documents[order], sequence, pairs=pairs)
    order = order[np.repeat(labeled, 2) if pairs else labeled]
    if pairs:
        sizes = np.minimum(tokens.documents["length"][order], sequence // 2)
        starts = tokens.starts[order]
    else:
        starts, sizes = _row_parts(tokens, order, sequence, cut=not pack_rows)
    group_size = 2 if pairs else 1
    units = sizes.reshape(-1, group_size).sum(axis=1)
    # Without packing, every unit has the row of its number.
    rows = _best_fit(units, sequence) if pack_rows else np.arange(len(units))
    # In a row, segments are in the order in which they came into it: the longest first.
    unit_order = np.argsort(-units, kind="stable") if pack_rows else np.arange(len(units))
    unit_order = unit_order[np.argsort(rows, kind="stable")]
    counts = np.bincount(rows) * group_size
    segments = (unit_order[:, None] * group_size + np.arange(group_size)).reshape(-1)
    return PackedRows(tokens.marked, starts[segments], sizes[segments], np.concatenate([[0], np.cumsum(counts)]), sequence)


def has_labels(documents: np.ndarray, sequence: int, *, pairs: bool = False) -> np.ndarray:
    """Return for each document, or for each pair, whether a label remains of it, or of both sides, after it was cut to a row.

    A step over rows without labels would train nothing and still count.

    Args:
        documents: Lines of `Tokens.documents`.
    """
    labeled: np.ndarray = documents["first"] < np.minimum(documents["length"], sequence // 2 if pairs else sequence)
    if pairs:
        labeled = np.all(labeled.reshape(-1, 2), axis=1)
    return labeled


def _row_parts(tokens: Tokens, order: np.ndarray, sequence: int, *, cut: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and sizes of the parts of documents that fit into a row.

    They are the first part of each document, and unless `cut` the other parts of running text, except for a single token at its
    end, which has no label.
    """
    token_counts = tokens.documents["length"][order]
    at_most_one = np.minimum(token_counts, 1)
    # Running text continues in further rows; -(a // -b) rounds up.
    text_parts = np.maximum(-((token_counts - 1) // -sequence), at_most_one)
    counts = at_most_one if cut else np.where(tokens.documents["joint"][order], at_most_one, text_parts)
    offsets = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * sequence
    return np.repeat(tokens.starts[order], counts) + offsets, np.minimum(np.repeat(token_counts, counts) - offsets, sequence)


def _best_fit(sizes: np.ndarray, sequence: int) -> np.ndarray:
    """Return the row of each unit, placing the longest first and each in the fullest row that has room.

    Rows are found by their free tokens, so that not all have to be tried.
    """
    rows, count = np.empty(len(sizes), np.int64), 0
    # Keys exist only for sizes that occur, not for every size up to a row.
    rows_by_free: defaultdict[int, list[int]] = defaultdict(list)
    free_sizes = 0  # bit n is set if a row has n free tokens
    for number, size in enumerate((-np.sort(-sizes, kind="stable")).tolist()):
        fitting_sizes = free_sizes >> size
        if fitting_sizes:
            # The lowest bit set among the sizes that fit is the fullest row.
            free = size + (fitting_sizes & -fitting_sizes).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_sizes ^= 1 << free
        else:
            free, row = sequence, count
            count += 1
        rows[number] = row
        rows_by_free[free - size].append(row)
        free_sizes |= 1 << (free - size)
    return rows


# ---- The order of rows


def sample(rows: PackedRows, tokens: int) -> Rows:
    """Return rows with about `tokens` tokens, evenly spaced among all; all rows if they have no more."""
    return rows.take(sample_numbers(rows, tokens))


def sample_numbers(rows: PackedRows, tokens: int | None) -> np.ndarray:
    """Return the numbers of the rows that `sample` takes; of all rows if `tokens` is None."""
    count = len(rows) if tokens is None else max(1, tokens // rows.sequence)
    return np.arange(len(rows)) if count >= len(rows) else np.arange(count) * len(rows) // count


def order(rows: int, needed: int, seed: int) -> np.ndarray:
    """Return row numbers for `needed` draws: every row once, in a new order for each pass, before any is repeated."""
    generator = np.random.Generator(np.random.PCG64(seed))
    passes = [generator.permutation(rows) for _ in range(-(needed // -rows))]
    return np.concatenate(passes)[:needed]
