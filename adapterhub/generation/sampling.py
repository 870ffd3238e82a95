"""The choice of the next token, the likeliest or a random one; equal logits and seeds give the same token in every engine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """A sampler of one token after another.

    Args:
        temperature: 0 for the likeliest token; otherwise logits are divided by it.
        seed: The seed of the random numbers.
        top_p: Draw from the smallest set of likeliest tokens with this total probability; 1 for all.
        top_k: Draw from so many likeliest tokens, and those as likely as the last of them; 0 for all.
        min_p: Draw from the tokens with at least this share of the probability of the likeliest one.
    """

    def __init__(self, temperature: float, seed: int, top_p: float = 1.0, *, top_k: int = 0, min_p: float = 0.0) -> None:
        self._temperature, self._top_p, self._top_k, self._min_p = temperature, top_p, top_k, min_p
        self._random = np.random.Generator(np.random.PCG64(seed))

    def token(self, logits: NDArray[np.float32]) -> int:
        """Return the id of the next token; `logits` are `(vocab,)`."""
        if self._temperature == 0:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # a tiny temperature overflows to -inf, which leaves only the likeliest token
            probabilities = np.exp((logits.astype(np.float64) - logits.max()) / self._temperature)
        # The order of vLLM: each filter sees what the one before it has left.
        if self._min_p > 0:
            probabilities[probabilities < self._min_p * probabilities.max()] = 0
        if 0 < self._top_k < len(probabilities):
            probabilities[probabilities < np.partition(probabilities, -self._top_k)[-self._top_k]] = 0
        if self._top_p < 1:
            probabilities[~_likeliest(probabilities, self._top_p)] = 0
        cumulative = probabilities.cumsum()
        # side="right" skips tokens with probability 0, which share the sum of the token before them.
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))


def _likeliest(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Return the smallest set of likeliest tokens with a total probability of `top_p`, at least one, as bool `(vocab,)`."""
    order = np.argsort(-probabilities, kind="stable")
    cumulative = probabilities[order].cumsum()
    is_likely = np.zeros(len(probabilities), np.bool_)
    is_likely[order[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]] = True
    return is_likely
