"""How much of held-out data stands in the training data, passage by passage.

Equal documents are rare between two parts of one collection, and shared passages are not: licenses, quotations, templates. A
model that has seen them knows them, so that the perplexity of the held-out data says less about new texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .documents import Document
from .shapes import PAIRS

WORDS = 8  # in a run
WORTH_NOTING = 0.02  # share of the runs
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost modulo 2**64


def shared(train: Iterable[Document], heldout: Iterable[Document]) -> float:
    """Return the share of the runs of WORDS words in held-out texts that are in training texts too; 0 without any.

    Of conversations and pairs only the answers count: many have the same prompt of the system.
    """
    wanted = np.concatenate([np.zeros(0, np.uint64), *(_runs(text) for document in heldout for text in _texts(document))])
    if not len(wanted):
        return 0.0
    distinct = np.unique(wanted)
    found = np.zeros(len(distinct), bool)
    for document in train:
        for text in _texts(document):
            runs = _runs(text)
            places = np.minimum(np.searchsorted(distinct, runs), len(distinct) - 1)
            found[places[distinct[places] == runs]] = True
    return float(found[np.searchsorted(distinct, wanted)].mean())


def note(share: float) -> list[str]:
    """Return a note for the user about a share that is worth one."""
    if share < WORTH_NOTING:
        return []
    what = f"{share:.0%} of the runs of {WORDS} words in the held-out texts are in the training data too"
    return [f"{what}: its perplexity says less about new texts"]


def _texts(document: Document) -> Iterator[str]:
    """Yield what of a document is evaluated, as texts."""
    record = document.record["chosen"] if document.shape == PAIRS else document.record
    for key in ("text", "output", "completion"):
        if isinstance(record.get(key), str):
            yield record[key]
    for turns in (record.get("messages"), record.get("completion")):
        for turn in turns if isinstance(turns, list) else []:
            if isinstance(turn, dict) and turn.get("role") == "assistant" and isinstance(turn.get("content"), str):
                yield turn["content"]


def _runs(text: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a hash of each run of words, uint64: equal runs have equal ones within this process."""
    words = np.array([hash(word) for word in text.split()], np.int64).view(np.uint64)
    count = len(words) - WORDS + 1
    runs = np.zeros(max(0, count), np.uint64)
    for place in range(WORDS if count > 0 else 0):
        runs = runs * _FACTOR + words[place : place + count]
    return runs
