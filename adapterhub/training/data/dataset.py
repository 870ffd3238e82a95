"""From documents to rows of tokens: held-out documents, sequence packing, and the order of rows.

Documents share rows but do not see each other: positions begin at 0 with each document, by which transformers separates
them (`masking_utils.py`, `find_packed_sequence_indices`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.training.config import TrainConfig
from adapterhub_converters.errors import RefusedError

from . import documents
from .examples import Example, encode

IGNORED = -100
"""The label of a position whose next token is not trained on."""


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
        """The number of tokens with a loss."""
        return int((self.labels != IGNORED).sum())


def lengths(labels: np.ndarray) -> np.ndarray:
    """Return the tokens of each row of `labels` up to its last label, `(rows,)`: padding behind it changes no number."""
    labeled = labels != IGNORED
    return np.where(labeled.any(axis=1), labels.shape[1] - labeled[:, ::-1].argmax(axis=1), 0)


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
    """Rows, and the files they were made of.

    Attributes:
        notes: For the user, one line each.
        digests: Of the documents, to find those that another set has too.
        truncated: The number of documents longer than a row, which were cut.
    """

    rows: Rows
    files: tuple[File, ...]
    notes: tuple[str, ...] = ()
    digests: frozenset[bytes] = frozenset()
    truncated: int = 0

    @property
    def documents(self) -> int:
        """The number of documents."""
        return sum(file.documents for file in self.files)

    @property
    def tokens(self) -> int:
        """The number of their tokens, prompts included."""
        return sum(file.tokens for file in self.files)


def datasets(config: TrainConfig, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Return the training data and the held-out data: files of its own, a share of the documents, or None."""
    options, share = config.data, config.data.heldout_share

    def loaded(names: Sequence[str], seed: int | None, keep: Callable[[documents.Document], bool]) -> Dataset:
        return load(
            [config.resolve(name) for name in names],
            tokenizer,
            sequence=options.sequence,
            loss=options.loss,
            seed=seed,
            pack_rows=options.pack,
            keep=keep,
            where=f"{config.where}: [data] heldout_share" if share else "",
        )

    train_set = loaded(options.train, config.train.seed, lambda document: not held_out(document, share))
    if share:
        return train_set, loaded(options.train, None, lambda document: held_out(document, share))
    return train_set, loaded(options.heldout, None, lambda _: True) if options.heldout else None


def held_out(document: documents.Document, share: float) -> bool:
    """Return whether a document belongs to the held-out share.

    Its digest decides, so that copies of it are held out too, and so is the same document among other data.
    """
    return int.from_bytes(document.digest[:8], "big") < share * 2**64


def overlap(train_set: Dataset, heldout: Dataset | None) -> list[str]:
    """Return a note if documents are in both sets."""
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
    keep: Callable[[documents.Document], bool] = lambda _: True,
    where: str = "",
) -> Dataset:
    """Load the rows of some files.

    Args:
        sequence: Tokens in a row.
        loss: `all` or `completion`.
        seed: Of the order of documents; None keeps that of the files.
        pack_rows: Let documents share rows.
        keep: Return whether a document is used.
        where: The place in the error for data without labels; the files by default.

    Raises:
        FormatError: A document has none of the known shapes.
        RefusedError: Nothing in the data would be trained on.
    """
    files: list[File] = []
    examples: list[Example] = []
    digests: set[bytes] = set()
    for path in paths:
        file = documents.read(path)
        used = [document for document in file.documents if keep(document)]
        encoded = [encode(document.record, tokenizer, loss=loss, where=document.where) for document in used]
        tokens = sum(len(example.ids) for example in encoded)
        files.append(File(file.name, file.digest, file.size, len(encoded), tokens))
        digests |= {document.digest for document in used}
        examples += encoded
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
    if any(example.trained.any() for example in examples):
        what = f"no token to train on: the answers come after the first {sequence} tokens of every document"
        return RefusedError(where, what, "Raise [data] sequence")
    reason = "all documents are prompts" if examples else "there are no documents"
    return RefusedError(where, f"no token to train on: {reason}")


def _notes(examples: list[Example], cut: int, sequence: int, tokenizer: Any) -> Iterator[str]:
    trained, tokens = (sum(map(len, ids)) for ids in ([e.ids[e.trained] for e in examples], [e.ids for e in examples]))
    if cut:
        share = f"{cut / len(examples):.0%}"
        yield f"{cut} of {len(examples)} examples ({share}) are longer than {sequence} tokens and were cut there"
        lost = sum(e.joint and e.trained.any() and not e.trained[:sequence].any() for e in examples)
        if lost:
            yield f"nothing of {lost} of {len(examples)} examples is trained on: the answers come after token {sequence}"
    if trained < tokens:
        yield f"{trained / tokens:.0%} of {tokens} tokens are trained on, the others are context"
    stops = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    endless = sum(not any(token in stops for token in example.ids[example.trained][-3:].tolist()) for example in examples)
    if endless == len(examples) and stops:
        yield f"the stop token {tokenizer.eos_token!r} is never trained on: the model will not learn to end its answers"
    elif endless and stops:
        yield f"{endless} of {len(examples)} examples do not end with a stop token that is trained on"


Segment = tuple[np.ndarray, np.ndarray]
"""Ids, and which of them are trained on, of a document or a part of it in a row."""


def pack(examples: Sequence[Example], sequence: int) -> Rows:
    """Pack examples into rows of `sequence` tokens: running text end to end, others whole, first fit, the longest first."""
    whole = _whole([e for e in examples if e.joint], sequence)
    return _filled([*_running([e for e in examples if not e.joint], sequence), *whole], sequence)


def _segments(example: Example, sequence: int) -> list[Segment]:
    return [(example.ids[:sequence], example.trained[:sequence])]


def _filled(rows: Sequence[Sequence[Segment]], sequence: int) -> Rows:
    shape = (len(rows), sequence)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, segments in enumerate(rows):
        at = 0
        for segment, trained in segments:
            end = at + len(segment)
            ids[row, at:end] = segment
            positions[row, at:end] = np.arange(len(segment))
            labels[row, at : end - 1] = np.where(trained[1:], segment[1:], IGNORED)
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
            rows[-1].append((example.ids[start:end], example.trained[start:end]))
            free -= end - start
            start = end
    return rows


def _whole(examples: Sequence[Example], sequence: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    free: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        segment = (example.ids[:sequence], example.trained[:sequence])
        size = len(segment[0])
        row = next((number for number, room in enumerate(free) if room >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(sequence)
        rows[row].append(segment)
        free[row] -= size
    return rows


def sample(rows: Rows, tokens: int) -> Rows:
    """Return rows with about `tokens` tokens, evenly from all of them; all rows if they have no more."""
    count = max(1, tokens // rows.ids.shape[1])
    if count >= len(rows):
        return rows
    chosen = np.arange(count) * len(rows) // count
    return Rows(rows.ids[chosen], rows.labels[chosen], rows.positions[chosen])


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
