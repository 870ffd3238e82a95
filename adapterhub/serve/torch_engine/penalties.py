"""Penalties for tokens that have occurred: those of OpenAI's API, and the one of transformers and vLLM.

In the order of vLLM (`v1/sample/ops/penalties.py`), which OpenAI does not say: first the repetition penalty, then the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .values import Request


class Penalties:
    """The penalties of one answer.

    Args:
        vocabulary: The number of tokens of the base.
    """

    def __init__(self, request: Request, vocabulary: int) -> None:
        self._presence, self._frequency = np.float32(request.presence_penalty), np.float32(request.frequency_penalty)
        self._repetition = np.float32(request.repetition_penalty)
        self._counts = np.zeros(vocabulary, np.float32)  # of the answer
        self._occurred = np.zeros(vocabulary, np.bool_)  # in the prompt or the answer
        self._occurred[request.ids] = True

    @staticmethod
    def are_in(request: Request) -> bool:
        """Return whether a request has a penalty."""
        return bool(request.presence_penalty or request.frequency_penalty or request.repetition_penalty != 1)

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Penalize logits, `(vocab,)`, in place."""
        if self._repetition != 1:
            repeated = logits[self._occurred]
            logits[self._occurred] = np.where(repeated < 0, repeated * self._repetition, repeated / self._repetition)
        logits -= self._frequency * self._counts
        logits -= self._presence * (self._counts > 0)

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        self._counts[token] += 1
        self._occurred[token] = True
