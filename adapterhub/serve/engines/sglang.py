"""SGLang, through its HTTP API (0.5.23 was read; it needs a GPU).

It takes a `model` without a colon for the base, whatever it says, and one with a colon for the adapter named after the first
colon. So an adapter is requested as `<the base's name>:<adapter>`, which SGLang looks at first and in which the adapter may
contain colons, and the base by exactly its name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError

from . import CHAT, COMPLETIONS, EMBEDDINGS, Blend, EngineAnswer, error_text
from .over_http import Client, Process, Server, base_name


class Sglang(Server):
    """The `Engine` for SGLang; `process` is None for the user's own server."""

    name = runtime = "sglang"
    blends = False
    paths = frozenset({COMPLETIONS, CHAT, EMBEDDINGS})
    forbidden_fields = frozenset(
        {"lora_path", "session_id", "session_params"}
    )  # a session would continue with others' keys and values

    def __init__(self, client: Client, process: Process | None, *, most: int) -> None:
        super().__init__(client, process)
        self.most = self.slots = most
        self._base = ""
        self._loaded: set[str] = set()
        self._loading = asyncio.Lock()
        if process is not None:
            process.before_start = self._loaded.clear

    async def start(self) -> None:
        """Start it, and ask for the name of its base."""
        await super().start()
        self._base = await base_name(self.client, "an SGLang server")

    async def ensure(self, served: PreparedVersion) -> None:
        """Load the version."""
        self.check()
        async with self._loading:
            if served.model in self._loaded:
                return
            request = {"lora_name": served.model, "lora_path": str(served.path)}
            status, document = await self.client.call("POST", "/load_lora_adapter", request)
            if status != 200 and "already loaded" not in error_text(document):
                raise RefusedError(served.model, f"SGLang cannot load it ({error_text(document)})")
            self._loaded.add(served.model)

    async def forget(self, served: PreparedVersion) -> None:
        """Unload the version."""
        async with self._loading:
            if served.model in self._loaded:
                self._loaded.discard(served.model)
                await self.client.call("POST", "/unload_lora_adapter", {"lora_name": served.model})

    async def ask(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request with a name that SGLang cannot take for the base."""
        self.check()
        model = model_of(self._base, blend)
        if path == EMBEDDINGS:  # which repeat the path of the base as their model, whatever was requested
            return await self.client.ask(path, {**body, "model": model})
        return await self.client.ask(path, body, model)


def model_of(base: str, blend: Blend) -> str:
    """Return the `model` by which SGLang knows a version, or its base."""
    return f"{base}:{blend[0][0].model}" if blend else base
