"""SGLang, through its HTTP API (0.5.23 was read; it needs a GPU).

It takes a `model` without a colon for the base, whatever it says, and one with a colon for the adapter named after the first
colon. So an adapter is requested as `<the base's name>:<adapter>`, which SGLang looks at first and in which the adapter may
contain colons, and the base by exactly its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.errors import RefusedError

from . import EMBEDDINGS, Blend, EngineAnswer, error_text, own_prompts
from .api_paths import ENGINE_PATHS
from .attached_base import AttachedBase
from .engine_client import Client
from .server_engine import LoadingServer, check_available
from .server_process import Process

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec


class Sglang(LoadingServer):
    """The `Engine` for SGLang; `process` is None for the user's own server."""

    name = runtime = "sglang"
    can_blend = False
    paths = ENGINE_PATHS[name]
    forbidden_fields = frozenset(
        {"lora_path", "session_id", "session_params"}
    )  # a session would continue with others' keys and values

    def __init__(self, client: Client, process: Process | None, *, base: BaseSpec, max_adapters: int) -> None:
        super().__init__(client, process)
        self.max_adapters = self.slots = max_adapters
        self._base = AttachedBase(client, base, "an SGLang server", is_attached=process is None)

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The logarithms of the probabilities of its base for a fixed prompt; empty if they are not known."""
        return self._base.probabilities

    async def start(self) -> None:
        """Start it, and ask for the name of its base."""
        await super().start()
        self.context = await self._base.read()

    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter under a name."""
        status, document = await self.client.call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        check_available(status, f"loading {name}")
        if status != 200 and "already loaded" not in error_text(document):
            raise RefusedError(name, f"SGLang cannot load it ({error_text(document)})")

    async def forget(self, served: PreparedVersion) -> None:
        """Unload the version, which waits for the requests that use it."""
        async with self._lock_of(served.model):
            if served.model in self._loaded:
                self._loaded.discard(served.model)
                await self.client.call("POST", "/unload_lora_adapter", {"lora_name": served.model})

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request with a name that SGLang cannot take for the base."""
        self.check()
        body = own_prompts.with_options(path, body, own_prompts.prompt_of(path, body, blend), self.name)
        model = model_of(self._base.name, blend)
        # Embeddings repeat the path of the base as their model, whatever was requested.
        document, expected = ({**body, "model": model}, "") if path == EMBEDDINGS else (body, model)
        send = partial(self.client.request, path, document, expected)
        return await self.request_loaded(send, blend[0][0].model, blend[0][0].path) if blend else await send()


def model_of(base: str, blend: Blend) -> str:
    """Return the `model` by which SGLang knows a version, or its base."""
    return f"{base}:{blend[0][0].model}" if blend else base
