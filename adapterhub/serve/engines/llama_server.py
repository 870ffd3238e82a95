"""llama.cpp's server, through its router or as one process (tools/server/README.md; b10434 and b11434 behave alike).

There are two forms, because it can silently answer a request wrongly in several ways (ggml-org/llama.cpp #26207, #28674):

`Router`: a process for each version, started by llama-server itself from a preset file that is read again while other versions
answer. The base is shared through the page cache. A version has its own keys and values because it has its own process. For
CPUs: on a GPU each process would have its own copy of the base.

`OneProcess`: one process with all adapters. Every request lists every adapter with its scale, even a request to the base
(without the list, or with an empty one, the answer uses whatever was last in its slot); each version has its own slot; the
cache in RAM, which compares only tokens, is off. Adapters load only when it starts: a new one starts a second process, and the
first ends with its last request. It ignores the list for embeddings and for Anthropic's messages, so it is not used for
any.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from adapterhub.http_server.binding import free_port
from adapterhub.serve import base_prompts
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import (
    Blend,
    EngineAnswer,
    EngineDownError,
    MissingVersionError,
    command_lines,
    error_text,
    llama_logprobs,
    own_prompts,
    rendered_prompts,
)
from .api_paths import ENGINE_PATHS
from .attached_base import MOST_PROBABLE, PROBE, BaseChecks
from .engine_client import Client, Connection
from .over_http import Process, Server, models_of

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

log = logging.getLogger("adapterhub.serve.engine")
_BASE = "base"
_POLL_SECONDS = 0.02  # seconds between two looks at a version that is being loaded, or at a process that is ending
_LOAD_SECONDS = 120.0  # seconds for a version to be loaded
_MAX_SLOTS = 16
SILENCE = 60.0
"""Seconds after which the process of a version that answers nothing counts as hanging."""


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


def section_of(served: PreparedVersion) -> str:
    """Return the name of a version in the preset file, without a colon: llama.cpp capitalizes what follows one."""
    return served.model.replace(":", "-")


def preset(
    options: LlamaServerOptions, versions: Sequence[PreparedVersion], templates: Mapping[str, Path] = MappingProxyType({})
) -> str:
    """Return the preset file: common settings, the base, and a section per version; RefusedError for an unsafe path.

    Args:
        options: The settings.
        versions: The versions.
        templates: The files of chat templates, by the sections whose process does not use that of the base.
    """
    # llama-server divides `c` among the requests that it answers at once.
    shared = {"model": options.base, "c": options.context * options.parallel, "np": options.parallel, "kv-unified": "false"}
    lines = ["version = 1", "", "[*]", *(f"{key} = {_line(value)}" for key, value in shared.items()), "", f"[{_BASE}]"]
    for served in versions:
        section = section_of(served)
        lines += ["", f"[{section}]", f"lora = {_line(served.path)}"]
        if section in templates:
            lines.append(f"chat-template-file = {_line(templates[section])}")
        if served.prompt.options:
            lines.append(f"chat-template-kwargs = {_json_line(dict(served.prompt.options))}")
    return "\n".join([*lines, ""])


def _line(value: object) -> str:
    """Return a value for a line of the preset file; RefusedError if it has characters with a meaning there."""
    text = str(value)
    if not text.isprintable() or text != text.strip() or set(text) & set(";#,"):
        raise RefusedError(text, "has characters that no preset of llama.cpp can have", "Choose another folder for the cache")
    return text


def _json_line(document: Mapping[str, Any]) -> str:
    """Return JSON for a line of the preset file, without the characters that begin a comment there."""
    return json.dumps(document).replace("#", "\\u0023").replace(";", "\\u003b")


class _LlamaCpp:
    """What the llama.cpp engines have in common."""

    name = runtime = "llama.cpp"
    forbidden_fields = frozenset({"lora", "id_slot", "cache_prompt"})


def _client_and_process(options: LlamaServerOptions) -> tuple[Client, Process, int]:
    """Return a client, the process that it talks to, still without a command line, and the port."""
    key, port = secrets.token_urlsafe(24), free_port()
    client = Client(f"http://127.0.0.1:{port}", key, patience=options.timeout)
    # At SIGTERM, its router sometimes locks itself up for good; its children end with its pipe to them.
    ready = partial(client.answers, "/health")
    return client, Process((), options.process_environ(key), ready, death_signal=signal.SIGKILL), port


class Router(_LlamaCpp, Server):
    """The `Engine` with a process for each version, behind llama-server's router."""

    can_blend = False

    def __init__(self, options: LlamaServerOptions) -> None:
        self._options, self.precision = options, options.precision
        self.max_adapters = self.slots = options.max_adapters
        self._sections: dict[str, PreparedVersion] = {}
        self._answered_at: dict[str, float] = {}  # when the process of a section last answered
        self._changing = asyncio.Lock()
        self._file = options.folder / "llama-server.ini"
        client, process, port = _client_and_process(options)
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
        await self._load(_BASE)
        await self._read_context()

    async def join(self) -> None:
        """Use the router that another process of this gateway has started, and gives its versions to."""
        self.process = None
        await self._read_context()

    async def _read_context(self) -> None:
        self.context = await _context_of(self.client, f"/props?model={_BASE}")

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
        template = prompt.template
        if template is None and prompt.date:
            template = base_prompts.of_gguf(self._options.base).template
        if template is None:
            return None
        path = self._file.with_name(f"{served.digest.replace(':', '-')}.jinja")
        if not path.exists():
            # Under another name until it is complete: a disk may be full.
            new = path.with_suffix(".new")
            json_file.write_text(new, base_prompts.with_date(template, prompt.date))
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
            await asyncio.sleep(_POLL_SECONDS)

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
        """Send the request to the process of the version."""
        self.check()
        section = section_of(blend[0][0]) if blend else _BASE
        answer = await self.client.request(path, llama_logprobs.engine_body(path, body), section)
        return llama_logprobs.in_openais_form(answer, path, body)


