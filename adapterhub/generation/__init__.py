"""Text that a base model generates with and without an adapter.

`torch_engine` runs a Hugging Face folder with the layers of training runs and evaluations, over `hf_text`; `llama_cpp` runs a
GGUF file, which `llama_cpp_trial` has loaded in another process first. Both give the logits of the next token; `sampling`
chooses it. Importing this package imports neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .sampling import Sampler

__all__ = ["Engine", "Generation", "OnText", "Prompt", "answer_prompt"]

OnText = Callable[[bool, str], object]
"""A callback that gets whether the adapter is on, and the next piece of text."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and what comes before it; `raw` text is continued without the model's chat template.

    Attributes:
        text: The last message of the user.
        system: The message of the system, before all others; None for none.
        earlier: The messages in between, each with `role` and `content`.
    """

    text: str
    system: str | None = None
    raw: bool = False
    earlier: tuple[Mapping[str, str], ...] = ()

    @property
    def messages(self) -> list[Mapping[str, str]]:
        """The prompt as a conversation."""
        system_messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system_messages, *self.earlier, {"role": "user", "content": self.text}]

    def plain_text(self, location: str) -> str:
        """Return the text to continue without a chat template. RefusedError for a conversation, which needs one."""
        if self.earlier:
            problem = "has no chat template for a conversation of several messages"
            raise RefusedError(location, problem, "Ask with a prompt alone", code="no-chat-template")
        return self.text


@dataclass(frozen=True)
class Generation:
    """The answer of a model.

    Attributes:
        text: The answer with the adapter, or of the base if there is none.
        base_text: The answer without it; None if that was not asked for.
        prompt: The complete text that was continued.
        tokens: The number of tokens of `text`.
        engine: `torch` or `llama.cpp`.
        base: The name of the base: the one that was given, or the one that the adapter records.
    """

    text: str
    base_text: str | None
    prompt: str
    tokens: int
    engine: str
    base: str = ""


class Engine(Protocol):
    """A loaded model with an adapter for it, or without any.

    Attributes:
        name: As in `Generated`.
        location: The base, in messages.
        max_context: The maximum number of tokens in the context; None if unknown.
    """

    name: str
    location: str
    max_context: int | None

    def text_of(self, prompt: Prompt) -> str:
        """Return the text to continue."""

    def tokens(self, text: str, *, raw: bool) -> list[int]:
        """Return the ids of a text; those of raw text include the tokens that the model expects at its start."""

    def start_decoding(self, *, adapted: bool, room: int) -> AbstractContextManager[Callable[[list[int]], Any]]:
        """Return a context manager for a function that reads further tokens and returns the logits of the next one.

        The logits are `(vocab,)` float32. The adapter is on if `adapted`; once it was off, it stays off. `room` is the maximum
        number of tokens to read.
        """

    def is_end(self, token: int) -> bool:
        """Return whether a token ends the answer."""

    def pieces(self) -> Callable[[int], str]:
        """Return a function that gets one token after another and returns the text that each completes."""


def answer_prompt(
    engine: Engine,
    prompt: Prompt,
    *,
    has_adapter: bool = True,
    compare: bool,
    max_tokens: int,
    temperature: float,
    seed: int,
    on_text: OnText,
) -> Generation:
    """Return the answers with the adapter, if there is one, and then, to compare, without it.

    Raises:
        RefusedError: There is nothing to continue, or prompt and answer exceed the model's context.
    """
    text = engine.text_of(prompt)
    ids = engine.tokens(text, raw=prompt.raw)
    if not ids:
        raise RefusedError(engine.location, "the prompt has no token to continue")
    if engine.max_context is not None and len(ids) + max_tokens > engine.max_context:
        sizes = f"the prompt has {len(ids):,} tokens and the answer may have {max_tokens:,}"
        problem = f"{sizes}, but the model sees {engine.max_context:,}"
        raise RefusedError(engine.location, problem, "Ask for fewer tokens, or shorten the prompt", code="too-long")
    answers, count = [], 0
    # With the adapter first: an engine cannot turn it on again.
    for adapted in (True, False) if has_adapter and compare else (has_adapter,):
        pieces = []
        with engine.start_decoding(adapted=adapted, room=len(ids) + max_tokens) as logits_after:
            # The same seed for both answers, so that they differ only because of the adapter.
            for piece in _answer(engine, logits_after, ids, max_tokens, Sampler(temperature, seed)):
                count += adapted == has_adapter
                pieces.append(piece)
                if piece:
                    on_text(adapted, piece)
        answers.append("".join(pieces))
    return Generation(answers[0], answers[1] if len(answers) > 1 else None, text, count, engine.name)


def _answer(
    engine: Engine, logits_after: Callable[[list[int]], Any], ids: list[int], max_tokens: int, sampler: Sampler
) -> Iterator[str]:
    """Yield the text of each token until the answer ends."""
    piece_of = engine.pieces()
    for _ in range(max_tokens):
        token = sampler.token(logits_after(ids))
        if engine.is_end(token):
            return
        yield piece_of(token)
        ids = [token]
