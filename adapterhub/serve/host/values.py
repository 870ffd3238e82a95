"""What is asked of a host, what it answers, and what it holds at most."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub_converters.errors import ParameterError, RefusedError

TOO_LONG = "too-long"
"""The code of the error for a prompt and an answer that the base cannot see together."""
Blend = tuple[tuple[str, float], ...]
"""Versions with their weights: `()` is the base, `(("team/sql@sha256:…", 1.0),)` one version."""


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        ids: The tokens of the prompt.
        blend: What answers.
        max_tokens: The largest number of tokens of the answer.
        temperature: 0 for the likeliest token each time.
        top_p: Draw from the fewest likeliest tokens with this share together.
        seed: Of the random numbers; None for one that nobody knows.
        stop: Texts at which the answer ends; they are not part of it.
        logprobs: The number of likeliest tokens to return for each place, 0 for the chosen one alone; None for nothing.
        bias: Tokens, and what is added to their logits each time.
    """

    ids: list[int]
    blend: Blend
    max_tokens: int
    temperature: float = 0
    top_p: float = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    bias: tuple[tuple[int, float], ...] = ()

    def check(self, *, longest: int, vocabulary: int) -> None:
        """ParameterError unless a base of so many tokens, which sees so many together, can answer it."""
        tokens = len(self.ids) + self.max_tokens
        if not self.ids:
            raise ParameterError("prompt", "the prompt has no token to continue")
        if not all(0 <= token < vocabulary for token in self.ids):
            raise ParameterError("prompt", f"a token is not one of the {vocabulary:,} of the base")
        if not all(0 <= token < vocabulary for token, _ in self.bias):
            raise ParameterError("logit_bias", f"a token is not one of the {vocabulary:,} of the base")
        if self.max_tokens < 1:
            raise ParameterError("max_tokens", f"is {self.max_tokens}, which is less than 1")
        if tokens > longest:
            asked = f"the prompt has {len(self.ids):,} tokens and the answer may have {self.max_tokens:,}"
            what = f"{asked}, but prompt and answer together have at most {longest:,}"
            raise ParameterError("max_tokens", what, "Ask for fewer tokens, or shorten the prompt", code=TOO_LONG)


@dataclass(frozen=True)
class Piece:
    """What one more token adds to an answer.

    Attributes:
        text: What is certain since the last piece; held back while it may be the beginning of a stop text or of a character.
        token: Its id, also of a token that ends the answer and has no text.
        logprob: Its natural logarithm of the probability, at temperature 1; None unless asked for.
        top: The likeliest tokens at its place, with theirs.
        finish: `stop` or `length` with the last piece, else None.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None


class FullError(RefusedError):
    """As many requests wait as may."""

    default_code = "queue-full"


class Texts(Protocol):
    """The texts of a base."""

    @property
    def where(self) -> str:
        """The base, in messages."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""

    @property
    def longest_token(self) -> int:
        """No token has more characters."""

    @property
    def has_template(self) -> bool:
        """Whether the base has a chat template."""

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render it, up to the beginning of the answer."""

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Return the ids; `special`: with those that the base expects at a start."""

    def of(self, token: int) -> str:
        """Return the text of one token by itself."""

    def pieces(self) -> Callable[[int], str]:
        """A function from one token after another to the text that is complete with it."""


@dataclass(frozen=True)
class Limits:
    """What a host holds at most.

    Attributes:
        slots: Adapters that are used at the same time.
        rows: Requests that are answered at the same time.
        waiting: Requests that wait; further ones are refused.
        rank: The largest rank; all slots have room for the largest that is in use.
        adapters: Bytes of adapters in memory that no request uses.
        prefixes: Bytes of keys and values that are kept for prompts that begin alike.
        keys_values: Bytes of keys and values of all rows; a request that needs more has the batch to itself.
        tokens: Of prompt and answer together, where the base sees more or does not tell.
        patience: Seconds after which a request that waits for a slot stops those behind it from overtaking.
    """

    slots: int = 8
    rows: int = 16
    waiting: int = 256
    rank: int = 256
    adapters: int = 4 << 30
    prefixes: int = 1 << 30
    keys_values: int = 4 << 30
    tokens: int = 32768
    patience: float = 2.0
