"""llama.cpp's server, by its router or as one process (tools/server/README.md; b10434 and b11434 behave alike).

Two shapes, since a request to it answers wrongly in silence in more ways than one (ggml-org/llama.cpp #26207, #28674):

`Router`: a process for each version, started by llama-server itself from a preset file that is read again while others answer.
The base is shared through the page cache. A version has its own keys and values because it has its own process. For CPUs: on a
GPU each process would have its own copy of the base.

`OneProcess`: one process with all adapters. Every request lists every adapter with its scale, the base too (a request without
the list, or with an empty one, is answered with whatever was last in its slot); each version has a slot of its own; the cache
in RAM, which knows tokens alone, is off. Adapters load at its start only: a new one starts a second process, and the first ends
with its last request. It ignores the list where it is asked for embeddings, so it is not asked for any.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from adapterhub.http_server.binding import free_port
from adapterhub.serve.served import Served
from adapterhub_converters.errors import RefusedError, UsageError

from . import CHAT, COMPLETIONS, EMBEDDINGS, Answer, Blend, EngineDownError, command_lines, words_of
from .over_http import Client, Process, Server

_BASE = "base"
_LOADING = 0.02  # seconds between two looks at a version that is being loaded
_PATIENCE = 120.0  # seconds for one to be loaded
_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Options:
    """How llama-server is started.

    Attributes:
        binary: Its path.
        base: A GGUF file.
        folder: For its preset file.
        environ: Its environment.
        context: Tokens of a conversation; 0 for as many as the base was trained with.
        parallel: Requests that a process of the router answers at once.
        most: Versions at once.
        more: Words of its command line, as the user gave them.
    """

    binary: Path
    base: Path
    folder: Path
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    context: int = 4096
    parallel: int = 4
    most: int = 32
    more: tuple[str, ...] = ()

    @property
    def embeds(self) -> bool:
        """Whether it answers with embeddings, and with nothing else."""
        return command_lines.llama_embeds(self.more)

    def process_environ(self, key: str) -> dict[str, str]:
        """Its environment, with a key, so that only this gateway is answered, and its own libraries."""
        found = {**self.environ, "LLAMA_API_KEY": key}
        parts = [str(self.binary.resolve().parent), self.environ.get("LD_LIBRARY_PATH", "")]
        return {**found, "LD_LIBRARY_PATH": ":".join(part for part in parts if part)}


def section_of(served: Served) -> str:
    """The name of a version in the preset file, without a colon: llama.cpp writes what follows one in capitals."""
    return served.model.replace(":", "-")


def preset(options: Options, versions: Sequence[Served]) -> str:
    """The preset file: what all share, the base, and a section a version; RefusedError for a path that no line can have."""
    shared = {"model": options.base, "c": options.context, "np": options.parallel}
    lines = ["version = 1", "", "[*]", *(f"{key} = {_line(value)}" for key, value in shared.items()), "", f"[{_BASE}]"]
    for served in versions:
        lines += ["", f"[{section_of(served)}]", f"lora = {_line(served.path)}"]
    return "\n".join([*lines, ""])


def _line(value: object) -> str:
    text = str(value)
    if not text.isprintable() or text != text.strip() or set(text) & set(";#,"):
        raise RefusedError(text, "has characters that no preset of llama.cpp can have", "Choose another folder for the cache")
    return text


class _LlamaCpp:
    """What `Engine` has of llama.cpp, in each shape."""

    name = runtime = "llama.cpp"
    paths = frozenset({COMPLETIONS, CHAT})
    own = frozenset({"lora", "id_slot", "cache_prompt"})


def _started_by(options: Options) -> tuple[Client, Process, int]:
    """A client, the process that it asks, which has no command line yet, and its port."""
    key, port = secrets.token_urlsafe(24), free_port()
    client = Client(f"http://127.0.0.1:{port}", key)
    return client, Process((), options.process_environ(key), partial(client.answers, "/health")), port


class Router(_LlamaCpp, Server):
    """See `Engine`: a process for each version, behind llama-server's router."""

    blends = False

    def __init__(self, options: Options) -> None:
        self._options, self.most, self.slots = options, options.most, options.most
        self._known: dict[str, Served] = {}
        self._changing = asyncio.Lock()
        self._file = options.folder / "llama-server.ini"
        client, process, port = _started_by(options)
        super().__init__(client, process)
        process.words = command_lines.llama_router(options.binary, self._file, port, more=options.more)
        process.begun = self._write
        if options.embeds:
            self.paths = frozenset({EMBEDDINGS})

    async def start(self) -> None:
        """Start the router, and the process of the base."""
        await super().start()
        await self._load(_BASE)

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_text(preset(self._options, list(self._known.values())))
        new.replace(self._file)

    async def _reload(self) -> None:
        self._write()
        status, document = await self.client.call("GET", "/models?reload=1")
        if status != 200:
            raise EngineDownError(f"llama-server cannot read its presets: {words_of(document)}")

    async def ensure(self, served: Served) -> None:
        """Add a section for the version, and wait until its process is loaded."""
        self.check()
        section = section_of(served)
        if section in self._known:
            return
        async with self._changing:
            if section in self._known:
                return
            self._known[section] = served
            try:
                await self._reload()
            except BaseException:
                del self._known[section]
                raise
        try:
            await self._load(section)
        except BaseException:
            await asyncio.shield(self.forget(served))
            raise

    async def _load(self, section: str) -> None:
        status, document = await self.client.call("POST", "/models/load", {"model": section})
        if status != 200:
            raise RefusedError(section, f"llama-server cannot load it ({words_of(document)})")
        async with asyncio.timeout(_PATIENCE):
            while (state := await self._state(section)).get("value") != "loaded":
                if state.get("failed"):
                    raise RefusedError(section, f"llama-server cannot load it on {self._options.base}")
                await asyncio.sleep(_LOADING)

    async def _state(self, section: str) -> Mapping[str, Any]:
        _, document = await self.client.call("GET", "/models")
        for model in document["data"] if isinstance(document, dict) else ():
            if model["id"] == section:
                found: Mapping[str, Any] = model["status"]
                return found
        raise EngineDownError(f"llama-server does not list {section}")

    async def forget(self, served: Served) -> None:
        """Remove its section, which ends its process."""
        async with self._changing:
            if self._known.pop(section_of(served), None) is not None and self.process is not None and self.process.up:
                await self._reload()

    async def ask(self, path: str, body: Mapping[str, Any], blend: Blend) -> Answer:
        """Ask the process of the version."""
        self.check()
        return await self.client.ask(path, body, section_of(blend[0][0]) if blend else _BASE)


