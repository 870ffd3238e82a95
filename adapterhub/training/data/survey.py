"""Look over the data of a training without training on them: what they are, how many tokens, how many steps.

Every file is read and checked. Tokens are counted in all documents, or of large data in some, evenly from all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.training.config import TrainConfig

from . import dataset
from .documents import DataFile, Document

_DOCUMENTS, _CHARACTERS = 2_000, 4_000_000  # to encode at most: seconds


@dataclass(frozen=True)
class Surveyed:
    """One file or folder: what its documents are and how many, for people."""

    path: str
    split: str
    contents: str
    documents: int
    size: int


@dataclass(frozen=True)
class Count:
    """What tokens and steps the training documents make.

    Attributes:
        tokens: Of all training documents, prompts included.
        trained: How many of them are trained on.
        read: How many a pass over the rows reads: less where documents are cut, never with padding.
        rows: Of `sequence` tokens.
        share: The share of the text that was encoded: below 1, the numbers are estimates from it.
    """

    tokens: int
    trained: int
    read: int
    rows: int
    steps: int
    steps_per_epoch: int
    share: float


@dataclass(frozen=True)
class Survey:
    """The data of a training; `count` is None where there is no tokenizer to count with. `notes` are one line each."""

    files: tuple[Surveyed, ...]
    documents: int
    heldout_documents: int
    count: Count | None
    notes: tuple[str, ...]


def survey(config: TrainConfig, tokenizer: Any | None) -> Survey:
    """Look over the data of a training; errors are those of `dataset.datasets`, but for documents that are not encoded."""
    train, heldout = dataset.files(config)
    found = [(file, "train") for file in train] + [(file, "heldout") for file in heldout]
    count, notes = _count(config, train, tokenizer) if tokenizer is not None else (None, [])
    return Survey(
        files=tuple(_surveyed(file, split) for file, split in found),
        documents=sum(len(file.documents) for file in train),
        heldout_documents=sum(len(file.documents) for file in heldout),
        count=count,
        notes=tuple(notes),
    )


def _surveyed(file: DataFile, split: str) -> Surveyed:
    return Surveyed(file.name, split, file.contents, len(file.documents), file.size)


def _count(config: TrainConfig, files: Sequence[DataFile], tokenizer: Any) -> tuple[Count, list[str]]:
    data = config.data
    sample, share = _sample([document for file in files for document in file.documents])
    examples = [example for example in dataset.encode_all(sample, tokenizer, loss=data.loss) if len(example.ids)]
    rows = dataset.layout(examples, data.sequence, pack_rows=data.pack)
    labels = [int(trained[1:].sum()) for row in rows for _, trained in row]
    if not sum(labels) and share == 1:
        raise dataset.nothing(examples, data.sequence, ", ".join(file.name for file in files))

    def whole(number: int) -> int:
        return round(number / share)

    row_count = max(1, whole(len(rows)))
    count = Count(
        tokens=whole(sum(len(example.ids) for example in examples)),
        trained=whole(sum(labels)),
        read=whole(sum(len(ids) for row in rows for ids, _ in row)),
        rows=row_count,
        steps=config.steps(row_count),
        steps_per_epoch=-(row_count // -config.train.rows),
        share=share,
    )
    cut = dataset.truncated(examples, data.sequence, pack_rows=data.pack)
    return count, [*dataset.template_notes(files, tokenizer), *dataset.learning_notes(examples, cut, data.sequence, tokenizer)]


def _sample(documents: Sequence[Document]) -> tuple[list[Document], float]:
    """Return documents to encode, evenly from all, with texts no longer than needed; and their share of all the text."""
    sizes = [document.length for document in documents]
    step = max(-(len(documents) // -_DOCUMENTS), -(sum(sizes) // -_CHARACTERS), 1)
    chosen = [_shortened(document, _CHARACTERS) for document in documents[::step]]
    share = sum(document.length for document in chosen) / max(1, sum(sizes))
    return chosen, share or 1.0


def _shortened(document: Document, length: int) -> Document:
    if document.shape != "text" or document.length <= length:
        return document
    return dataclasses.replace(document, record={"text": document.record["text"][:length]})
