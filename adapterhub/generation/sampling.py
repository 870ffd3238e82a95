"""Which token comes next: the likeliest, or one that is drawn. The same logits and seed give the same token in every engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """Chooses one token after another.

    Args:
        temperature: 0 for the likeliest token; else logits are divided by it.
        seed: Of the random numbers.
        top_p: Draw from the fewest likeliest tokens that have this share together; 1 for all.
    """

    def __init__(self, temperature: float, seed: int, top_p: float = 1.0) -> None:
        self._temperature, self._top_p = temperature, top_p
        self._random = np.random.Generator(np.random.PCG64(seed))

    def token(self, logits: NDArray[np.float32]) -> int:
        """Return the id of the next token; `logits` are `(vocab,)`."""
        if self._temperature == 0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # the smallest temperatures leave the likeliest alone
            shares = np.exp((logits.astype(np.float64) - logits.max()) / self._temperature)
        if self._top_p < 1:
            shares[~_likeliest(shares, self._top_p)] = 0
        sums = shares.cumsum()
        return int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))


def _likeliest(shares: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Return which tokens are the fewest likeliest with a share of `top_p` together, at least one; bool `(vocab,)`."""
    order = np.argsort(-shares, kind="stable")
    sums = shares[order].cumsum()
    chosen = np.zeros(len(shares), np.bool_)
    chosen[order[: int(np.searchsorted(sums, top_p * sums[-1])) + 1]] = True
    return chosen
