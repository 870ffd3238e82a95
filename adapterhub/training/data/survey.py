"""Look over the data of a training without training on them: what they are, how many tokens, how many steps.

Every file is read and checked. Tokens are counted in all documents, or of large data in some, evenly from all of them; held-out
documents are encoded for what is wrong with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.training.config import TrainConfig

from . import dataset, overlap
from .documents import DataFile, Document
from .rows import mean_context

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
        context: The mean length of a token's document, in the rows.
        share: The share of the text that was encoded: below 1, the numbers are estimates from it.
    """

    tokens: int
    trained: int
    read: int
    rows: int
    steps: int
    steps_per_epoch: int
    context: float
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
    if heldout and tokenizer is not None:
        _arranged(config, heldout, tokenizer)
    if heldout:
        notes = [*notes, *overlap.note(dataset.shared_passages(train, heldout))]
    return Survey(
        files=tuple(Surveyed(file.name, split, file.contents, len(file.documents), file.size) for file, split in found),
        documents=sum(len(file.documents) for file in train),
        heldout_documents=sum(len(file.documents) for file in heldout),
        count=count,
        notes=tuple(notes),
    )


def _count(config: TrainConfig, files: Sequence[DataFile], tokenizer: Any) -> tuple[Count, list[str]]:
    found, share = _arranged(config, files, tokenizer, config.data.shares)

    def whole(number: int) -> int:
        return round(number / share)

    packed = found.packed
    rows = max(1, whole(len(packed)))
    count = Count(
        tokens=whole(found.tokens),
        trained=whole(sum(part.label_tokens for part in packed.parts())),
        read=whole(int(packed.segments.sum())),
        rows=rows,
        steps=config.steps(rows),
        steps_per_epoch=-(rows // -config.train.rows),
        context=mean_context(packed.segments),
        share=share,
    )
    return count, [*found.notes]


def _arranged(
    config: TrainConfig, files: Sequence[DataFile], tokenizer: Any, shares: Sequence[float] | None = None
) -> tuple[dataset.Dataset, float]:
    """Encode documents, or of many some, and make rows of them; also returns their share of the text. Refuses as a training."""
    data = config.data
    files, share = _sample(files)
    found = dataset.encoded(files, tokenizer, loss=data.loss)
    # What the documents are is in the table.
    found = dataclasses.replace(found, notes=tuple(dataset.template_notes(files, tokenizer)))
    rows = dataset.arranged(
        found, tokenizer, sequence=data.sequence, seed=config.train.seed, pack_rows=data.pack, pairs=bool(config.preference),
        shares=shares, partial=share < 1,
    )  # fmt: skip
    return rows, share


def _sample(files: Sequence[DataFile]) -> tuple[list[DataFile], float]:
    """Return documents to encode, evenly from all, with texts no longer than needed; and their share of all the text."""
    sizes = [[document.length for document in file.documents] for file in files]
    count, characters = sum(map(len, sizes)), sum(map(sum, sizes))
    step = max(-(count // -_DOCUMENTS), -(characters // -_CHARACTERS), 1)
    chosen = [[_shortened(document, _CHARACTERS) for document in file.documents[::step]] for file in files]
    share = sum(document.length for documents in chosen for document in documents) / max(1, characters)
    return [dataclasses.replace(file, documents=tuple(some)) for file, some in zip(files, chosen, strict=True)], share or 1.0


def _shortened(document: Document, length: int) -> Document:
    if document.shape != "text" or document.length <= length:
        return document
    return dataclasses.replace(document, record={"text": document.record["text"][:length]})