# ---- one process for all


def explicit(body: Mapping[str, Any], ids: Mapping[str, int], blend: Blend, *, slots: bool) -> dict[str, Any]:
    """A request that lists every adapter, with a slot of its own for each version, or without any cache.

    Args:
        ids: Numbers of the adapters, by `Served.model`.
        slots: Whether the server has a slot for each adapter, one for the base and one for blends.
    """
    scales = dict.fromkeys(ids.values(), 0.0)
    for served, weight in blend:
        scales[ids[served.model]] = weight
    listed = [{"id": number, "scale": scale} for number, scale in scales.items()]
    if not slots:
        return {**body, "lora": listed, "cache_prompt": False}
    if len(blend) > 1 or (blend and blend[0][1] != 1):
        return {**body, "lora": listed, "id_slot": len(ids) + 1, "cache_prompt": False}
    return {**body, "lora": listed, "id_slot": ids[blend[0][0].model] if blend else len(ids)}


class _Running(Server):
    """A process and the numbers of its adapters; `requests` are running."""

    def __init__(self, client: Client, process: Process) -> None:
        super().__init__(client, process)
        self.ids: dict[str, int] = {}
        self.requests = 0


class OneProcess(_LlamaCpp):
    """See `Engine`: one process with all adapters, replaced by another one when an adapter is added."""

    blends = True
    keeps = False

    def __init__(self, options: Options) -> None:
        if options.embeds:
            what = "one llama-server takes all adapters for embeddings, whatever it is asked for"
            raise UsageError("llama.cpp", what, "Have a process for each version", code="mixed-embeddings")
        self._options = options
        self.most = self.slots = min(options.most, _SLOTS)
        self._wanted: dict[str, Served] = {}
        self._now: _Running | None = None
        self._changing = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start it without an adapter."""
        self._now = await self._started()

    async def close(self) -> None:
        """End it, and those before it."""
        for task in self._ending:
            task.cancel()
        if self._now is not None:
            await self._now.close()

    async def healthy(self) -> bool:
        """Return whether it answers."""
        return self._now is not None and await self._now.healthy()

    def _running(self) -> _Running:
        if self._now is None:
            raise EngineDownError("the engine has not been started")
        return self._now

    async def _started(self) -> _Running:
        client, process, port = _started_by(self._options)
        running = _Running(client, process)

        def begin() -> None:  # what was forgotten is left out when it is started again, and its file may be gone
            running.ids = {model: number for number, model in enumerate(self._wanted)}
            process.words = self._words(port)

        process.begun = begin
        try:
            await running.start()
        except BaseException:
            await client.close()
            raise
        return running

    def _words(self, port: int) -> list[str]:
        adapters, options = [_line(served.path) for served in self._wanted.values()], self._options
        slots = len(adapters) + 2  # one for the base, and one for blends
        context = options.context or 4096
        return command_lines.llama_server(
            options.binary, options.base, port, context=context, slots=slots, adapters=adapters, more=options.more
        )

    async def ensure(self, served: Served) -> None:
        """Replace the process by one that has the version too, unless it is there."""
        self._running().check()
        self._wanted[served.model] = served
        if served.model in self._running().ids:
            return
        async with self._changing:
            if served.model in self._running().ids:  # with another that was asked for meanwhile
                return
            made = await self._started_with(served)
            before, self._now = self._running(), made
            task = asyncio.create_task(self._drained(before))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _started_with(self, served: Served) -> _Running:
        """Another process that has a version, and those that wait for one, too; without those, if it cannot be started so."""
        self._wanted[served.model] = served
        while True:
            others = self._wanted.keys() - self._running().ids.keys() - {served.model}
            try:
                return await self._started()
            except RefusedError:
                for model in others or {served.model}:
                    self._wanted.pop(model, None)
                if not others:
                    raise

    async def _drained(self, running: _Running) -> None:
        try:
            while running.requests:
                await asyncio.sleep(_LOADING)
        finally:
            await asyncio.shield(running.close())

    async def forget(self, served: Served) -> None:
        """Leave it out of the next process."""
        self._wanted.pop(served.model, None)

    async def ask(self, path: str, body: Mapping[str, Any], blend: Blend) -> Answer:
        """Ask with all adapters listed."""
        running = self._running()
        running.check()
        running.requests += 1
        try:
            answer = await running.client.ask(path, explicit(body, running.ids, blend, slots=True))
        except BaseException:
            running.requests -= 1
            raise

        async def body_of() -> Any:
            async for piece in answer.body:
                yield piece

        async def close() -> None:
            running.requests -= 1
            await answer.close()

        return Answer(answer.status, answer.media_type, body_of(), close)


class Attached(_LlamaCpp, Server):
    """See `Engine`: somebody's own llama-server, with the adapters that it was started with, files that were resolved for it.

    What its caches hold of requests that others send is unknown, so no request of ours uses them.
    """

    blends = keeps = True  # it is started again with the same files

    def __init__(self, url: str, key: str = "") -> None:
        super().__init__(Client(url, key))
        self._ids: dict[str, int] = {}
        self._paths: dict[str, int] = {}
        self.most = self.slots = 1024

    async def start(self) -> None:
        """Ask for its adapters."""
        status, document = await self.client.call("GET", "/lora-adapters")
        if status != 200 or not isinstance(document, list):
            raise RefusedError(self.client.url, f"does not list its adapters ({words_of(document)})", "Name a llama-server")
        self._paths = {str(Path(one["path"]).resolve()): int(one["id"]) for one in document}

    async def ensure(self, served: Served) -> None:
        """Find the version among its adapters; RefusedError if it was started without it."""
        if served.model in self._ids:
            return
        number = self._paths.get(str(served.path.resolve()))
        if number is None:
            hint = "Start it with this file among its adapters, or let the gateway start one"
            raise RefusedError(served.model, f"the llama-server at {self.client.url} was started without {served.path}", hint)
        self._ids[served.model] = number

    async def ask(self, path: str, body: Mapping[str, Any], blend: Blend) -> Answer:
        """Ask with all adapters listed, and without a cache."""
        others = {path: number for path, number in self._paths.items() if number not in self._ids.values()}
        return await self.client.ask(path, explicit(body, {**self._ids, **others}, blend, slots=False))
