"""mlx-lm's server (0.32.2 was run): one model with one adapter at a time, reloaded at each change.

It takes the folder of an adapter in the request, and ignores it unless the request also names the base by its path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub.serve.prepared_versions import PreparedVersion

from . import Blend, EngineAnswer, own_prompts
from .api_paths import ENGINE_PATHS
from .engine_client import Client
from .server_engine import Server
from .server_process import Process


class Mlx(Server):
    """The `Engine` for mlx-lm.

    `process` is None for the user's own server, and `base` is what that server was started with.
    """

    name = runtime = "mlx"
    can_blend = False
    paths = ENGINE_PATHS[name]
    forbidden_fields = frozenset({"adapters", "draft_model", "num_draft_tokens"})
    max_adapters, slots = 10_000, 1  # it holds only one adapter, but needs no preparation

    def __init__(self, client: Client, process: Process | None, *, base: str) -> None:
        super().__init__(client, process)
        self._base = base

    async def ensure(self, served: PreparedVersion) -> None:
        """Do nothing: the request has the folder."""

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request with the base and the folder of the adapter."""
        self.check()
        body = own_prompts.with_options(path, body, own_prompts.prompt_of(path, body, blend), self.name)
        adapter_field = {"adapters": str(blend[0][0].path)} if blend else {}
        return await self.client.request(path, {**body, **adapter_field}, self._base)
