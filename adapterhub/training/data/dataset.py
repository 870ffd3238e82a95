"""From documents to rows of tokens: held-out documents, sequence packing, and the order of rows.

Documents share rows but do not see each other: positions begin at 0 with each document, by which transformers separates
them (`masking_utils.py`, `find_packed_sequence_indices`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterhub.training.config import TrainConfig
from adapterhub_converters.errors import FormatError, Problems, RefusedError

from . import documents, shapes
from .examples import Example, encode, has_chat_template

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


def tokens_read(labels: np.ndarray) -> int:
    """Return the tokens that a step over rows reads: prompts count, and padding does not."""
    read = lengths(labels)
    return int(read.sum() + np.count_nonzero(read))  # the last token predicts nothing


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
    train, heldout = files(config)

    def made(files: Sequence[documents.DataFile], seed: int | None) -> Dataset:
        data = config.data
        return build(files, tokenizer, sequence=data.sequence, loss=data.loss, seed=seed, pack_rows=data.pack)

    return made(train, config.train.seed), made(heldout, None) if heldout else None


def files(config: TrainConfig) -> tuple[list[documents.DataFile], list[documents.DataFile]]:
    """Read the files to train on, and those that are held out or the held-out parts of the same."""
    data, share = config.data, config.data.heldout_share
    shapes.check_columns(data.columns, f"{config.where}: [data] columns")
    options = documents.Options(data.columns, data.split_text)
    train, heldout = ([documents.read(config.resolve(name), options) for name in names] for names in (data.train, data.heldout))
    if not share:
        return train, heldout
    kept, heldout = ([_part(file, share, held=held) for file in train] for held in (False, True))
    count = sum(len(file.documents) for file in train)
    if not all(any(file.documents for file in part) for part in (kept, heldout)):
        what = f"it holds out whole documents, and of {count} one part is empty"
        hint = 'Name other files in heldout; of plain text, split_text = "paragraphs" makes more documents'
        raise RefusedError(f"{config.where}: [data] heldout_share", what, hint)
    return kept, heldout


def _part(file: documents.DataFile, share: float, *, held: bool) -> documents.DataFile:
    chosen = tuple(document for document in file.documents if held_out(document, share) == held)
    return dataclasses.replace(file, documents=chosen)


def held_out(document: documents.Document, share: float) -> bool:
    """Return whether a document belongs to the held-out share.

    Its digest decides, so that copies of it are held out too, and so is the same document among other data.
    """
    return int.from_bytes(document.digest[:8], "big") < share * 2**64


def overlap(train_set: Dataset, heldout: Dataset | None) -> list[str]:
    """Return a note if documents are in both sets."""
    shared = len(train_set.digests & heldout.digests) if heldout else 0
    return [f"{shared} held-out documents are also trained on: its perplexity proves nothing"] if shared else []


def build(
    files: Sequence[documents.DataFile], tokenizer: Any, *, sequence: int, loss: str, seed: int | None, pack_rows: bool = True
) -> Dataset:
    """Make rows of documents.

    Args:
        sequence: Tokens in a row.
        loss: `all` or `completion`.
        seed: Of the order of documents; None keeps that of the files.
        pack_rows: Let documents share rows.

    Raises:
        FormatError: The chat template refuses conversations.
        RefusedError: Nothing in the data would be trained on.
    """
    used: list[File] = []
    examples: list[Example] = []
    for file in files:
        encoded = encode_all(file.documents, tokenizer, loss=loss)
        tokens = sum(len(example.ids) for example in encoded)
        used.append(File(file.name, file.digest, file.size, len(encoded), tokens))
        examples += encoded
    if seed is not None:
        shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(examples))
        examples = [examples[number] for number in shuffled]
    full = [example for example in examples if len(example.ids)]
    rows = pack(full, sequence, pack_rows=pack_rows)
    if not rows.label_tokens:
        raise nothing(full, sequence, ", ".join(file.name for file in files))
    cut = truncated(full, sequence, pack_rows=pack_rows)
    notes = (
        *(note for file in files for note in file.notes),
        *template_notes(files, tokenizer),
        *learning_notes(full, cut, sequence, tokenizer),
    )
    digests = frozenset(document.digest for file in files for document in file.documents)
    return Dataset(rows, tuple(used), notes, digests, cut)


def encode_all(found: Sequence[documents.Document], tokenizer: Any, *, loss: str) -> list[Example]:
    """Encode documents; the first refusals of the chat template at once."""
    problems: Problems[FormatError] = Problems()
    encoded = []
    for document in found:
        try:
            encoded.append(encode(document.record, tokenizer, loss=loss, where=document.where))
        except FormatError as error:
            problems.add(error)
            if problems.count == problems.SHOWN:
                break  # each costs a call of the template
    problems.check()
    return encoded


def template_notes(files: Sequence[documents.DataFile], tokenizer: Any) -> list[str]:
    """Return a note if instructions are written without a chat template."""
    instructions = any("instruction" in document.record for file in files for document in file.documents)
    plain = instructions and not has_chat_template(tokenizer)
    return ["the model has no chat template: instructions are written in the words of Alpaca"] if plain else []


def truncated(examples: Sequence[Example], sequence: int, *, pack_rows: bool) -> int:
    """Return the number of examples that are longer than a row and do not continue in the next."""
    return sum((example.joint or not pack_rows) and len(example.ids) > sequence for example in examples)


def nothing(examples: list[Example], sequence: int, where: str) -> RefusedError:
    """Return the error of examples without a token to train on."""
    if any(example.trained.any() for example in examples):
        what = f"no token to train on: the answers come after the first {sequence} tokens of every document"
        return RefusedError(where, what, "Raise [data] sequence")
    reason = "all documents are prompts" if examples else "there are no documents"
    return RefusedError(where, f"no token to train on: {reason}")


def learning_notes(examples: list[Example], cut: int, sequence: int, tokenizer: Any) -> Iterator[str]:
    """Yield what of the examples is not trained on, and which ends are not; `cut` of them are longer than a row."""
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


def pack(examples: Sequence[Example], sequence: int, *, pack_rows: bool = True) -> Rows:
    """Return the rows of `layout`, filled and padded."""
    return _filled(layout(examples, sequence, pack_rows=pack_rows), sequence)


def layout(examples: Sequence[Example], sequence: int, *, pack_rows: bool = True) -> list[list[Segment]]:
    """Return the rows of `sequence` tokens that examples fill.

    Packed: running text end to end, others whole, first fit, the longest first. Otherwise each example has a row.
    """
    if not pack_rows:
        return [_segments(example, sequence) for example in examples]
    whole = _whole([e for e in examples if e.joint], sequence)
    return [*_running([e for e in examples if not e.joint], sequence), *whole]


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
