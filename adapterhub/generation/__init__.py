"""Text that a base model generates with and without an adapter.

`torch_engine` runs a Hugging Face folder, with the layers that trainings and evaluations have; `llama_cpp` runs a GGUF file.
Both give the logits of the next token; `sampling` chooses it. Importing this package imports neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub_converters.errors import RefusedError

from .sampling import Sampler

__all__ = ["Engine", "Generated", "OnText", "Prompt", "answered"]

OnText = Callable[[bool, str], object]
"""Called with whether the adapter is on, and with the next piece of text."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the message of the system before it; `raw` text is continued, without the model's chat template."""

    text: str
    system: str | None = None
    raw: bool = False

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation."""
        before = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*before, {"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Generated:
    """What a model answered.

    Attributes:
        text: With the adapter.
        base_text: Without it; None if that was not asked for.
        prompt: The whole text that was continued.
        tokens: The number of tokens of `text`.
        engine: `torch` or `llama.cpp`.
        base: The name of the base: the one that was given, or that the adapter records.
    """

    text: str
    base_text: str | None
    prompt: str
    tokens: int
    engine: str
    base: str = ""


class Engine(Protocol):
    """A loaded model and an adapter for it.

    Attributes:
        name: As in `Generated`.
        where: The base, in messages.
        longest: The number of tokens that the model can see; None if unknown.
    """

    name: str
    where: str
    longest: int | None

    def text_of(self, prompt: Prompt) -> str:
        """Return the text to continue."""

    def tokens(self, text: str, *, raw: bool) -> list[int]:
        """Return the ids of a text; of raw text, with those that the model expects at its start."""

    def started(self, *, adapted: bool, room: int) -> AbstractContextManager[Callable[[list[int]], Any]]:
        """A function that reads tokens behind those before and returns the logits of the next, `(vocab,)` float32.

        The adapter is on if `adapted`; once it was off, it stays off. `room` is the number of tokens there will be at most.
        """

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the answer."""

    def pieces(self) -> Callable[[int], str]:
        """A function from one token after the other to the text that is complete with it."""


def answered(
    engine: Engine,
    prompt: Prompt,
    *,
    compare: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
    on_text: OnText,
) -> Generated:
    """Return the answers with the adapter and then, to compare, without it.

    Raises:
        RefusedError: There is nothing to continue, or prompt and answer are longer than the model can see.
    """
    text = engine.text_of(prompt)
    ids = engine.tokens(text, raw=prompt.raw)
    if not ids:
        raise RefusedError(engine.where, "the prompt has no token to continue")
    if engine.longest is not None and len(ids) + max_tokens > engine.longest:
        what = (
            f"the prompt has {len(ids):,} tokens and the answer may have {max_tokens:,}, but the model sees {engine.longest:,}"
        )
        raise RefusedError(engine.where, what, "Ask for fewer tokens, or shorten the prompt", code="too-long")
    answers, count = [], 0
    for adapted in (True, False) if compare else (True,):
        parts = []
        with engine.started(adapted=adapted, room=len(ids) + max_tokens) as logits_after:
            for piece in _answer(engine, logits_after, ids, max_tokens, Sampler(temperature, seed)):
                count += adapted
                parts.append(piece)
                if piece:
                    on_text(adapted, piece)
        answers.append("".join(parts))
    return Generated(answers[0], answers[1] if compare else None, text, count, engine.name)


def _answer(
    engine: Engine, logits_after: Callable[[list[int]], Any], ids: list[int], most: int, sampler: Sampler
) -> Iterator[str]:
    """Yield the text of each token until the answer ends."""
    piece_of = engine.pieces()
    for _ in range(most):
        token = sampler.token(logits_after(ids))
        if engine.is_end(token):
            return
        yield piece_of(token)
        ids = [token]
