"""The gateway of a worker: the host decides about each request, and the worker asks the engine.

An engine that is a server is asked directly. One that is a library in the host, or one llama-server for all versions, which the
host replaces while it runs, is asked through the host.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from adapterhub.serve.engines import REQUEST_HEADERS, Blend, Engine, EngineAnswer
from adapterhub.serve.engines.engine_pool import EnginePool
from adapterhub.serve.engines.server_engine import Server
from adapterhub.serve.gateway import spans
from adapterhub.serve.gateway.front import GatewayFront, GatewayRequest, read_json
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.local_routes import LOCAL_ROUTES, MAX_NAME_BODY, NAME_ROUTES
from adapterhub.serve.gateway.openai_errors import DOWN, ProblemError
from adapterhub.serve.gateway.route_file import Key
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.lazy_dataclass import dataclass

from . import messages
from .channel import Channel, ChannelLostError, Conversation, Message, connect

_REPORT_SECONDS = 1.0  # seconds between two reports of the tokens so far, which count if this process is killed
_talk: ContextVar[Conversation] = ContextVar("talk")  # of the request that is being answered


class RelayedEngine:
    """The `Engine` of the host, which asks it."""

    def __init__(self, engine: Engine) -> None:
        self.name, self.runtime, self.paths, self.can_blend = engine.name, engine.runtime, engine.paths, engine.can_blend
        self.max_adapters, self.slots = engine.max_adapters, engine.slots
        self.rereads_files, self.has_priorities = engine.rereads_files, engine.has_priorities
        self.forbidden_fields, self.context, self.precision = engine.forbidden_fields, engine.context, engine.precision

    async def start(self) -> None:
        """Do nothing: the host starts it."""

    async def close(self) -> None:
        """Do nothing: the host stops it."""

    async def healthy(self) -> bool:
        """Return whether the host has started it; the host knows whether it answers."""
        return True

    async def ensure(self, served: PreparedVersion) -> None:
        """Do nothing: the host gives it its versions."""

    async def forget(self, served: PreparedVersion) -> None:
        """Do nothing: the host decides which versions it forgets."""

    def pin(self, models: frozenset[str]) -> None:
        """Do nothing: the host pins versions."""

    async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
        """Let the host ask the engine with the versions that it keeps for this request."""
        talk = _talk.get()
        talk.send(step="request", path=path, body=body, headers=dict(REQUEST_HEADERS.get()))
        head = await _reply(talk)
        return EngineAnswer(head["status"], head["media_type"], _pieces(talk), model=head["model"], engine=head["engine"])


async def _pieces(talk: Conversation) -> AsyncIterator[bytes]:
    """Yield the pieces of an answer as the host passes them on."""
    while "piece" in (message := await _reply(talk)):
        yield message["piece"].encode("latin-1")


async def _reply(talk: Conversation) -> Message:
    """Return the next message of the host; ProblemError if it is an error."""
    message = await talk.receive()
    if "problem" in message:
        raise messages.problem_from(message["problem"])
    return message


@dataclass(slots=True)
class _OpenRequest:
    """A request that is being answered.

    Attributes:
        is_settled: Whether the host knows its tokens.
    """

    request: GatewayRequest
    talk: Conversation
    is_settled: bool = False


class WorkerGateway(GatewayFront):
    """The gateway of a worker.

    Args:
        engine: The engine as the host opened it, before it was started.
        path: The socket of the host.
        lost: Called if the host cannot be asked any more, so that another worker should take over.
    """

    def __init__(self, settings: GatewaySettings, engine: Engine, path: Path, lost: Callable[[], object]) -> None:
        super().__init__(settings, engine if isinstance(engine, Server | EnginePool) else RelayedEngine(engine))
        self._path, self._tell_lost = path, lost
        self._channel: Channel | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._requests: dict[int, _OpenRequest] = {}
        self._counted: Counter[str] = Counter()  # requests that the host knows of, by engine
        self._is_ready = False

    # ---- start and end

    async def start(self) -> None:
        """Connect to the host, and wait until it has started the engine."""
        channel = self._channel = await connect(self._path)
        self._tasks = [asyncio.create_task(channel.run()), asyncio.create_task(self._report())]
        membership = channel.begin()
        membership.send(kind="join")
        facts = await _reply(membership)
        if "ends" in facts:
            raise ChannelLostError("the gateway ends")
        if isinstance(self.engine, Server):
            await self.engine.join()
        elif isinstance(self.engine, EnginePool):
            self.engine.change(messages.engines_from(facts["engines"]))
            self.engine.right_probabilities = facts["probabilities"]
            await self.engine.start()
            self.engine.shuffle()
        else:
            self.engine.context, self.engine.precision = facts["context"], facts["precision"]
        self._is_ready = True
        membership.send(ready=True)
        self._tasks.append(asyncio.create_task(self._follow(membership)))

    async def _follow(self, membership: Conversation) -> None:
        """Use the engines of the route file, whenever they change."""
        try:
            while message := await membership.receive():
                if isinstance(self.engine, EnginePool):
                    self.engine.change(messages.engines_from(message["engines"]))
        except ChannelLostError:
            self._tell_lost()

    async def close(self) -> None:
        """Close the connections to the engine and to the host."""
        self._is_ready = False
        await self.engine.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def reload(self) -> None:
        """Do nothing: the host has the rules."""

    async def _report(self) -> None:
        """Tell the host the tokens of running answers, again and again."""
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            for opened in self._requests.values():
                if not opened.is_settled and opened.request.tokens.total:
                    opened.talk.send(step="tokens", **self._tokens(opened.request))

    # ---- requests

    def _begin(self) -> Conversation:
        """Begin a conversation with the host; ProblemError before the engine has started."""
        if self._channel is None or not self._is_ready:
            raise ProblemError(503, "The engine is starting", code=DOWN, seconds=2)
        return self._channel.begin()

    @asynccontextmanager
    async def enter(self, request: GatewayRequest) -> AsyncIterator[None]:
        """Let the host find the key of a request, and count the request until the context ends."""
        talk = self._begin()
        request.number = talk.number
        self._requests[talk.number] = _OpenRequest(request, talk)
        talk.send(kind="request", id=request.id, path=request.path, headers=dict(request.headers))
        try:
            key = (await _reply(talk))["key"]
            if key is not None:
                request.key, request.has_token_limits = Key(key["name"], priority=key["priority"]), key["counts"]
            yield
        finally:
            talk.send(step="leave")

    @asynccontextmanager
    async def open_versions(self, request: GatewayRequest, identifiers: Mapping[str, str]) -> AsyncIterator[Blend]:
        """Let the host find the versions that a request means, and keep them in the engine until the request ends."""
        talk = self._requests[request.number].talk
        with spans.span("load"):
            talk.send(step="open", model=request.model, identifiers=dict(identifiers), tokens=request.expected_tokens)
            message = await talk.receive()
            messages.set_facts(request, message["facts"])
            if "problem" in message:
                raise messages.problem_from(message["problem"])
            blend = messages.blend_from(message["blend"])
            for served, _ in blend:
                await self.engine.ensure(served)
        _talk.set(talk)
        yield blend

    @asynccontextmanager
    async def open_answer(self, request: GatewayRequest, body: Mapping[str, Any]) -> AsyncIterator[EngineAnswer]:
        """Ask the engine, and tell the host which one of several answers."""
        async with super().open_answer(request, body) as answer:
            if isinstance(self.engine, EnginePool):
                self._requests[request.number].talk.send(step="answer", engine=request.engine)
            yield answer

    async def settle(self, request: GatewayRequest) -> None:
        """Wait until the host has counted the tokens of an answer, if its key has a limit of them."""
        opened = self._requests[request.number]
        if request.has_token_limits and not opened.is_settled:
            opened.is_settled = True
            opened.talk.send(step="settle", **self._tokens(request))
            earlier = []  # the end of an answer that the host relays may be on its way
            while "settled" not in (message := await _reply(opened.talk)):
                earlier.append(message)
            for message in earlier:
                opened.talk.put(message)

    def record_end(self, request: GatewayRequest, status: int, first: float | None, seconds: float) -> None:
        """Let the host record a request that has ended."""
        opened = self._requests.pop(request.number, None)
        if opened is not None:  # else the host does not know of it
            fields: dict[str, Any] = {"status": status, "first": first, "seconds": seconds, "asked": self._newly_asked()}
            fields |= {"answer_id": request.usage.answer_id if request.usage else ""}
            fields |= {"outcome": messages.outcome_document(request.outcome(status, first, seconds))}
            opened.talk.send(step="end", **fields, **self._tokens(request))
            opened.talk.close()

    def _tokens(self, request: GatewayRequest) -> dict[str, Any]:
        return {"engine": request.engine, "tokens": messages.tokens_document(request.tokens)}

    def _newly_asked(self) -> dict[str, int]:
        """Return how many requests each of several engines was asked since the last call."""
        if not isinstance(self.engine, EnginePool):
            return {}
        new = self.engine.requests - self._counted
        self._counted = self.engine.requests.copy()
        return dict(new)

    # ---- paths without the engine

    def local_routes(self) -> list[BaseRoute]:
        """Return the paths that are answered without the engine, of which the host answers those about names."""
        forwarded = [Route(route.path, self._forward, methods=route.methods) for route in NAME_ROUTES]
        return [*(route for route in LOCAL_ROUTES if route not in NAME_ROUTES), *forwarded]

    async def _forward(self, request: Request) -> Response:
        """Pass a request on to the host."""
        talk = self._begin()
        try:
            body: Mapping[str, Any] = {}
            if request.method == "POST":
                # The host asks for the key.
                body = await read_json(request, MAX_NAME_BODY, None)
            talk.send(kind="page", method=request.method, path=request.url.path, headers=dict(request.headers), body=body)
            answer = await _reply(talk)
        finally:
            talk.close()
        return Response(answer["body"].encode("latin-1"), answer["status"], answer["headers"])
