"""Encoded documents as one array of tokens.

A token takes four bytes, and a document about sixty more. The highest bit of a token marks whether it is trained on. The facts
about documents that notes and packing need are in columns, so that the tokens themselves are read only when a step needs them.
"""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Set
from functools import cached_property
from typing import Any

import numpy as np

from adapterhub_converters.lazy_dataclass import dataclass

from .example import Example

TRAINED = np.uint32(1 << 31)
"""The bit of a token that is trained on."""
_COLUMNS = np.dtype([
    ("digest", np.uint64), ("length", np.int64), ("trained", np.int64), ("first", np.int64), ("answers", np.int32),
    ("unwritten", np.int32), ("empty_thoughts", np.int32), ("prompted_thoughts", np.int32), ("joint", np.bool_),
    ("thoughtless", np.bool_), ("stopped", np.bool_),
])  # fmt: skip
_END_TOKENS = 3  # at the end of an answer, among which its stop token is; a line break or another mark may follow it


@dataclass(frozen=True, eq=False)
class Tokens:
    """Documents in the order in which they were read; of a pair, the chosen side before the rejected one.

    Attributes:
        marked: Ids, with the bit TRAINED set where they are trained on, uint32 `(tokens,)`.
        documents: A line per document: `digest`, the first eight bytes of its digest; `length` in tokens; the number of
            `trained` tokens; `first`, the place of the first trained token after token 0, `length` if there is none;
            `answers`, `unwritten`, `empty_thoughts`, `prompted_thoughts`, `joint` and `thoughtless` as in `Example`; `stopped`,
            whether it ends with a stop token that is trained on.
    """

    marked: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def starts(self) -> np.ndarray:
        """The place of the first token of each document, int64."""
        starts: np.ndarray = np.cumsum(self.documents["length"]) - self.documents["length"]
        return starts

    def ids(self, number: int) -> np.ndarray:
        """Return the ids of a document, int64."""
        start = self.starts[number]
        return ids_of(self.marked[start : start + self.documents["length"][number]])


def ids_of(marked: np.ndarray) -> np.ndarray:
    """Return ids without their marks, int64."""
    return (marked & ~TRAINED).astype(np.int64)


def collect(examples: Iterable[tuple[Example, bytes]], stops: Set[int]) -> Tokens:
    """Return the tokens of examples, each of which comes with the digest of its document.

    Args:
        stops: The ids of tokens that may end an answer.
    """
    marked = array.array("I")
    documents = np.fromiter(_document_lines(examples, stops, marked), _COLUMNS)
    return Tokens(np.frombuffer(marked, np.uint32), documents)


def _document_lines(
    examples: Iterable[tuple[Example, bytes]], stops: Set[int], marked: array.array[int]
) -> Iterator[tuple[Any, ...]]:
    """Yield the line of each example in `Tokens.documents`, and append its tokens to `marked`."""
    for example, digest in examples:
        marked.frombytes((example.ids.astype("<u4") | example.trained * TRAINED).tobytes())
        # Token 0 is never predicted, so the first trained token counts from token 1.
        answer_ids, trained_places = example.ids[example.trained], np.flatnonzero(example.trained[1:])
        first = trained_places[0] + 1 if len(trained_places) else len(example.ids)
        stopped = not stops.isdisjoint(answer_ids[-_END_TOKENS:].tolist())
        counts = len(example.ids), len(answer_ids), first, example.answers, example.unwritten
        thoughts = example.empty_thoughts, example.prompted_thoughts
        yield int.from_bytes(digest[:8], "big"), *counts, *thoughts, example.joint, example.thoughtless, stopped


def stop_tokens(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


@dataclass(frozen=True)
class File:
    """One file of a data set; `size` is in bytes."""

    path: str
    digest: str
    size: int
    documents: int
    tokens: int


@dataclass(frozen=True, eq=False)
class EncodedFiles:
    """The tokens of files, with notes of one line each.

    Attributes:
        notes: How their documents are understood.
        template_notes: By which chat template instructions are written, if not by that of the base.
    """

    files: tuple[File, ...]
    tokens: Tokens
    notes: tuple[str, ...] = ()
    template_notes: tuple[str, ...] = ()
