"""Engines: programs and libraries that generate text, behind one small protocol.

    choosing.py      which one is installed, and how it is opened
    command_lines.py the words by which they are started
    over_http.py     what all engines that are servers share: a client, a process that is started again when it ends
    llama_server.py  llama.cpp's server: a process for each version behind its router, or one process for all
    vllm.py          vLLM
    sglang.py        SGLang
    mlx.py           mlx-lm
    in_process.py    the reference host, or llama.cpp's library, in this process

An engine is told of a version before it is asked, by a name that no other version ever has. What it would ignore or answer with
the base is refused here, in words. Importing this package imports none of them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from adapterhub.serve.served import Served
from adapterhub_converters.display import printable

Blend = tuple[tuple[Served, float], ...]
"""What a request is answered with: `()` is the base, one version with the weight 1 itself, several are a blend."""
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


class EngineDownError(Exception):
    """The engine does not answer for now; `seconds` until another try is worth it."""

    def __init__(self, what: str, seconds: int = 2) -> None:
        super().__init__(what)
        self.seconds = seconds


async def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine answers.

    Attributes:
        status: Of HTTP.
        media_type: Of the body.
        body: Its bytes, as they come; may raise EngineDownError.
        close: Ends the work on it, if the body is not read to its end.
        model: What its documents have as `model`, if they have one, or it is the answer of another version; empty for anything.
    """

    status: int
    media_type: str
    body: AsyncIterator[bytes]
    close: Callable[[], Awaitable[None]] = _nothing
    model: str = ""


class Engine(Protocol):
    """A base model that can be asked with any version of its adapters.

    Attributes:
        name: As in the option: `llama.cpp`, `vllm` …
        runtime: What versions are resolved for.
        most: How many versions it may be told of at once.
        slots: How many of them it answers with at the same time.
        paths: The paths of the API that it answers.
        blends: Whether it answers with several versions at once.
        keeps: Whether it may read the files of a version again that it was told to forget.
        own: Fields of its own in a body that choose an adapter, or a cache, past the names of versions; refused.
    """

    name: str
    runtime: str
    most: int
    slots: int
    paths: frozenset[str]
    blends: bool
    keeps: bool
    own: frozenset[str]

    async def start(self) -> None:
        """Get ready to be asked; LocalIOError or RefusedError if it cannot be."""

    async def close(self) -> None:
        """Stop it, and what it has started."""

    async def healthy(self) -> bool:
        """Return whether it answers now."""

    async def ensure(self, served: Served) -> None:
        """Have it know a version; return at once if it does.

        Raises:
            RefusedError: It cannot load the version.
            EngineDownError: It does not answer for now.
        """

    async def forget(self, served: Served) -> None:
        """Have it forget a version for which no request runs."""

    async def ask(self, path: str, body: Mapping[str, Any], blend: Blend) -> Answer:
        """Ask with versions that it knows.

        Args:
            path: One of `paths`.
            body: A document of OpenAI's API; what it names as `model` does not matter.
            blend: The versions.

        Raises:
            EngineDownError: It does not answer for now.
            RefusedError: It cannot answer this in the way that is asked.
        """


def words_of(document: Any) -> str:
    """What an engine gives as the reason of a failure, in one line."""
    if isinstance(document, dict):
        inner = document.get("error", document)
        found = inner.get("message", inner.get("error_message", inner)) if isinstance(inner, dict) else inner
        document = found if isinstance(found, str) else json.dumps(found)
    return printable(" ".join(str(document).split()))[:500]
