"""Which token comes next: the likeliest, or one that is drawn. The same logits and seed give the same token in every engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """Chooses one token after another.

    Args:
        temperature: 0 for the likeliest token; else logits are divided by it.
        seed: Of the random numbers.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        self._temperature = temperature
        self._random = np.random.Generator(np.random.PCG64(seed))

    def token(self, logits: NDArray[np.float32]) -> int:
        """Return the id of the next token; `logits` are `(vocab,)`."""
        if self._temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self._temperature
        shares = np.exp(scaled - scaled.max()).cumsum()
        return int(np.searchsorted(shares, self._random.random() * shares[-1], side="right"))
