"""A conversation with one model, or with two side by side, over a gateway in this process.

It asks as a client of the gateway does, without HTTP between them: the same names, versions, checks and engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError, RefusedError

from .engines import CHAT, EngineDownError, words_of
from .gateway import rewriting
from .gateway.answers import ProblemError, engine_failed
from .gateway.app import engine_problem
from .gateway.gateway import Asked, Gateway

STOPPED = "stopped"
"""The `finish` of an answer that was stopped before its end."""
OnText = Callable[[int, str], object]
"""Called with the number of a side, 0 or 1, and with the next piece of its answer."""
OnEnd = Callable[[int, "Answered"], object]
"""Called with the number of a side, and with its answer, which has ended."""
_DATA = b"data: {"


@dataclass
class Answered:
    """An answer.

    Attributes:
        model: The name that was asked for.
        version: What answered: a name with a digest, a blend of those, or the base's name; empty until it is known.
        tokens: Their number; None if the engine did not say.
        seconds: From the question to the end of the answer.
        finish: Why it ended: `stop`, `length`, STOPPED, or another word of the engine.
    """

    model: str
    version: str = ""
    text: str = ""
    tokens: int | None = None
    seconds: float = 0.0
    finish: str = ""


@dataclass
class Conversation:
    """What was said so far, and who answers.

    Attributes:
        gateway: Started, in the event loop of all calls.
        models: The names of those who answer, one or two.
        system: The message of the system; None for none.
        options: Fields of each request: `max_tokens`, `temperature`, `seed`.
    """

    gateway: Gateway
    models: list[str]
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _turns: list[tuple[str, list[str]]] = field(default_factory=list, repr=False)

    async def use(self, model: str, side: int = 0) -> str:
        """Have a model answer from now on, as the first or beside it; return the version that its name means now.

        Raises:
            NotFoundError: There is no such version.
            RefusedError: The engine would not apply it as it was trained.
            LocalIOError: The engine does not answer.
        """
        with _as_errors(self.gateway.engine.name):
            parts = await self.gateway.meant(Asked(CHAT, {}, model=model))
            async with self.gateway.versions.used(parts):
                self.models[side:] = [model, *self.models[side + 1 :]]
        return self.gateway.version_of(parts)

    def clear(self) -> None:
        """Forget what was said."""
        self._turns.clear()

    async def ask(
        self, text: str, on_text: OnText = lambda _side, _piece: None, on_end: OnEnd = lambda _side, _answered: None
    ) -> list[Answered]:
        """Return the answers of all who answer, at the same time. To cancel it stops them, and keeps what came.

        Raises:
            NotFoundError: A version is gone.
            RefusedError: The engine does not answer this.
            LocalIOError: The engine does not answer for now. After each of these, the conversation is what it was before.
        """
        answers = [Answered(model) for model in self.models]
        asking = [
            asyncio.create_task(self._answer(side, text, answered, on_text, on_end)) for side, answered in enumerate(answers)
        ]
        try:
            await asyncio.wait(asking, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:  # codespell:ignore
            pass  # the answers end where they are
        finally:
            for task in asking:
                task.cancel()
            await asyncio.wait(asking)
        for task in asking:
            task.result()
        if any(answered.text for answered in answers):
            self._turns.append((text, [answered.text for answered in answers]))
        return answers

    async def _answer(self, side: int, text: str, answered: Answered, on_text: OnText, on_end: OnEnd) -> None:
        began = time.monotonic()
        asked = Asked(CHAT, {})
        body = {"model": answered.model, "messages": self._messages(side, text), **self.options}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with _as_errors(self.gateway.engine.name):
                async for event in self._events(asked, body):
                    answered.version = asked.version
                    _take(event, answered, lambda piece: on_text(side, piece))
        except asyncio.CancelledError:  # codespell:ignore
            answered.finish = STOPPED
        answered.seconds = time.monotonic() - began
        on_end(side, answered)

    def _messages(self, side: int, text: str) -> list[dict[str, str]]:
        """The conversation as one side knows it; what was said before there were two is the same for both."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answers in self._turns:
            own = answers[side] if side < len(answers) else answers[0]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": own}]
        return [*messages, {"role": "user", "content": text}]

    async def _events(self, asked: Asked, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        """The documents of a stream."""
        async with self.gateway.answered(asked, body) as answer:
            if answer.status != 200:
                raise engine_problem(answer, await rewriting.whole(answer.body))
            async for lines in rewriting.events(answer, asked.version, rewriting.Usage(body)):
                for line in lines.split(b"\n"):
                    if line.startswith(_DATA):
                        yield json_file.parse_object(line[len(_DATA) - 1 :], "answer")


def _take(event: Mapping[str, Any], answered: Answered, on_piece: Callable[[str], object]) -> None:
    """Add what an event of a stream says to an answer."""
    if event.get("error"):
        raise engine_failed(words_of(event))
    choices = event.get("choices")
    for choice in map(_object, choices if isinstance(choices, list) else []):
        answered.finish = str(choice.get("finish_reason") or answered.finish)
        piece = _object(choice.get("delta")).get("content")
        if piece and isinstance(piece, str):
            answered.text += piece
            on_piece(piece)
    tokens = _object(event.get("usage")).get("completion_tokens")
    answered.tokens = tokens if isinstance(tokens, int) else answered.tokens


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@contextmanager
def _as_errors(engine: str) -> Iterator[None]:
    """Turn what a gateway would answer with into the errors of this program."""
    try:
        yield
    except EngineDownError as error:
        raise LocalIOError(engine, f"does not answer for now ({error})") from error
    except ProblemError as error:
        kind: type[AdapterhubError] = RefusedError if error.status < 500 else LocalIOError
        raise kind("", error.message, code=error.code or "") from error
