"""The overlap of held-out data with the training data, passage by passage.

Two parts of one collection rarely have equal documents, but often share passages: licenses, quotations, templates. A model that
was trained on them knows them, so the perplexity of the held-out data says less about new texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .document_files import Document
from .record_shapes import PAIRS

WORDS = 8  # per run
WORTH_NOTING = 0.02  # of all runs
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost modulo 2**64


def shared_share(train: Iterable[Document], heldout: Iterable[Document]) -> float:
    """Return the share of the runs of WORDS words in held-out texts that training texts have too; 0 if there are no runs.

    In conversations and pairs only the answers count: many have the same system prompt.
    """
    heldout_runs = np.concatenate(
        [np.zeros(0, np.uint64), *(_run_hashes(text) for document in heldout for text in _texts(document))]
    )
    if not len(heldout_runs):
        return 0.0
    distinct = np.unique(heldout_runs)
    is_shared = np.zeros(len(distinct), bool)
    for document in train:
        for text in _texts(document):
            runs = _run_hashes(text)
            places = np.minimum(np.searchsorted(distinct, runs), len(distinct) - 1)
            is_shared[places[distinct[places] == runs]] = True
    return float(is_shared[np.searchsorted(distinct, heldout_runs)].mean())


def note(share: float) -> list[str]:
    """Return a note for the user if the share is worth noting."""
    if share < WORTH_NOTING:
        return []
    statement = f"{share:.0%} of the runs of {WORDS} words in the held-out texts are in the training data too"
    return [f"{statement}: its perplexity says less about new texts"]


def _texts(document: Document) -> Iterator[str]:
    """Yield the texts of a document that an evaluation measures."""
    record = document.record["chosen"] if document.shape == PAIRS else document.record
    for key in ("text", "output", "completion"):
        if isinstance(record.get(key), str):
            yield record[key]
    for turns in (record.get("messages"), record.get("completion")):
        for turn in turns if isinstance(turns, list) else []:
            if isinstance(turn, dict) and turn.get("role") == "assistant" and isinstance(turn.get("content"), str):
                yield turn["content"]


def _run_hashes(text: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a hash of each run of words, uint64; equal runs have equal hashes within this process."""
    words = np.array([hash(word) for word in text.split()], np.int64).view(np.uint64)
    count = len(words) - WORDS + 1
    runs = np.zeros(max(0, count), np.uint64)
    for start in range(WORDS if count > 0 else 0):
        # A polynomial in the hashes of words; unsigned arithmetic wraps around at 2**64.
        runs = runs * _HASH_FACTOR + words[start : start + count]
    return runs
