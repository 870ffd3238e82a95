"""Engines: programs and libraries that generate text, behind one small protocol.

    engine_for_base.py choosing the installed engine for a base, and opening it
    api_paths.py     which paths of the API each of them answers
    ignored_fields.py fields of requests that each of them ignores
    command_lines.py the command lines that start engines
    engine_client.py a client of an engine's server
    engine_stream.py its connections, over asyncio alone
    engine_pool.py   several servers as one engine; pooled_engine.py: one of them
    line_cutter.py   cutting a stream into lines
    server_engine.py what all server engines share, adapters that are loaded by name among it
    server_process.py a process that is restarted
    own_prompts.py   requests to versions that were trained with a chat template of their own, or with options of one
    rendered_prompts.py conversations rendered here, for vLLM
    attached_base.py the base of a server that somebody else has started: is it the one that adapters were checked against?
    llama_logprobs.py probabilities of llama-server in the form of OpenAI
    llama_server.py  llama.cpp's server: what its three engines share
    llama_router.py  a process for each version, behind its router; llama_preset.py: the file that names them
    llama_one_process.py one process for all
    llama_attached.py one that somebody else has started
    vllm.py          vLLM
    sglang.py        SGLang
    mlx.py           mlx-lm
    in_process.py    the reference host, or llama.cpp's library, in this process

An engine is given a version before the first request for it, by a name that no other version ever has. What it would ignore, or
answer with the base, is refused here with a message. Importing this package imports none of the engines.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.display import printable
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

Blend = tuple[tuple[PreparedVersion, float], ...]
"""The versions that answer a request: `()` is the base, one version with weight 1 that version, several a blend."""
REQUEST_HEADERS: ContextVar[Mapping[str, str]] = ContextVar("request_headers", default={})  # noqa: B039 - never changed
"""Headers for a server engine: which request of a client this is, and which trace it belongs to."""
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


class EngineDownError(Exception):
    """The engine does not answer for now; `seconds` until another try makes sense."""

    def __init__(self, problem: str, seconds: int = 2) -> None:
        super().__init__(problem)
        self.seconds = seconds


class EngineTimeoutError(EngineDownError):
    """The engine did not answer in time."""


class MissingVersionError(RefusedError):
    """The engine was started without a version, and loads none; another engine may have it."""

    default_code = "engine-without-version"


async def _do_nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """An engine's answer.

    Attributes:
        status: The HTTP status.
        media_type: The type of the body.
        body: Its bytes as they arrive; may raise EngineDownError.
        close: Cancels the work if the body is not read to its end.
        model: The `model` that documents with one must have, or they are another version's answer; empty for any.
        engine: The name of the engine, of several; else empty.
    """

    status: int
    media_type: str
    body: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]] = _do_nothing
    model: str = ""
    engine: str = ""


class Engine(Protocol):
    """A base model that answers with any version of its adapters.

    Attributes:
        name: The name in the option: `llama.cpp`, `vllm` …
        runtime: The runtime that versions are resolved for.
        max_adapters: The largest number of versions that it may hold.
        slots: The number of versions with which it answers at the same time.
        paths: The paths of the API that it answers.
        can_blend: Whether it answers with several versions at once.
        rereads_files: Whether it may still read the files of a version that it was told to forget.
        has_priorities: Whether it answers requests by their field `priority`, lower numbers first.
        forbidden_fields: Its own fields in a body that would choose an adapter, or a cache, regardless of `model`; refused.
        context: The tokens of a conversation, prompt and answer; 0 before it has started, or if it does not say.
        precision: The type of the base's weights as it computes with them, such as `float32`; empty if it does not say.
    """

    name: str
    runtime: str
    max_adapters: int
    slots: int
    paths: frozenset[str]
    can_blend: bool
    rereads_files: bool
    has_priorities: bool
    forbidden_fields: frozenset[str]
    context: int
    precision: str

    async def start(self) -> None:
        """Start it; LocalIOError or RefusedError if it cannot start."""

    async def close(self) -> None:
        """Stop it, and everything it has started."""

    async def healthy(self) -> bool:
        """Return whether it answers now."""

    async def ensure(self, served: PreparedVersion) -> None:
        """Make sure that it knows a version; return at once if it does.

        Raises:
            RefusedError: It cannot load the version.
            EngineDownError: It does not answer for now.
        """

    async def forget(self, served: PreparedVersion) -> None:
        """Forget a version that no request uses."""

    def pin(self, models: frozenset[str]) -> None:
        """Prefer these versions, by `PreparedVersion.model`, where it decides itself which ones stay in memory."""

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send a request to be answered with versions that it knows.

        Args:
            path: One of `paths`.
            body: A document of OpenAI's API; its `model` is not used.
            blend: The versions.

        Raises:
            EngineDownError: It does not answer for now.
            RefusedError: It cannot answer such a request.
        """


def error_text(document: Any) -> str:
    """Return an engine's reason for a failure as one line."""
    if isinstance(document, dict):
        inner = document.get("error", document)
        message = inner.get("message", inner.get("error_message", inner)) if isinstance(inner, dict) else inner
        document = message if isinstance(message, str) else json.dumps(message)
    return printable(" ".join(str(document).split()))[:500]
