"""vLLM: adapters by name in one process, loaded while it runs (0.32.0 was run, 0.33.0 read).

A name is told to it once and forever. Unloading makes it forget only the name, and it crashes when a name comes back while
something of the old one is left; so nothing is ever unloaded. It evicts weights by itself, and reads the folder again, which is
why the folder must stay. Where it would mix adapters into answers of the base (`vllm_build.py`), the base is requested through
an adapter of zeros.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.serve import vllm_rank
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters import runtime_commands
from adapterhub_converters.bases import base_prompts
from adapterhub_converters.errors import OutputExistsError, RefusedError

from . import Blend, EngineAnswer, error_text, rendered_prompts, vllm_build
from .api_paths import ENGINE_PATHS
from .attached_base import AttachedBase
from .engine_client import Client
from .server_engine import LoadingServer, check_available, models_of
from .server_process import Process

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_ABOVE_MAXIMUM = "is greater than max_lora_rank"  # how it refuses a rank (lora/peft_helper.py)


class Vllm(LoadingServer):
    """The `Engine` for vLLM.

    Args:
        process: Started and stopped with the engine; None for the user's own server.
        slots: Versions in a batch.
        base: The base, to create the adapter of zeros.
        folder: The folder for the adapter of zeros; it must exist as long as any vLLM that was told of it.
        max_rank: The largest rank that it was started for; 0 if that is not known.
        priorities: Whether it was started with `--scheduling-policy priority`; without that, it ignores priorities.
        has_plugin: Whether `adapterhub.serve.vllm_plugin` finds versions in it, for a server without our folders.
        takes_templates: Whether clients may send chat templates, programs that it runs without a limit.
    """

    name = runtime = "vllm"
    can_blend = False
    rereads_files = True  # other clients may use the same name
    paths = ENGINE_PATHS[name]
    forbidden_fields = frozenset(
        {"kv_transfer_params", "ec_transfer_params", "vllm_xargs"}
    )  # vllm_xargs can contain the other two
    max_adapters = 10_000  # it evicts by itself

    def __init__(
        self,
        client: Client,
        process: Process | None,
        *,
        base: BaseSpec,
        folder: Path,
        slots: int,
        max_rank: int = 0,
        priorities: bool = False,
        has_plugin: bool = False,
        takes_templates: bool = True,
    ) -> None:
        super().__init__(client, process)
        self._takes_templates = takes_templates
        self._renderer = rendered_prompts.Renderer(partial(base_prompts.of_spec, base))
        self._has_plugin, self.slots, self._max_rank, self.has_priorities = has_plugin, slots, max_rank, priorities
        self._spec, self._folder = base, folder
        self._zeros: Path | None = None
        self._base = AttachedBase(client, base, "a vLLM server", is_attached=process is None)

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The logarithms of the probabilities of its base for a fixed prompt; empty if they are not known."""
        return self._base.probabilities

    async def start(self) -> None:
        """Start it, and find out how its base must be requested."""
        await super().start()
        self.context = await self._base.read()
        if await vllm_build.mixes_base(self.client, self._spec):
            self._zeros = await asyncio.to_thread(zero_adapter, self._spec, self._folder)
            try:
                await self._ensure_loaded(self._zeros.name, self._zeros)
            except RefusedError as error:
                problem = (
                    "is older than 0.33, which answers for the base with adapters of the same batch; the adapter of zeros that "
                )
                hint = "Use vLLM 0.33 or later, or one that sees the files here"
                raise RefusedError(self.client.url, f"{problem}prevents it cannot be loaded: {error.what}", hint) from error
            self._base.probe_by(self._zeros.name)

    async def ensure(self, served: PreparedVersion) -> None:
        """Tell it the name and the folder of the version."""
        vllm_rank.check(served.ref, served.rank, self._max_rank)
        if self._has_plugin:
            self.check()
            return
        try:
            await super().ensure(served)
        except RefusedError as error:
            if _ABOVE_MAXIMUM in error.what:  # the maximum of somebody's own server is not known before
                hint = runtime_commands.vllm_rank_hint(served.rank)
                raise RefusedError(served.ref, error.what, hint, code=vllm_rank.ABOVE) from error
            raise

    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter under a name."""
        status, document = await self.client.call(
            "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
        )
        check_available(status, f"loading {name}")
        if status == 404 and "Not Found" in error_text(document):
            hint = "Start it with LoRA enabled, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise RefusedError(self.client.url, "does not load adapters while it runs", hint)
        if status != 200 and not await self._has_adapter(name, folder):
            raise RefusedError(name, f"vLLM cannot load it ({error_text(document)})")

    async def _has_adapter(self, name: str, folder: Path) -> bool:
        """Return whether it knows this name for this folder, from an earlier gateway."""
        return any(model["id"] == name and model.get("root") == str(folder) for model in await models_of(self.client))

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request with the immutable name and the prompt of its version."""
        self.check()
        if not self._takes_templates:
            rendered_prompts.refuse_template(body)
        body = await rendered_prompts.for_vllm(path, body, blend, self._spec, self._renderer)
        if blend:
            name, folder = blend[0][0].model, blend[0][0].path
        elif self._zeros:
            name, folder = self._zeros.name, self._zeros
            if name not in self._loaded:  # it was restarted
                await asyncio.to_thread(zero_adapter, self._spec, self._folder)
                await self._ensure_loaded(name, folder)
        else:
            return await self.client.request(path, body, self._base.name)
        return await self.request_loaded(partial(self.client.request, path, body, name), name, folder)


def zero_adapter(base: BaseSpec, folder: Path) -> Path:
    """Return a PEFT folder, created if necessary, with an adapter of zeros on one attention projection, named for its content.

    Raises:
        RefusedError: The base has no such layer.
    """
    import numpy as np

    from adapterhub_converters.containers import atomic, safetensors_file
    from adapterhub_converters.formats import peft

    modules = [name.removesuffix(".weight") for name in base.tensors if name.endswith((".q_proj.weight", ".o_proj.weight"))]
    if not modules:
        raise RefusedError(base.source, "has no layer for an adapter of zeros", "Use vLLM 0.33 or later")
    # The first by name, so that all gateways of a base create the same folder.
    module = min(modules)
    out_features, in_features = base.tensors[f"{module}.weight"].shape
    place = folder / f"adapterhub-zero-{hashlib.sha256(f'{module} {out_features} {in_features}'.encode()).hexdigest()[:12]}"
    if place.is_dir():
        return place
    arrays = {f"base_model.model.{module}.lora_A.weight": np.zeros((1, in_features), np.float32)}
    arrays |= {f"base_model.model.{module}.lora_B.weight": np.zeros((out_features, 1), np.float32)}
    # Rank 1 is enough for zeros.
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module.rpartition(".")[2]]}
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OutputExistsError), atomic.pending_output(place) as new_folder:  # another gateway may be faster
        safetensors_file.write(new_folder / peft.WEIGHTS, arrays, {"format": "pt"})
        (new_folder / peft.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    return place
