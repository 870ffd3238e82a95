"""A host in this process, the reference host or llama.cpp's library: its thread computes, other threads wait for results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub.serve.torch_engine import openai
from adapterhub.serve.torch_engine.openai import ApiError, Completion
from adapterhub.serve.torch_engine.streams import AnsweringHost

from . import Blend, EngineAnswer, EngineDownError, own_prompts
from .api_paths import ENGINE_PATHS

T = TypeVar("T")
WAITING = 256
"""The largest number of waiting requests, each of which takes a thread."""
_JSON, _EVENTS = "application/json", "text/event-stream"


class InProcess:
    """The `Engine` for a host in this process.

    Args:
        open_host: Loads the base.
        max_adapters: Versions in memory.
    """

    can_blend = True
    rereads_files = has_priorities = False
    paths = ENGINE_PATHS["in process"]
    forbidden_fields: frozenset[str] = frozenset()

    def __init__(
        self,
        name: str,
        runtime: str,
        open_host: Callable[[], AbstractContextManager[AnsweringHost]],
        *,
        slots: int,
        max_adapters: int,
    ) -> None:
        self.name, self.runtime, self.slots, self.max_adapters = name, runtime, slots, max_adapters
        self.context, self.precision = 0, ""
        self._open = open_host
        self._stack = ExitStack()
        self._host: AnsweringHost | None = None
        self._loaded: set[str] = set()
        # Some more threads than waiting requests, so that loading and canceling never wait for them.
        self._threads = ThreadPoolExecutor(WAITING + 64, "answer")

    async def start(self) -> None:
        """Load the base."""
        host = self._host = await self._in_thread(lambda: self._stack.enter_context(self._open()))
        self.context, self.precision = host.longest, host.precision

    async def close(self) -> None:
        """Stop the host, and end the remaining requests."""
        self._host = None
        await self._in_thread(self._stack.close)
        self._threads.shutdown(wait=False)

    async def healthy(self) -> bool:
        """Return whether the base is loaded."""
        return self._host is not None

    async def ensure(self, served: PreparedVersion) -> None:
        """Load the version into memory."""
        host = self._running()
        if served.model not in self._loaded:
            await self._in_thread(lambda: host.load(served.model, served.path))
            self._loaded.add(served.model)

    async def forget(self, served: PreparedVersion) -> None:
        """Drop the version."""
        self._loaded.discard(served.model)
        self._running().drop(served.model)

    def pin(self, models: frozenset[str]) -> None:
        """Keep these versions in memory, and in slots while others can be displaced."""
        if self._host is not None:
            self._host.pin(models)

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request to the host."""
        host, keyed_blend = self._running(), tuple((served.model, weight) for served, weight in blend)
        prompt = own_prompts.prompt_of(path, body, blend)
        try:
            completion = await self._submit(lambda: openai.submit(host, path, body, keyed_blend, "", prompt=prompt))
            if completion.stream:
                return EngineAnswer(200, _EVENTS, self._events(completion), _canceler(completion))
            try:
                return EngineAnswer(200, _JSON, _once(_bytes(await self._in_thread(completion.whole))))
            finally:
                completion.cancel()
        except ApiError as error:
            return EngineAnswer(error.status, _JSON, _once(_bytes(error.document)))

    async def _submit(self, submit: Callable[[], Completion]) -> Completion:
        """Submit a request in a thread; if its client stops waiting, it is canceled as soon as it is submitted."""
        future = self._threads.submit(submit)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:  # codespell:ignore
            future.add_done_callback(_cancel_completion)
            raise

    async def _events(self, completion: Completion) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        chunks: Iterator[Mapping[str, Any]] = completion.chunks()
        try:
            while (chunk := await self._in_thread(lambda: next(chunks, None))) is not None:
                yield b"data: " + _bytes(chunk) + b"\n\n"
        except ApiError as error:
            raise EngineDownError(str(error)) from error
        yield b"data: [DONE]\n\n"

    def _running(self) -> AnsweringHost:
        """Return the host; EngineDownError while it is not loaded."""
        if self._host is None:
            raise EngineDownError("the base is not loaded")
        return self._host

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Call a function in one of the threads, and wait for its result."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def torch_host(base: Path, *, slots: int, **options: Any) -> InProcess:
    """Return the reference host for a Hugging Face folder or a GGUF file; `options` are those of `torch_engine.open_host`."""
    from adapterhub.serve import torch_engine

    open_host = partial(
        torch_engine.open_host, base, slots=slots, waiting=WAITING, **options
    )  # it keeps in memory as many as fit
    return InProcess("torch", "peft", open_host, slots=slots, max_adapters=10_000)  # it keeps in memory what fits


def libllama(base: Path, *, max_adapters: int, **options: Any) -> InProcess:
    """Return llama.cpp's library for a GGUF file and `max_adapters` versions; `options` are those of `open_libllama`."""
    from adapterhub.serve.engines import libllama

    open_host = partial(libllama.open_libllama, base, waiting=WAITING, **options)
    return InProcess("llama.cpp", "llama.cpp", open_host, slots=max_adapters, max_adapters=max_adapters)


def _canceler(completion: Completion) -> Callable[[], Any]:
    """Return an async function that cancels a completion."""

    async def cancel() -> None:
        completion.cancel()

    return cancel


def _cancel_completion(future: Future[Completion]) -> None:
    """Cancel a completion whose client stopped waiting for it."""
    if not future.cancelled() and future.exception() is None:  # codespell:ignore
        future.result().cancel()


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _bytes(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
