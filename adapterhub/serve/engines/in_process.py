"""A host in this process, the reference host or llama.cpp's library: its thread computes, ours wait for what it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapterhub.serve.host import openai
from adapterhub.serve.host.openai import ApiError, Completion
from adapterhub.serve.host.openai_request import CHAT, COMPLETIONS
from adapterhub.serve.host.streams import Answering
from adapterhub.serve.served import Served

from . import Answer, Blend, EngineDownError

T = TypeVar("T")
WAITING = 256
"""Requests that wait, a thread for each."""
_JSON, _EVENTS = "application/json", "text/event-stream"


class InProcess:
    """See `Engine`.

    Args:
        open_host: Loads the base.
        most: Versions in memory.
    """

    blends = True
    keeps = False
    paths = frozenset({COMPLETIONS, CHAT})
    own: frozenset[str] = frozenset()

    def __init__(
        self, name: str, runtime: str, open_host: Callable[[], AbstractContextManager[Answering]], *, slots: int, most: int
    ) -> None:
        self.name, self.runtime, self.slots, self.most = name, runtime, slots, most
        self._open = open_host
        self._stack = ExitStack()
        self._host: Answering | None = None
        self._known: set[str] = set()
        self._threads = ThreadPoolExecutor(WAITING + 64, "answer")

    async def start(self) -> None:
        """Load the base."""
        self._host = await self._in_thread(lambda: self._stack.enter_context(self._open()))

    async def close(self) -> None:
        """End the host, and the requests that are left."""
        self._host = None
        await self._in_thread(self._stack.close)
        self._threads.shutdown(wait=False)

    async def healthy(self) -> bool:
        """Return whether the base is loaded."""
        return self._host is not None

    async def ensure(self, served: Served) -> None:
        """Load the version into memory."""
        found = self._running()
        if served.model not in self._known:
            await self._in_thread(lambda: found.load(served.model, served.path))
            self._known.add(served.model)

    async def forget(self, served: Served) -> None:
        """Drop the version."""
        self._known.discard(served.model)
        self._running().drop(served.model)

    async def ask(self, path: str, body: Mapping[str, Any], blend: Blend) -> Answer:
        """Ask the host."""
        found, named = self._running(), tuple((served.model, weight) for served, weight in blend)
        try:
            completion = await self._begun(lambda: openai.ask(found, path, body, named, ""))
            if completion.stream:
                return Answer(200, _EVENTS, self._events(completion), _canceling(completion))
            try:
                return Answer(200, _JSON, _once(_bytes(await self._in_thread(completion.whole))))
            finally:
                completion.cancel()
        except ApiError as error:
            return Answer(error.status, _JSON, _once(_bytes(error.document)))

    async def _begun(self, ask: Callable[[], Completion]) -> Completion:
        """What a thread has asked for; if nobody waits for it any more, it is canceled as soon as it is there."""
        asking = self._threads.submit(ask)
        try:
            return await asyncio.wrap_future(asking)
        except asyncio.CancelledError:  # codespell:ignore
            asking.add_done_callback(_cancel_begun)
            raise

    async def _events(self, completion: Completion) -> AsyncIterator[bytes]:
        chunks: Iterator[Mapping[str, Any]] = completion.chunks()
        try:
            while (chunk := await self._in_thread(lambda: next(chunks, None))) is not None:
                yield b"data: " + _bytes(chunk) + b"\n\n"
        except ApiError as error:
            raise EngineDownError(str(error)) from error
        yield b"data: [DONE]\n\n"

    def _running(self) -> Answering:
        if self._host is None:
            raise EngineDownError("the base is not loaded")
        return self._host

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def torch_host(base: Path, *, slots: int, **options: Any) -> InProcess:
    """The reference host on a Hugging Face folder or a GGUF file; `options` are those of `host.opened`."""
    from adapterhub.serve import host

    opened = partial(host.opened, base, slots=slots, waiting=WAITING, **options)
    return InProcess("torch", "peft", opened, slots=slots, most=10_000)  # it keeps in memory what fits


def libllama(base: Path, *, most: int) -> InProcess:
    """llama.cpp's library on a GGUF file, with so many versions in memory."""
    from adapterhub.serve.host import libllama

    return InProcess("llama.cpp", "llama.cpp", partial(libllama.opened, base, waiting=WAITING), slots=most, most=most)


def _canceling(completion: Completion) -> Callable[[], Any]:
    async def cancel() -> None:
        completion.cancel()

    return cancel


def _cancel_begun(asking: Future[Completion]) -> None:
    if not asking.cancelled() and asking.exception() is None:  # codespell:ignore
        asking.result().cancel()


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _bytes(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
