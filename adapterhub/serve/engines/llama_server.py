"""llama.cpp's server (tools/server/README.md; b10434 and b11434 behave alike): what the engines that are one have in common.

There are two forms, because it can silently answer a request wrongly in several ways (ggml-org/llama.cpp #26207, #28674):
`llama_router` has a process for each version, and `llama_one_process` one for all. `llama_attached` is one that somebody else
has started.
"""

from __future__ import annotations

import secrets
import signal
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from pathlib import Path

from adapterhub.http_server.binding import free_port
from adapterhub_converters.lazy_dataclass import dataclass

from . import command_lines
from .engine_client import Client, Connection
from .server_process import Process

POLL_SECONDS = 0.02
"""Seconds between two looks at a version that is being loaded, or at a process that is ending."""


@dataclass(frozen=True, slots=True)
class LlamaServerOptions:
    """The settings of llama-server.

    Attributes:
        binary: Its path.
        base: A GGUF file.
        folder: The folder for its preset file.
        environ: Its environment.
        context: Tokens of a conversation, for each of the requests at once.
        parallel: Requests that a process of the router answers at once.
        max_adapters: Versions at once.
        extra_words: Words of its command line, as the user gave them.
        precision: The type of the base's weights.
        timeout: Seconds until an answer must begin, and between two pieces of it; None for no limit.
    """

    binary: Path
    base: Path
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    context: int = 4096
    parallel: int = 4
    max_adapters: int = 32
    extra_words: tuple[str, ...] = ()
    precision: str = ""
    timeout: float | None = None

    @property
    def embeds(self) -> bool:
        """Whether it answers with embeddings only, or with ranks that it computes from them."""
        return command_lines.llama_embeds(self.extra_words)

    @property
    def reranks(self) -> bool:
        """Whether it answers with ranks only."""
        return command_lines.llama_reranks(self.extra_words)

    def process_environ(self, key: str) -> dict[str, str]:
        """Return its environment, with its own libraries, and with a key, so that it answers only this gateway."""
        environ = {**self.environ, "LLAMA_API_KEY": key}
        parts = [str(self.binary.resolve().parent), self.environ.get("LD_LIBRARY_PATH", "")]
        return {**environ, "LD_LIBRARY_PATH": ":".join(part for part in parts if part)}


class LlamaCpp:
    """What the llama.cpp engines have in common."""

    name = runtime = "llama.cpp"
    forbidden_fields = frozenset({"lora", "id_slot", "cache_prompt"})


def client_and_process(options: LlamaServerOptions) -> tuple[Client, Process, int]:
    """Return a client, the process that it talks to, still without a command line, and the port."""
    key, port = secrets.token_urlsafe(24), free_port()
    client = Client(f"http://127.0.0.1:{port}", key, patience=options.timeout)
    # At SIGTERM, its router sometimes locks itself up for good; its children end with its pipe to them.
    ready = partial(client.answers, "/health")
    return client, Process((), options.process_environ(key), ready, death_signal=signal.SIGKILL), port


async def context_of(client: Client | Connection, path: str) -> int:
    """Return the tokens of a conversation, which llama-server tells of each of its slots; 0 if it does not."""
    _, document = await client.call("GET", path)
    settings = document.get("default_generation_settings") if isinstance(document, dict) else None
    return int(settings.get("n_ctx") or 0) if isinstance(settings, dict) else 0
