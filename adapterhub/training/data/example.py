"""A document as tokens."""

from __future__ import annotations

import numpy as np

from adapterhub_converters.lazy_dataclass import dataclass


@dataclass(frozen=True, eq=False)
class Example:
    """One document as token ids, and which of them are trained on, both `(tokens,)`."""

    ids: np.ndarray
    trained: np.ndarray
    joint: bool
    """Whether it has to stay in one row; running text may continue in others."""
    answers: int = 0
    """Turns of the assistant to train on in a conversation, `unwritten` of which the chat template does not write in full."""
    unwritten: int = 0
    thoughtless: bool = False
    """Whether it does not write the thought of the last answer; those of earlier ones are usually dropped on purpose."""
    empty_thoughts: int = 0
    """Answers that are learned with an empty thought, because the generation prompt does not end with it."""
    prompted_thoughts: int = 0
    """Answers whose empty thought is context, because the generation prompt ends with it."""
