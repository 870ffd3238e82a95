"""The values that a host takes and returns: requests, pieces of answers, and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from adapterhub_converters.errors import ParameterError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import TrainedPrompt

from .grammar import Grammar

TOO_LONG = "too-long"
"""The code of the error for a prompt and an answer that together exceed what the base can see."""
Blend = tuple[tuple[str, float], ...]
"""Versions with their weights: `()` is the base, `(("team/sql@sha256:…", 1.0),)` one version."""


@dataclass(frozen=True)
class Request:
    """A request to a host.

    Attributes:
        ids: The tokens of the prompt.
        blend: The versions that answer.
        max_tokens: The largest number of tokens of the answer.
        temperature: 0 for the likeliest token each time.
        top_p: Draw from the smallest set of likeliest tokens that has this share of the probability.
        seed: The seed of the random numbers; None for an unpredictable one.
        stop: Texts at which the answer ends; they are not part of it.
        logprobs: The number of likeliest tokens to return for each position, 0 for only the chosen one; None for nothing.
            They are of the base's logits and the bias, before penalties and grammar.
        bias: Tokens, and what is added to their logits each time.
        presence_penalty: What is subtracted from the logit of every token of the answer so far (OpenAI).
        frequency_penalty: The same for each time that the token occurs.
        repetition_penalty: Positive logits of the tokens of prompt and answer are divided by this, negative ones multiplied
            by it (transformers, vLLM).
        top_k: Draw from so many likeliest tokens; 0 for all.
        min_p: Draw from the tokens with at least this share of the probability of the likeliest one.
        ends: Tokens that end the answer, besides those that end every answer of the base.
        ignore_eos: Whether tokens that end an answer do not end it (vLLM).
        grammar: The grammar of the answer; None for any text.
        echo: Whether pieces of the prompt come before those of the answer: with `logprobs` every token's, else only the last
            one's, and that only if the answer has no tokens. Only then may `max_tokens` be 0.
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
    presence_penalty: float = 0
    frequency_penalty: float = 0
    repetition_penalty: float = 1
    top_k: int = 0
    min_p: float = 0
    ends: frozenset[int] = frozenset()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    echo: bool = False

    def check(self, *, longest: int, vocabulary: int) -> None:
        """Raise ParameterError unless a base with this vocabulary and context length can answer it."""
        tokens = len(self.ids) + self.max_tokens
        if not self.ids:
            raise ParameterError("prompt", "the prompt has no token to continue")
        if not all(0 <= token < vocabulary for token in self.ids):
            raise ParameterError("prompt", f"a token is not one of the {vocabulary:,} of the base")
        if not all(0 <= token < vocabulary for token, _ in self.bias):
            raise ParameterError("logit_bias", f"a token is not one of the {vocabulary:,} of the base")
        if self.max_tokens < (least := 0 if self.echo else 1):
            raise ParameterError("max_tokens", f"is {self.max_tokens}, which is less than {least}")
        if tokens > longest:
            sizes = f"the prompt has {len(self.ids):,} tokens and the answer may have {self.max_tokens:,}"
            problem = f"{sizes}, but prompt and answer together have at most {longest:,}"
            raise ParameterError("max_tokens", problem, "Ask for fewer tokens, or shorten the prompt", code=TOO_LONG)


@dataclass(frozen=True)
class Piece:
    """What one more token adds to an answer.

    Attributes:
        text: The text that has become certain; what may begin a stop text or is part of a character is held back.
        token: Its id, even if the token ends the answer and has no text.
        logprob: The natural logarithm of its probability, at temperature 1; None unless requested.
        top: The likeliest tokens at its position, with their logprobs.
        finish: `stop` or `length` with the last piece, otherwise None.
        is_prompt: Whether the token is one of the prompt; its first one has no probability.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    is_prompt: bool = False


class FullError(RefusedError):
    """The queue of waiting requests is full."""

    default_code = "queue-full"


class Texts(Protocol):
    """The tokens of a base as text."""

    def with_prompt(self, prompt: TrainedPrompt) -> Texts:
        """Return the same texts with the conversations of an adapter."""

    @property
    def location(self) -> str:
        """The name of the base in messages."""

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""

    @property
    def chat_ends(self) -> frozenset[int]:
        """The tokens that end an answer in a conversation."""

    @property
    def longest_token(self) -> int:
        """The largest number of characters in a token."""

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""

    @property
    def tool_template(self) -> str:
        """The chat template for conversations with tools; empty if there is none."""

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as in tokenizer.json, for grammars; empty if they are not supported."""

    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
        """Render the messages up to the beginning of the answer, with tools that it may call."""

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Return the ids; with `special`, include those that the base expects at the start."""

    def token_text(self, token: int) -> str:
        """Return the text of one token by itself."""

    def pieces(self) -> Callable[[int], str]:
        """Return a function that takes one token after another, and returns the text that each completes."""


@dataclass(frozen=True)
class Limits:
    """The limits of a host.

    Attributes:
        slots: Adapters that are used at the same time.
        rows: Requests that are answered at the same time.
        waiting: Requests that may wait; more are refused.
        rank: The largest rank; all slots have room for the largest one in use.
        adapters: Bytes of adapters in memory that no request uses.
        prefixes: Bytes of keys and values that are cached for prompts that begin alike.
        keys_values: Bytes of keys and values of all rows; a request that needs more has the batch to itself.
        tokens: Tokens of prompt and answer together, if the base allows more or does not say.
        patience: Seconds after which a request that waits for a slot can no longer be overtaken.
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
