"""The way from logits to text: choosing the next token, holding back uncertain text, and ending the answer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adapterhub.generation.sampling import Sampler
from adapterhub_converters.errors import RefusedError

from .penalties import Penalties
from .values import Piece, Request, Texts


class GeneratedAnswer:
    """The answer to a request, one token after another."""

    def __init__(self, request: Request, text: Texts) -> None:
        self.count = 0
        self._request, self._ends = request, frozenset() if request.ignore_eos else text.ends | request.ends
        seed = secrets.randbits(63) if request.seed is None else request.seed
        self._sampler = Sampler(request.temperature, seed, request.top_p, top_k=request.top_k, min_p=request.min_p)
        self._penalties: Penalties | None = None
        self._mask = request.grammar.mask() if request.grammar else None
        self._piece_of, self._stops = text.pieces(), StopTexts(request.stop)
        self._prompt_piece_of = text.pieces()
        self._bias = (
            np.array([token for token, _ in request.bias], int),
            np.array([bias for _, bias in request.bias], np.float32),
        )

    @property
    def scores_prompt(self) -> bool:
        """Whether the probabilities of the prompt's tokens are wanted."""
        return self._request.echo and self._request.logprobs is not None

    def prompt_pieces(self, start: int, end: int, logits: NDArray[np.float32]) -> list[Piece]:
        """Return the pieces that a chunk of the prompt gives: of its tokens but for the first, and of the one behind it.

        Args:
            start: The position of the chunk's first token; the prompt's first token is returned with the first chunk.
            end: The position behind its last token.
            logits: `(tokens, vocab)`, after each token of the chunk; read only if `scores_prompt`.

        Raises:
            RefusedError: The logits are not finite.
        """
        ids, pieces = self._request.ids, []
        if self.scores_prompt:
            first = [Piece(self._prompt_piece_of(ids[0]), ids[0], is_prompt=True)] if start == 0 else []
            behind = zip(ids[start + 1 : end + 1], logits, strict=False)
            pieces = first + [self._scored_piece(token, token_logits) for token, token_logits in behind]
        if end == len(ids) and not self._request.max_tokens:
            last = pieces.pop() if pieces else Piece("", ids[-1], is_prompt=True)
            pieces.append(replace(last, finish="length"))
        return pieces

    def _scored_piece(self, token: int, logits: NDArray[np.float32]) -> Piece:
        """Return the piece of a token of the prompt, by the logits behind the token before it."""
        _check_finite(logits)
        logprobs = log_softmax(logits)
        top = likeliest(logprobs, self._request.logprobs or 0)
        return Piece(self._prompt_piece_of(token), token, float(logprobs[token]), top, is_prompt=True)

    def add(self, logits: NDArray[np.float32]) -> Piece:
        """Choose the next token by the logits, `(vocab,)`, and return what it adds.

        Raises:
            RefusedError: The logits are not finite.
        """
        _check_finite(logits)
        # A copy, because the array may be a view of the logits of the whole batch.
        if self._request.bias:
            logits = logits.copy()
            logits[self._bias[0]] += self._bias[1]
        token = self._sampler.token(self._adjusted(logits))
        self.count += 1
        if self._penalties:
            self._penalties.add(token)
        if self._mask:
            self._mask.add(token)
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self._request.logprobs is not None:
            logprobs = log_softmax(logits)
            logprob, top = float(logprobs[token]), likeliest(logprobs, self._request.logprobs)
        # The text of a token that ends the answer is not part of it.
        if token in self._ends:
            return Piece(self._stops.flush(), token, logprob, top, "stop")
        text, stopped = self._stops.add(self._piece_of(token))
        if stopped:
            return Piece(text, token, logprob, top, "stop")
        if self._mask and self._mask.is_complete:
            return Piece(text + self._stops.flush(), token, logprob, top, "stop")
        if self.count == self._request.max_tokens:
            return Piece(text + self._stops.flush(), token, logprob, top, "length")
        return Piece(text, token, logprob, top)

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits after penalties and grammar; the array itself if there are none."""
        if Penalties.are_in(self._request):
            self._penalties = self._penalties or Penalties(self._request, len(logits))
        elif not self._mask:
            return logits
        logits = logits.copy()
        if self._penalties:
            self._penalties.apply(logits)
        if self._mask:
            self._mask.apply(logits)
        return logits


def _check_finite(logits: NDArray[np.float32]) -> None:
    if not np.isfinite(logits).all():
        raise RefusedError("", "the result contains NaN or Inf")


class StopTexts:
    """A filter that ends text before the first stop text, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._pending = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is certain, and whether a stop text ended it."""
        text = self._pending + text
        positions = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if positions:
            self._pending = ""
            return text[: min(positions)], True
        beginnings = range(max(0, len(text) - self._longest + 1), len(text))
        certain = next((at for at in beginnings if any(stop.startswith(text[at:]) for stop in self._stops)), len(text))
        self._pending = text[certain:]
        return text[:certain], False

    def flush(self) -> str:
        """Return the text that is held back."""
        remainder, self._pending = self._pending, ""
        return remainder


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logarithms of the probabilities."""
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def likeliest(logprobs: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    """Return the `count` likeliest tokens with the logarithms of their probabilities, likeliest first."""
    count = min(count, len(logprobs))
    tokens = np.argpartition(-logprobs, count - 1)[:count] if count else np.zeros(0, int)
    return tuple((int(token), float(logprobs[token])) for token in sorted(tokens, key=lambda token: (-logprobs[token], token)))
