"""A survey of the data of a training run without training on them: their kind, the number of tokens, the number of steps.

Every file is read and checked. Tokens are counted in all documents, or in an evenly spaced sample of large data; held-out
documents are encoded only to find their problems.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.lazy_dataclass import dataclass

from . import dataset, overlap
from .document_files import DataFile, Document
from .packed_rows import mean_context

_MAX_DOCUMENTS, _MAX_CHARACTERS = 2_000, 4_000_000  # encoded within seconds


@dataclass(frozen=True)
class FileSummary:
    """One file or folder, with the kind and number of its documents for people."""

    path: str
    split: str
    contents: str
    documents: int
    size: int


@dataclass(frozen=True)
class Count:
    """The tokens and steps that the training documents amount to.

    Attributes:
        tokens: The number of tokens of all training documents, prompts included.
        trained: The number of tokens trained on.
        read: The number of tokens that a pass over the rows reads: fewer where documents are cut, never with padding.
        rows: The number of rows of `sequence` tokens.
        context: The mean length of a token's document, in the rows.
        share: The share of the text that was encoded; if it is below 1, the numbers are estimates.
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
    """The data of a training run.

    Attributes:
        count: None without a tokenizer to count with.
        notes: Notes for the user, one line each.
        encoding_seconds: The time that encoding all documents would take at the rate of those encoded here.
    """

    files: tuple[FileSummary, ...]
    documents: int
    heldout_documents: int
    count: Count | None
    notes: tuple[str, ...]
    encoding_seconds: float = 0.0


def survey(config: TrainConfig, tokenizer: Any | None) -> Survey:
    """Survey the data of a training run; errors are those of `dataset.datasets`, except for documents that are not encoded."""
    train, heldout = dataset.files(config)
    files_with_split = [(file, "train") for file in train] + [(file, "heldout") for file in heldout]
    count, notes, seconds = _count(config, train, tokenizer) if tokenizer is not None else (None, [], 0.0)
    if heldout and tokenizer is not None:
        seconds += _arrange_sample(config, heldout, tokenizer)[2]
    if heldout:
        notes = [*notes, *overlap.note(dataset.shared_passages(train, heldout))]
    return Survey(
        files=tuple(
            FileSummary(file.name, split, file.contents, len(file.documents), file.size) for file, split in files_with_split
        ),
        documents=sum(len(file.documents) for file in train),
        heldout_documents=sum(len(file.documents) for file in heldout),
        count=count,
        notes=tuple(notes),
        encoding_seconds=seconds,
    )


def _count(config: TrainConfig, files: Sequence[DataFile], tokenizer: Any) -> tuple[Count, list[str], float]:
    sampled, share, seconds = _arrange_sample(config, files, tokenizer, config.data.shares)

    def estimate(sampled_number: int) -> int:
        return round(sampled_number / share)

    packed = sampled.packed
    rows = max(1, estimate(len(packed)))
    count = Count(
        tokens=estimate(sampled.tokens),
        trained=estimate(sum(batch.label_tokens for batch in packed.parts())),
        read=estimate(int(packed.segments.sum())),
        rows=rows,
        steps=config.steps(rows),
        steps_per_epoch=-(rows // -config.train.rows),
        context=mean_context(packed.segments),
        share=share,
    )
    return count, [*sampled.notes], seconds


def _arrange_sample(
    config: TrainConfig, files: Sequence[DataFile], tokenizer: Any, shares: Sequence[float] | None = None
) -> tuple[dataset.Dataset, float, float]:
    """Encode documents, or a sample of many, and arrange them in rows.

    Also return their share of the text, and the seconds that encoding all of it would take.

    Errors are those of a training run.
    """
    data = config.data
    all_files, (files, share) = files, _sample(files)
    start = time.perf_counter()
    encoded = dataset.encode_files(files, tokenizer, loss=data.loss)
    seconds = (time.perf_counter() - start) / share
    # The kinds of the documents are in the table of files, so they need no notes.
    notes = (*(note for file in all_files for note in file.remark_notes), *encoded.template_notes)
    encoded = dataclasses.replace(encoded, notes=notes)
    rows = dataset.arrange_rows(
        encoded, tokenizer, sequence=data.sequence, seed=config.train.seed, pack_rows=data.pack, pairs=bool(config.preference),
        shares=shares, partial=share < 1,
    )  # fmt: skip
    return rows, share, seconds


def _sample(files: Sequence[DataFile]) -> tuple[list[DataFile], float]:
    """Return an evenly spaced sample of documents, its texts cut to the limit, and its share of all the text."""
    sizes = [[document.length for document in file.documents] for file in files]
    count, characters = sum(map(len, sizes)), sum(map(sum, sizes))
    # Every nth document, so that all parts of the data are in the sample.
    stride = max(-(count // -_MAX_DOCUMENTS), -(characters // -_MAX_CHARACTERS), 1)
    sampled_documents = [[_shorten(document, _MAX_CHARACTERS) for document in file.documents[::stride]] for file in files]
    # Texts that were cut count only with the part that is encoded.
    share = sum(document.length for documents in sampled_documents for document in documents) / max(1, characters)
    return [
        dataclasses.replace(file, documents=tuple(documents)) for file, documents in zip(files, sampled_documents, strict=True)
    ], share or 1.0


def _shorten(document: Document, length: int) -> Document:
    if document.shape != "text" or document.length <= length:
        return document
    return dataclasses.replace(document, record={"text": document.record["text"][:length]})
