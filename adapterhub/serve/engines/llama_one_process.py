"""One llama-server with all adapters.

Every request lists every adapter with its scale, even a request to the base (without the list, or with an empty one, the answer
uses whatever was last in its slot); each version has its own slot; the cache in RAM, which compares only tokens, is off.
Adapters load only when it starts: a new one starts a second process, and the first ends with its last request. It ignores the
list for embeddings and for Anthropic's messages, so it is not used for any.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.bases import base_prompts
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError, UsageError

from . import Blend, EngineAnswer, EngineDownError, command_lines, llama_logprobs, rendered_prompts
from .api_paths import ENGINE_PATHS
from .engine_client import Client
from .llama_preset import preset_line
from .llama_server import POLL_SECONDS, LlamaCpp, LlamaServerOptions, client_and_process, context_of
from .server_engine import Server
from .server_process import Process

_MAX_SLOTS = 16


def explicit_request(body: Mapping[str, Any], ids: Mapping[str, int], blend: Blend, *, slots: bool) -> dict[str, Any]:
    """Return a request that lists every adapter, with a slot for each version, or without any cache.

    Args:
        ids: Numbers of the adapters, by `Served.model`.
        slots: Whether the server has a slot for each adapter, one for the base and one for blends.
    """
    scales = dict.fromkeys(ids.values(), 0.0)
    for served, weight in blend:
        scales[ids[served.model]] = weight
    adapters = [{"id": number, "scale": scale} for number, scale in scales.items()]
    if not slots:
        return {**body, "lora": adapters, "cache_prompt": False}
    if len(blend) > 1 or (blend and blend[0][1] != 1):
        # Blends share one slot, so that what it has cached may be another blend's.
        return {**body, "lora": adapters, "id_slot": len(ids) + 1, "cache_prompt": False}
    return {**body, "lora": adapters, "id_slot": ids[blend[0][0].model] if blend else len(ids)}


class _RunningServer(Server):
    """A process and the numbers of its adapters; `requests` counts those in progress."""

    def __init__(self, client: Client, process: Process) -> None:
        super().__init__(client, process)
        self.ids: dict[str, int] = {}
        self.requests = 0


class OneProcess(LlamaCpp):
    """The `Engine` with one process for all adapters, which is replaced when an adapter is added."""

    can_blend = True
    rereads_files = has_priorities = False
    paths = ENGINE_PATHS["llama.cpp, one process"]

    def __init__(self, options: LlamaServerOptions) -> None:
        if options.embeds:
            problem = "one llama-server applies all adapters to embeddings, whatever it is asked for"
            raise UsageError("llama.cpp", problem, "Start a process for each version", code="mixed-embeddings")
        self._options, self.context, self.precision = options, options.context, options.precision
        self.max_adapters = self.slots = min(options.max_adapters, _MAX_SLOTS)
        self._renderer = rendered_prompts.Renderer(partial(base_prompts.of_gguf, options.base))
        self._versions: dict[str, PreparedVersion] = {}
        self._current: _RunningServer | None = None
        self._changing = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start it without an adapter."""
        self._current = await self._start_server()
        self.context = await context_of(self._current.client, "/props")

    async def close(self) -> None:
        """Stop it, and the processes that are still finishing requests."""
        for task in self._ending:
            task.cancel()
        if self._current is not None:
            await self._current.close()

    async def healthy(self) -> bool:
        """Return whether it answers."""
        return self._current is not None and await self._current.healthy()

    def pin(self, models: frozenset[str]) -> None:
        """Do nothing: all versions stay in memory until it is told to forget them."""

    def _running(self) -> _RunningServer:
        """Return the current process; EngineDownError before the first one."""
        if self._current is None:
            raise EngineDownError("the engine has not been started")
        return self._current

    async def _start_server(self) -> _RunningServer:
        """Start a process with all wanted versions."""
        client, process, port = client_and_process(self._options)
        server = _RunningServer(client, process)

        def begin() -> None:  # also at a restart, which leaves out forgotten versions, whose files may be gone
            server.ids = {model: number for number, model in enumerate(self._versions)}
            process.words = self._words(port)

        process.before_start = begin
        try:
            await server.start()
        except BaseException:
            await client.close()
            raise
        return server

    def _words(self, port: int) -> list[str]:
        """Return the command line of a process with all wanted versions."""
        adapters, options = [preset_line(served.path) for served in self._versions.values()], self._options
        slots = len(adapters) + 2  # one for the base, and one for blends
        command_line = partial(command_lines.llama_server, context=options.context, slots=slots, adapters=adapters)
        return command_line(options.binary, options.base, port, template=self._template(), extra_words=options.extra_words)

    def _template(self) -> Path | None:
        """Write the chat template of a process in which versions have prompts of their own; None if none has."""
        prompts = [served.prompt for served in self._versions.values()]
        if not any(prompt.template or prompt.date for prompt in prompts):
            return None
        path = self._options.folder / "pass-through.jinja"
        path.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(path, rendered_prompts.pass_through(base_prompts.of_gguf(self._options.base).template))
        return path

    async def ensure(self, served: PreparedVersion) -> None:
        """Replace the process by one that also has the version, unless the current one has it."""
        self._running().check()
        self._versions[served.model] = served
        if served.model in self._running().ids:
            return
        async with self._changing:
            if served.model in self._running().ids:  # loaded with another version in the meantime
                return
            replacement = await self._start_with(served)
            previous, self._current = self._running(), replacement
            task = asyncio.create_task(self._drain(previous))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _start_with(self, served: PreparedVersion) -> _RunningServer:
        """Start a process with a version and those that wait for one; without those if it cannot start with them."""
        self._versions[served.model] = served
        while True:
            waiting = self._versions.keys() - self._running().ids.keys() - {served.model}
            try:
                return await self._start_server()
            except RefusedError:
                for model in waiting or {served.model}:
                    self._versions.pop(model, None)
                if not waiting:
                    raise

    async def _drain(self, server: _RunningServer) -> None:
        """Stop a process after its last request."""
        try:
            while server.requests:
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await asyncio.shield(server.close())

    async def forget(self, served: PreparedVersion) -> None:
        """Leave the version out of the next process."""
        self._versions.pop(served.model, None)

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request with all adapters listed."""
        server = self._running()
        server.check()
        server.requests += 1
        try:
            body = await rendered_prompts.for_one_template(path, body, blend, self._renderer)
            engine_body = explicit_request(llama_logprobs.engine_body(path, body), server.ids, blend, slots=True)
            answer = llama_logprobs.in_openais_form(await server.client.request(path, engine_body), path, body)
        except BaseException:
            server.requests -= 1
            raise

        async def body_of() -> Any:
            async for piece in answer.body:
                yield piece

        async def close() -> None:
            server.requests -= 1
            await answer.close()

        return EngineAnswer(answer.status, answer.media_type, body_of(), close)
