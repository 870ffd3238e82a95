"""llama-server's router, with a process for each version.

llama-server starts them itself, from a preset file that is read again while other versions answer. The base is shared through
the page cache. A version has its own keys and values because it has its own process. For CPUs: on a GPU each process would have
its own copy of the base.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.bases import base_prompts
from adapterhub_converters.containers import json_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import RefusedError

from . import Blend, EngineAnswer, EngineDownError, command_lines, error_text, llama_logprobs
from .api_paths import ENGINE_PATHS
from .llama_preset import BASE, preset, section_of
from .llama_server import POLL_SECONDS, LlamaCpp, LlamaServerOptions, client_and_process, context_of
from .server_engine import Server

log = logging.getLogger("adapterhub.serve.engine")
_LOAD_SECONDS = 120.0  # seconds for a version to be loaded
_MAX_ERROR = 1 << 20  # bytes of the router's answer with a failure
SILENCE = 60.0
"""Seconds after which the process of a version that answers nothing counts as hanging."""


class Router(LlamaCpp, Server):
    """The `Engine` with a process for each version, behind llama-server's router."""

    can_blend = False

    def __init__(self, options: LlamaServerOptions) -> None:
        self._options, self.precision = options, options.precision
        self.max_adapters = self.slots = options.max_adapters
        self._sections: dict[str, PreparedVersion] = {}
        self._answered_at: dict[str, float] = {}  # when the process of a section last answered
        self._changing = asyncio.Lock()
        self._file = options.folder / "llama-server.ini"
        client, process, port = client_and_process(options)
        super().__init__(client, process)
        process.ready = self._look
        process.words = command_lines.llama_router(options.binary, self._file, port, extra_words=options.extra_words)
        # A restarted router must find the versions that are known by then.
        process.before_start = self._begin
        self.paths = ENGINE_PATHS[
            "llama.cpp, reranking" if options.reranks else "llama.cpp, embeddings" if options.embeds else self.name
        ]

    async def start(self) -> None:
        """Start the router, and the process of the base."""
        await super().start()
        await self._load(BASE)
        await self._read_context()

    async def join(self) -> None:
        """Use the router that another process of this gateway has started, and gives its versions to."""
        self.process = None
        await self._read_context()

    async def _read_context(self) -> None:
        self.context = await context_of(self.client, f"/props?model={BASE}")

    def _begin(self) -> None:
        """Forget what the last router knew."""
        self._answered_at.clear()
        self._write()

    def _write(self) -> None:
        """Write the preset file."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        templates = {section: path for section, served in self._sections.items() if (path := self._write_template(served))}
        # Replaced as a whole, because the router may read it at any time.
        new = self._file.with_suffix(".new")
        new.write_text(preset(self._options, list(self._sections.values()), templates))
        new.replace(self._file)

    def _write_template(self, served: PreparedVersion) -> Path | None:
        """Write the chat template for the process of a version; None if that of the base does."""
        prompt = served.prompt
        if prompt.template is None and prompt.date is None:
            return None
        base_template = base_prompts.of_gguf(self._options.base).template if prompt.template is None else None
        template = prompt.as_template(base_template)
        if template is None:
            return None
        path = self._file.with_name(f"{served.digest.replace(':', '-')}.jinja")
        if not path.exists():
            # Under another name until it is complete: a disk may be full.
            new = path.with_suffix(".new")
            json_file.write_text(new, template)
            new.replace(path)
        return path

    async def _reload(self) -> None:
        """Write the preset file, and tell the router to read it again."""
        self._write()
        status, document = await self.client.call("GET", "/models?reload=1")
        if status != 200:
            raise EngineDownError(f"llama-server cannot read its presets: {error_text(document)}")

    async def ensure(self, served: PreparedVersion) -> None:
        """Add a section for the version, and wait until its process is loaded."""
        self.check()
        section = section_of(served)
        if section in self._sections or self.process is None:
            return
        async with self._changing:
            if section in self._sections:
                return
            self._sections[section] = served
            try:
                await self._reload()
            except BaseException:
                del self._sections[section]
                raise
        try:
            await self._load(section)
        except BaseException:
            # Shielded: a canceled request must not leave a section behind whose process never loads.
            await asyncio.shield(self.forget(served))
            raise

    async def _load(self, section: str) -> None:
        """Load a section, and wait until its process answers."""
        status, document = await self.client.call("POST", "/models/load", {"model": section})
        if status != 200:
            raise RefusedError(section, f"llama-server cannot load it ({error_text(document)})")
        async with asyncio.timeout(_LOAD_SECONDS):
            await self._wait_for(section, "loaded")
        self._answered_at[section] = time.monotonic()

    async def _wait_for(self, section: str, value: str) -> None:
        """Wait until a section is `loaded` or `unloaded`; RefusedError if its process fails."""
        while (state := await self._state(section)).get("value") != value:
            if state.get("failed"):
                raise RefusedError(section, f"llama-server cannot load it on {self._options.base}")
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> bool:
        """Return whether the router answers; start the process of a version again that has not answered for a while."""
        if not await self.client.answers("/health"):
            return False
        if self.process is not None and self.process.up:
            await asyncio.gather(*map(self._look_at, list(self._answered_at)))
        return True

    async def _look_at(self, section: str) -> None:
        """Start the process of a section again if it hangs, which the router does not notice."""
        if await self.client.answers(f"/props?model={quote(section)}"):
            self._answered_at[section] = time.monotonic()
        elif time.monotonic() - self._answered_at.get(section, math.inf) > SILENCE:
            log.error("%s has not answered for %.0f seconds; starting its process again", section, SILENCE)
            with suppress(EngineDownError, RefusedError, TimeoutError):
                async with self._changing, asyncio.timeout(_LOAD_SECONDS):
                    await self.client.call("POST", "/models/unload", {"model": section})
                    await self._wait_for(section, "unloaded")
                    await self._load(section)

    async def _state(self, section: str) -> Mapping[str, Any]:
        """Return the router's status of a section."""
        _, document = await self.client.call("GET", "/models")
        for model in document["data"] if isinstance(document, dict) else ():
            if model["id"] == section:
                status: Mapping[str, Any] = model["status"]
                return status
        raise EngineDownError(f"llama-server does not list {section}")

    async def forget(self, served: PreparedVersion) -> None:
        """Remove its section, which ends its process."""
        async with self._changing:
            self._answered_at.pop(section_of(served), None)
            if self._sections.pop(section_of(served), None) is not None and self.process is not None and self.process.up:
                await self._reload()

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request to the process of the version, and once more if it closed the connection before it answered.

        Raises:
            EngineDownError: The process has ended, and the router starts it again.
        """
        self.check()
        section = section_of(blend[0][0]) if blend else BASE
        sent_body = llama_logprobs.engine_body(path, body)
        answer = await self.client.request(path, sent_body, section)
        reason, answer = await _proxy_error(answer)
        if reason:  # a process that is short of time closes a connection whose request it has not read yet
            reason, answer = await _proxy_error(await self.client.request(path, sent_body, section))
        if reason:
            raise EngineDownError(f"the process of {section} does not answer ({reason})", 1)
        return llama_logprobs.in_openais_form(answer, path, body)


async def _proxy_error(answer: EngineAnswer) -> tuple[str, EngineAnswer]:
    """Return why the router did not reach the process, empty if it did, and the answer with its body still to be read."""
    if answer.status != 500:
        return "", answer
    content = bytearray()
    async for piece in answer.body:
        content += piece
        if len(content) > _MAX_ERROR:
            raise EngineDownError(f"llama-server reports an error in more than {_MAX_ERROR} bytes")

    async def pieces() -> AsyncIterator[bytes]:
        yield bytes(content)

    reason = printable(content.decode(errors="replace")) if content.startswith(b"proxy error: ") else ""
    return reason, replace(answer, body=pieces())
