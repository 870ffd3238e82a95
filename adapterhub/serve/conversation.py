"""A conversation with one model, or with two side by side, over a gateway in this process.

It uses the gateway like a client, but without HTTP in between: the same names, versions, checks and engines.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, LocalIOError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .engines import CHAT, EngineDownError, error_text
from .gateway import rewriting
from .gateway.app import engine_problem
from .gateway.front import GatewayRequest
from .gateway.gateway import Gateway
from .gateway.openai_errors import ProblemError, engine_failed

STOPPED = "stopped"
"""The `finish` of an answer that was stopped early."""
OnText = Callable[[int, str], object]
"""Callback that takes the number of a side, 0 or 1, and the next piece of its answer."""
OnEnd = Callable[[int, "ModelAnswer"], object]
"""Callback that takes the number of a side, and its finished answer."""
_DATA = b"data: {"


@dataclass
class ModelAnswer:
    """An answer.

    Attributes:
        model: The name that was asked for.
        version: What answered: a name with a digest, a blend of those, or the base's name; empty until it is known.
        tokens: The number of its tokens; None if the engine did not report it.
        seconds: The time from the question to the end of the answer.
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
    """The turns of a conversation, and the models that answer.

    Attributes:
        gateway: A gateway, to be started by `start`, in the event loop of all calls.
        models: The names of the models that answer, one or two.
        system: The system message; None for none.
        options: Fields of each request: `max_tokens`, `temperature`, `seed`.
    """

    gateway: Gateway
    models: list[str]
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    _turns: list[tuple[str, list[str]]] = field(default_factory=list, repr=False)

    async def start(self) -> None:
        """Start the engine; errors are those of `Gateway.start`, and LocalIOError if the engine does not answer."""
        with _translated_errors(self.gateway.engine.name):
            await self.gateway.start()

    async def use(self, model: str, side: int = 0) -> str:
        """Let a model answer from now on, as the first or beside it; return the version that its name means now.

        Raises:
            NotFoundError: There is no such version.
            RefusedError: The engine would not apply it as it was trained.
            LocalIOError: The engine does not answer.
        """
        with _translated_errors(self.gateway.engine.name):
            parts = await self.gateway.resolve_model(GatewayRequest(CHAT, {}, model=model))
            async with self.gateway.versions.use(parts):
                self.models[side:] = [model, *self.models[side + 1 :]]
        return self.gateway.version_of(parts)

    def clear(self) -> None:
        """Forget all turns."""
        self._turns.clear()

    async def ask(
        self, text: str, on_text: OnText = lambda _side, _piece: None, on_end: OnEnd = lambda _side, _answered: None
    ) -> list[ModelAnswer]:
        """Ask all models at the same time, and return their answers. Canceling stops them, and keeps what has arrived.

        Raises:
            NotFoundError: A version is gone.
            RefusedError: The engine refuses the request.
            LocalIOError: The engine does not answer for now. After each of these errors, the conversation is as it was before.
        """
        answers = [ModelAnswer(model) for model in self.models]
        tasks = [asyncio.create_task(self._answer(side, text, answer, on_text, on_end)) for side, answer in enumerate(answers)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:  # codespell:ignore
            pass  # the answers end here, and are kept
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        for task in tasks:
            task.result()
        # A turn without any text is dropped, so that the models never see an empty answer.
        if any(answer.text for answer in answers):
            self._turns.append((text, [answer.text for answer in answers]))
        return answers

    async def _answer(self, side: int, text: str, answer: ModelAnswer, on_text: OnText, on_end: OnEnd) -> None:
        """Fill in the answer of one side, reporting its pieces and its end."""
        started = time.monotonic()
        request = GatewayRequest(CHAT, {})
        body = {"model": answer.model, "messages": self._messages(side, text), **self.options}
        # Without this option, engines do not report the number of tokens of a stream.
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with _translated_errors(self.gateway.engine.name):
                async for event in self._events(request, body):
                    answer.version = request.version
                    _apply_event(event, answer, lambda piece: on_text(side, piece))
        except asyncio.CancelledError:  # codespell:ignore
            answer.finish = STOPPED
        answer.seconds = time.monotonic() - started
        on_end(side, answer)

    def _messages(self, side: int, text: str) -> list[dict[str, str]]:
        """Return the conversation as one side knows it; turns from before there were two sides are the same for both."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answers in self._turns:
            own_answer = answers[side] if side < len(answers) else answers[0]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": own_answer}]
        return [*messages, {"role": "user", "content": text}]

    async def _events(self, request: GatewayRequest, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the JSON documents of a stream."""
        async with self.gateway.open_answer(request, body) as answer:
            if answer.status != 200:
                raise engine_problem(answer, await rewriting.read_whole(answer.body))
            async for lines in rewriting.events(answer, request.version, rewriting.Usage(body)):
                for line in lines.split(b"\n"):
                    if line.startswith(_DATA):
                        yield json_file.parse_object(line[len(_DATA) - 1 :], "answer")


def _apply_event(event: Mapping[str, Any], answer: ModelAnswer, on_piece: Callable[[str], object]) -> None:
    """Add the content of a stream's event to an answer."""
    if event.get("error"):
        raise engine_failed(error_text(event))
    choices = event.get("choices")
    for choice in map(_object, choices if isinstance(choices, list) else []):
        answer.finish = str(choice.get("finish_reason") or answer.finish)
        piece = _object(choice.get("delta")).get("content")
        if piece and isinstance(piece, str):
            answer.text += piece
            on_piece(piece)
    tokens = _object(event.get("usage")).get("completion_tokens")
    answer.tokens = tokens if isinstance(tokens, int) else answer.tokens


def _object(value: object) -> Mapping[str, Any]:
    """Return `value` if it is an object, or an empty one."""
    return value if isinstance(value, Mapping) else {}


@contextmanager
def _translated_errors(engine: str) -> Iterator[None]:
    """Convert the errors that a gateway would send into errors of this package."""
    try:
        yield
    except EngineDownError as error:
        raise LocalIOError(engine, f"does not answer for now ({error})") from error
    except ProblemError as error:
        kind: type[AdapterhubError] = RefusedError if error.status < 500 else LocalIOError
        raise kind("", error.message, code=error.code or "") from error
