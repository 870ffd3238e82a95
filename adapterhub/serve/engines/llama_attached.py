"""The user's own llama-server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.serve.prepared_versions import PreparedVersion

from . import Blend, EngineAnswer, MissingVersionError, error_text, llama_logprobs, own_prompts, rendered_prompts
from .api_paths import ENGINE_PATHS
from .attached_base import MOST_PROBABLE, PROBE, BaseChecks
from .engine_client import Client, Connection
from .llama_one_process import explicit_request
from .llama_server import LlamaCpp, context_of
from .server_engine import Server, models_of

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec


class AttachedServer(LlamaCpp, Server):
    """The `Engine` for the user's own llama-server, which was started with files that were resolved for it.

    It knows adapters by number, and other numbers once it is started again with another list; so each connection has the list
    of the process at its end. Its caches may hold anything from requests that others send, so our requests use no cache.
    """

    can_blend = rereads_files = True  # it may be restarted with the same files
    paths = ENGINE_PATHS["llama.cpp, one process"]

    def __init__(self, url: str, key: str = "", *, base: BaseSpec, patience: float | None = None) -> None:
        super().__init__(Client(url, key, patience=patience))
        self.client.greet = self._greet
        self._checks = BaseChecks(self.client, base)
        self.max_adapters = self.slots = 1024

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The logarithms of the probabilities of its base for a fixed prompt; empty if they are not known."""
        return self._checks.probabilities

    async def start(self) -> None:
        """Ask the server for its adapters and its base."""
        self.context = await context_of(self.client, "/props")

    async def _greet(self, connection: Connection) -> Mapping[Path, int]:
        """Compare the base of the process at the end of a connection, and return the numbers of its adapters by their files."""
        status, document = await connection.call("GET", "/lora-adapters")
        if status != 200 or not isinstance(document, list):
            self._checks.refuse(f"does not list its adapters ({error_text(document)})", "Name a llama-server")
        numbers = {Path(adapter["path"]).resolve(): int(adapter["id"]) for adapter in document}
        _, properties = await connection.call("GET", "/props")
        if isinstance(properties, dict) and properties.get("model_path"):
            self._checks.compare(str(properties["model_path"]))
        for model in await models_of(connection):
            self._checks.compare_sizes(model.get("meta") or {})
        if not self.client.is_connected:
            self._checks.compare_probabilities(await _probabilities(connection, numbers.values()))
        return numbers

    async def ensure(self, served: PreparedVersion) -> None:
        """Do nothing: whether the server was started with the version is known on the connection of each request."""

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request with all adapters listed, and without a cache."""
        body = own_prompts.with_options(
            path, body, own_prompts.prompt_of(path, body, blend), self.name, rendered_prompts.ONE_PROCESS_EACH
        )

        def body_for(numbers: Mapping[Path, int]) -> Mapping[str, Any]:
            ids = {served.model: _number_of(served, numbers) for served, _ in blend}
            others = {str(file): number for file, number in numbers.items() if number not in ids.values()}
            return explicit_request(llama_logprobs.engine_body(path, body), {**ids, **others}, blend, slots=False)

        return llama_logprobs.in_openais_form(await self.client.request_with(body_for, path), path, body)


def _number_of(served: PreparedVersion, numbers: Mapping[Path, int]) -> int:
    """Return the number of a version; MissingVersionError if the server was started without it."""
    number = numbers.get(served.path.resolve())
    if number is None:
        hint = f"Start it with {served.path} among its adapters, or let the gateway start one"
        raise MissingVersionError(served.model, "the llama-server was started without it", hint)
    return number


async def _probabilities(connection: Connection, numbers: Iterable[int]) -> Mapping[str, float]:
    """Return the logarithms of the probabilities of the most probable next tokens of the base; none if it says none."""
    off = [{"id": number, "scale": 0.0} for number in numbers]
    probe = {"prompt": PROBE, "n_predict": 1, "n_probs": MOST_PROBABLE, "temperature": 0, "lora": off, "cache_prompt": False}
    status, document = await connection.call("POST", "/completion", probe)
    try:
        most_probable = document["completion_probabilities"][0]["top_logprobs"] if status == 200 else []
        return {entry["token"]: float(entry["logprob"]) for entry in most_probable}
    except (KeyError, IndexError, TypeError, ValueError):
        return {}