# ---- one process for all


def explicit_request(body: Mapping[str, Any], ids: Mapping[str, int], blend: Blend, *, slots: bool) -> dict[str, Any]:
    """Return a request that lists every adapter, with a slot for each version, or without any cache.

    Args:
        ids: Numbers of the adapters, by `Served.model`.
        slots: Whether the server has a slot for each adapter, one for the base and one for blends.
    """
    scales = dict.fromkeys(ids.values(), 0.0)
    for served, weight in blend:
        scales[ids[served.model]] = weight
    adapters = [{"id": number, "scale": scale} for number, scale in scales.items()]
    if not slots:
        return {**body, "lora": adapters, "cache_prompt": False}
    if len(blend) > 1 or (blend and blend[0][1] != 1):
        # Blends share one slot, so that what it has cached may be another blend's.
        return {**body, "lora": adapters, "id_slot": len(ids) + 1, "cache_prompt": False}
    return {**body, "lora": adapters, "id_slot": ids[blend[0][0].model] if blend else len(ids)}


class _RunningServer(Server):
    """A process and the numbers of its adapters; `requests` counts those in progress."""

    def __init__(self, client: Client, process: Process) -> None:
        super().__init__(client, process)
        self.ids: dict[str, int] = {}
        self.requests = 0


class OneProcess(_LlamaCpp):
    """The `Engine` with one process for all adapters, which is replaced when an adapter is added."""

    can_blend = True
    rereads_files = has_priorities = False
    paths = ENGINE_PATHS["llama.cpp, one process"]

    def __init__(self, options: LlamaServerOptions) -> None:
        if options.embeds:
            problem = "one llama-server applies all adapters to embeddings, whatever it is asked for"
            raise UsageError("llama.cpp", problem, "Start a process for each version", code="mixed-embeddings")
        self._options, self.context, self.precision = options, options.context, options.precision
        self.max_adapters = self.slots = min(options.max_adapters, _MAX_SLOTS)
        self._renderer = rendered_prompts.Renderer(partial(base_prompts.of_gguf, options.base))
        self._versions: dict[str, PreparedVersion] = {}
        self._current: _RunningServer | None = None
        self._changing = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start it without an adapter."""
        self._current = await self._start_server()
        self.context = await _context_of(self._current.client, "/props")

    async def close(self) -> None:
        """Stop it, and the processes that are still finishing requests."""
        for task in self._ending:
            task.cancel()
        if self._current is not None:
            await self._current.close()

    async def healthy(self) -> bool:
        """Return whether it answers."""
        return self._current is not None and await self._current.healthy()

    def pin(self, models: frozenset[str]) -> None:
        """Do nothing: all versions stay in memory until it is told to forget them."""

    def _running(self) -> _RunningServer:
        """Return the current process; EngineDownError before the first one."""
        if self._current is None:
            raise EngineDownError("the engine has not been started")
        return self._current

    async def _start_server(self) -> _RunningServer:
        """Start a process with all wanted versions."""
        client, process, port = _client_and_process(self._options)
        server = _RunningServer(client, process)

        def begin() -> None:  # also at a restart, which leaves out forgotten versions, whose files may be gone
            server.ids = {model: number for number, model in enumerate(self._versions)}
            process.words = self._words(port)

        process.before_start = begin
        try:
            await server.start()
        except BaseException:
            await client.close()
            raise
        return server

    def _words(self, port: int) -> list[str]:
        """Return the command line of a process with all wanted versions."""
        adapters, options = [_line(served.path) for served in self._versions.values()], self._options
        slots = len(adapters) + 2  # one for the base, and one for blends
        command_line = partial(command_lines.llama_server, context=options.context, slots=slots, adapters=adapters)
        return command_line(options.binary, options.base, port, template=self._template(), extra_words=options.extra_words)

    def _template(self) -> Path | None:
        """Write the chat template of a process in which versions have prompts of their own; None if none has."""
        prompts = [served.prompt for served in self._versions.values()]
        if not any(prompt.template or prompt.date for prompt in prompts):
            return None
        path = self._options.folder / "pass-through.jinja"
        path.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(path, rendered_prompts.pass_through(base_prompts.of_gguf(self._options.base).template))
        return path

    async def ensure(self, served: PreparedVersion) -> None:
        """Replace the process by one that also has the version, unless the current one has it."""
        self._running().check()
        self._versions[served.model] = served
        if served.model in self._running().ids:
            return
        async with self._changing:
            if served.model in self._running().ids:  # loaded with another version in the meantime
                return
            replacement = await self._start_with(served)
            previous, self._current = self._running(), replacement
            task = asyncio.create_task(self._drain(previous))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _start_with(self, served: PreparedVersion) -> _RunningServer:
        """Start a process with a version and those that wait for one; without those if it cannot start with them."""
        self._versions[served.model] = served
        while True:
            waiting = self._versions.keys() - self._running().ids.keys() - {served.model}
            try:
                return await self._start_server()
            except RefusedError:
                for model in waiting or {served.model}:
                    self._versions.pop(model, None)
                if not waiting:
                    raise

    async def _drain(self, server: _RunningServer) -> None:
        """Stop a process after its last request."""
        try:
            while server.requests:
                await asyncio.sleep(_POLL_SECONDS)
        finally:
            await asyncio.shield(server.close())

    async def forget(self, served: PreparedVersion) -> None:
        """Leave the version out of the next process."""
        self._versions.pop(served.model, None)

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Send the request with all adapters listed."""
        server = self._running()
        server.check()
        server.requests += 1
        try:
            body = await rendered_prompts.for_one_template(path, body, blend, self._renderer)
            engine_body = explicit_request(llama_logprobs.engine_body(path, body), server.ids, blend, slots=True)
            answer = llama_logprobs.in_openais_form(await server.client.request(path, engine_body), path, body)
        except BaseException:
            server.requests -= 1
            raise

        async def body_of() -> Any:
            async for piece in answer.body:
                yield piece

        async def close() -> None:
            server.requests -= 1
            await answer.close()

        return EngineAnswer(answer.status, answer.media_type, body_of(), close)


async def _context_of(client: Client | Connection, path: str) -> int:
    """Return the tokens of a conversation, which llama-server tells of each of its slots; 0 if it does not."""
    _, document = await client.call("GET", path)
    settings = document.get("default_generation_settings") if isinstance(document, dict) else None
    return int(settings.get("n_ctx") or 0) if isinstance(settings, dict) else 0


class AttachedServer(_LlamaCpp, Server):
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
        self.context = await _context_of(self.client, "/props")

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
