"""From documents to rows of tokens: what shares a row, what is held out, what is refused, and in which order rows come.

Documents share rows but do not see each other: positions begin at 0 with each document, which is how transformers tells
them apart (`masking_utils.py`, `find_packed_sequence_indices`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.train.config import TrainConfig
from adapterhub_converters.errors import RefusedError

from . import documents as sources
from .examples import Example, encode

IGNORED = -100
"""The label of a position whose next token isn't learned."""


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

    @property
    def label_tokens(self) -> int:
        """How many tokens are predicted and learned."""
        return int((self.labels != IGNORED).sum())


def lengths(labels: np.ndarray) -> np.ndarray:
    """Tokens of each row of `labels` up to its last label, `(rows,)`: what stands behind changes no number."""
    learned = labels != IGNORED
    return np.where(learned.any(axis=1), labels.shape[1] - learned[:, ::-1].argmax(axis=1), 0)


@dataclass(frozen=True)
class File:
    """One file of a data set: `size` in bytes."""

    path: str
    digest: str
    size: int
    documents: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows, and the files they were made of; `notes` are what is worth saying, one line each.

    Attributes:
        digests: Of the documents, to see whether another set has the same.
        truncated: Documents longer than a row, which were cut.
    """

    rows: Rows
    files: tuple[File, ...]
    notes: tuple[str, ...] = ()
    digests: frozenset[bytes] = frozenset()
    truncated: int = 0

    @property
    def documents(self) -> int:
        """How many examples there are."""
        return sum(file.documents for file in self.files)

    @property
    def tokens(self) -> int:
        """How many tokens they have, prompts included."""
        return sum(file.tokens for file in self.files)


def datasets(config: TrainConfig, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """What is learned, and what is held out: files of its own, a share of the documents, or nothing."""
    words, share = config.data, config.data.heldout_share

    def made(names: Sequence[str], seed: int | None, keep: Callable[[sources.Document], bool]) -> Dataset:
        paths = [config.resolve(name) for name in names]
        where = f"{config.where}: [data] heldout_share" if share else ""
        return load(
            paths, tokenizer, sequence=words.sequence, loss=words.loss, seed=seed, pack_rows=words.pack, keep=keep, where=where
        )

    train_set = made(words.train, config.train.seed, lambda document: not held_out(document, share))
    if share:
        return train_set, made(words.train, None, lambda document: held_out(document, share))
    return train_set, made(words.heldout, None, lambda _: True) if words.heldout else None


def held_out(document: sources.Document, share: float) -> bool:
    """Whether a document belongs to the held-out share: by its digest, so that a copy of it does too, and the same
    document does whatever else is in the data."""
    return int.from_bytes(document.digest[:8], "big") < share * 2**64


def overlap(train_set: Dataset, heldout: Dataset | None) -> list[str]:
    """A line if documents are on both sides."""
    shared = len(train_set.digests & heldout.digests) if heldout else 0
    return [f"{shared} held-out documents are also trained on: its perplexity proves nothing"] if shared else []


def load(
    paths: Sequence[Path],
    tokenizer: Any,
    *,
    sequence: int,
    loss: str,
    seed: int | None,
    pack_rows: bool = True,
    keep: Callable[[sources.Document], bool] = lambda _: True,
    where: str = "",
) -> Dataset:
    """The rows of some files; documents that `keep` takes, in the order of `seed`, or as they stand for None.

    `where` stands in the message if there is nothing to learn; else the files do.

    Raises:
        FormatError: A document isn't of a kind that is known.
        RefusedError: Nothing in the data would be learned.
    """
    files: list[File] = []
    examples: list[Example] = []
    digests: set[bytes] = set()
    for path in paths:
        source = sources.read(path)
        kept = [document for document in source.documents if keep(document)]
        found = [encode(document.record, tokenizer, loss=loss, where=document.where) for document in kept]
        tokens = sum(len(example.ids) for example in found)
        files.append(File(source.name, source.digest, source.size, len(found), tokens))
        digests |= {document.digest for document in kept}
        examples += found
    if seed is not None:
        shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(examples))
        examples = [examples[number] for number in shuffled]
    full = [example for example in examples if len(example.ids)]
    rows = pack(full, sequence) if pack_rows else _filled([_segments(example, sequence) for example in full], sequence)
    if not rows.label_tokens:
        raise _nothing(full, sequence, where or ", ".join(map(str, paths)))
    cut = sum((example.joint or not pack_rows) and len(example.ids) > sequence for example in examples)
    notes = tuple(_notes(examples, cut, sequence, tokenizer))
    return Dataset(rows, tuple(files), notes, frozenset(digests), cut)


def _nothing(examples: list[Example], sequence: int, where: str) -> RefusedError:
    if any(example.learned.any() for example in examples):
        what = f"no token would be learned: what is to be learned lies behind the first {sequence} tokens of every document"
        return RefusedError(where, what, "Raise [data] sequence")
    reason = "all documents are prompts" if examples else "there are no documents"
    return RefusedError(where, f"no token would be learned: {reason}")


def _notes(examples: list[Example], cut: int, sequence: int, tokenizer: Any) -> Iterator[str]:
    learned, tokens = (sum(map(len, ids)) for ids in ([e.ids[e.learned] for e in examples], [e.ids for e in examples]))
    if cut:
        share = f"{cut / len(examples):.0%}"
        yield f"{cut} of {len(examples)} examples ({share}) are longer than {sequence} tokens and were cut there"
        lost = sum(e.joint and e.learned.any() and not e.learned[:sequence].any() for e in examples)
        if lost:
            yield f"of {lost} of {len(examples)} examples nothing is learned: the answers come after token {sequence}"
    if learned < tokens:
        yield f"{learned / tokens:.0%} of {tokens} tokens are learned, the others only read"
    stops = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    endless = sum(not any(token in stops for token in example.ids[example.learned][-3:].tolist()) for example in examples)
    if endless == len(examples) and stops:
        yield f"the stop token {tokenizer.eos_token!r} is never learned: a model trained on this does not learn to end"
    elif endless and stops:
        yield f"{endless} of {len(examples)} examples do not end with a stop token that is learned"


Segment = tuple[np.ndarray, np.ndarray]
"""Ids and learned of what lies together in a row."""


def pack(examples: Sequence[Example], sequence: int) -> Rows:
    """Rows of `sequence` tokens: running text end to end, other examples whole, first fit, the longest first."""
    whole = _whole([e for e in examples if e.joint], sequence)
    return _filled([*_running([e for e in examples if not e.joint], sequence), *whole], sequence)


def _segments(example: Example, sequence: int) -> list[Segment]:
    return [(example.ids[:sequence], example.learned[:sequence])]


def _filled(rows: Sequence[Sequence[Segment]], sequence: int) -> Rows:
    shape = (len(rows), sequence)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, segments in enumerate(rows):
        at = 0
        for segment, learned in segments:
            end = at + len(segment)
            ids[row, at:end] = segment
            positions[row, at:end] = np.arange(len(segment))
            labels[row, at : end - 1] = np.where(learned[1:], segment[1:], IGNORED)
            at = end
        positions[row, at:] = np.arange(sequence - at)
    return Rows(ids, labels, positions)


def _running(examples: Sequence[Example], sequence: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    free = 0
    for example in examples:
        start = 0
        while start < len(example.ids):
            if not free:
                rows.append([])
                free = sequence
            end = min(start + free, len(example.ids))
            rows[-1].append((example.ids[start:end], example.learned[start:end]))
            free -= end - start
            start = end
    return rows


def _whole(examples: Sequence[Example], sequence: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    free: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        segment = (example.ids[:sequence], example.learned[:sequence])
        size = len(segment[0])
        row = next((number for number, room in enumerate(free) if room >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(sequence)
        rows[row].append(segment)
        free[row] -= size
    return rows


def some(rows: Rows, tokens: int) -> Rows:
    """Rows evenly from all of them, as many as hold about `tokens` tokens; all if they hold no more."""
    count = max(1, tokens // rows.ids.shape[1])
    if count >= len(rows):
        return rows
    chosen = np.arange(count) * len(rows) // count
    return Rows(rows.ids[chosen], rows.labels[chosen], rows.positions[chosen])


def order(rows: int, needed: int, seed: int, *, sizes: np.ndarray | None = None, together: int = 1) -> np.ndarray:
    """Row numbers for `needed` draws: every row once, in an order of its own, before any comes again.

    With their `sizes`, those `together` in a step are about as long as each other: of every 50 steps' rows the longest
    come together first, and then the steps are shuffled (transformers' `LengthGroupedSampler` leaves them sorted).
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
    # What is left over for a last step stays last, or every step after it would be cut in two.
    whole = [steps[number] for number in generator.permutation(len(ordered) // together)]
    return np.concatenate([*whole, *steps[len(whole) :]])
