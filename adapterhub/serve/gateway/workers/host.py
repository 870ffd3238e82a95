"""The process that owns the engine: the gateway that all workers ask, and the start and the end of all."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp

from adapterhub.http_server.binding import Socket
from adapterhub.http_server.request_bodies import BodyBudget, BodyGuard
from adapterhub.serve.engines import REQUEST_HEADERS, Blend, Engine
from adapterhub.serve.engines.engine_pool import EnginePool
from adapterhub.serve.gateway.front import GatewayRequest, body_limits
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.local_routes import EXCEPTION_HANDLERS, NAME_ROUTES
from adapterhub.serve.gateway.openai_errors import ProblemError, problem_of
from adapterhub.serve.usage.token_counts import TokenCounts
from adapterhub_converters.containers import atomic
from adapterhub_converters.errors import LocalIOError

from . import messages
from .channel import ChannelLostError, Conversation, Message, listening
from .processes import WorkerProcesses, fork_workers
from .worker import run_worker

log = logging.getLogger("adapterhub.serve.workers")
_request_log = logging.getLogger("adapterhub.serve.requests")
_LOST_STATUS = 500  # of a request whose worker has ended


class HostGateway(Gateway):
    """A gateway whose requests come from workers.

    Args:
        count: The number of workers.
        ready: Called once all of them answer.
    """

    def __init__(self, settings: GatewaySettings, engine: Engine, count: int, ready: Callable[[], object]) -> None:
        super().__init__(settings, engine)
        self._count, self._tell_ready = count, ready
        self._members: set[Conversation] = set()  # the workers that answer
        self._have_all_joined = False
        self._attended = 0  # requests of clients
        self.started = asyncio.Event()
        self._warn_of_shadows()
        self.is_ending = False

    async def not_ready_reason(self) -> str:
        """Return why requests are not answered now; a worker that is started again later holds nobody up."""
        if not (reason := await super().not_ready_reason()) and not self._have_all_joined:
            return "the workers are starting"
        return reason

    def states(self) -> dict[str, object]:
        """Return the number of workers that answer, beside the states of engines."""
        return {**super().states(), "workers": {"running": len(self._members), "of": self._count}}

    def reload(self) -> None:
        """Read the rules again, and tell the workers which engines there are."""
        super().reload()
        self._warn_of_shadows()
        for talk in self._members:
            talk.send(engines=messages.engines_document(self.routes.engines))

    def _warn_of_shadows(self) -> None:
        """Log that shadows get nothing: workers have the answers, and this process the versions."""
        if any(route.shadow for route in self.routes.routes.values()):
            log.error("a gateway of several workers sends nothing to shadows; start one process for them")

    async def attend(self, talk: Conversation, first: Message) -> None:
        """Attend one conversation of a worker."""
        match first["kind"]:
            case "join":
                await self._admit_worker(talk)
            case "request":
                self._attended += 1
                try:
                    await _HostedRequest(self, talk, first).attend()
                finally:
                    self._attended -= 1
            case "page":
                await self._answer_page(talk, first)

    def has_unrecorded(self) -> bool:
        """Return whether an answer runs, or is not recorded yet: a worker tells of it after the client has it."""
        return bool(self._attended)

    async def _admit_worker(self, talk: Conversation) -> None:
        """Tell a worker once the engine has started, and what may change later, until it ends."""
        await self.started.wait()
        if self.is_ending:
            talk.send(ends=True)
            return
        engines = messages.engines_document(self.routes.engines)
        probabilities = dict(self.engine.probabilities) if isinstance(self.engine, EnginePool) else {}
        facts = {"context": self.engine.context, "precision": self.engine.precision}
        talk.send(**facts, engines=engines, probabilities=probabilities)
        await talk.receive()
        self._members.add(talk)
        try:
            if len(self._members) == self._count and not self._have_all_joined:
                self._have_all_joined = True
                self._tell_ready()
            await talk.receive()
        finally:
            self._members.discard(talk)

    async def _answer_page(self, talk: Conversation, request: Message) -> None:
        """Answer a request for a path that needs no engine."""
        app = Starlette(routes=NAME_ROUTES, exception_handlers=EXCEPTION_HANDLERS)
        app.state.gateway = self
        status, headers, body = await _call(BodyGuard(app, BodyBudget(body_limits(self.settings))), request)
        talk.send(status=status, headers=headers, body=body.decode("latin-1"))


async def _call(app: ASGIApp, request: Message) -> tuple[int, dict[str, str], bytes]:
    """Let an application answer a request; return the status, the headers and the body."""
    answer: dict[str, Any] = {"body": b""}
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request["headers"].items()]
    scope = {"type": "http", "method": request["method"], "path": request["path"], "headers": headers, "query_string": b""}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(request["body"]).encode(), "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer["status"] = message["status"]
            answer["headers"] = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            answer["body"] += message.get("body", b"")

    await app(scope, receive, send)
    return answer["status"], answer["headers"], answer["body"]


class _HostedRequest:
    """A request of a client, as the host attends it for a worker."""

    def __init__(self, gateway: HostGateway, talk: Conversation, first: Message) -> None:
        self._gateway, self._talk, self._id = gateway, talk, first["id"]
        self._request = GatewayRequest(first["path"], first["headers"], id=first["id"])
        self._steps: asyncio.Queue[Message] = asyncio.Queue()
        self._is_recorded = False
        self._latest: Message | None = None  # the tokens as the worker reported them last
        self._engine = ""  # the one of several that answers

    async def attend(self) -> None:
        """Attend the request until the worker has recorded its end, or has ended itself."""
        holding = asyncio.create_task(self._hold())
        try:
            while (message := await self._talk.receive())["step"] != "end":
                match message["step"]:
                    case "leave":
                        holding.cancel()
                    case "tokens":
                        self._latest = message
                    case "settle":
                        self._record(message)
                        self._talk.send(settled=True)
                    case "answer":
                        self._count_running(message["engine"], 1)
                    case _:
                        self._steps.put_nowait(message)
            self._end(message["status"], message["first"], message["seconds"])
            self._gateway.record_outcome(self._request, messages.outcome_from(message["outcome"]))
            if isinstance(self._gateway.engine, EnginePool):
                self._gateway.engine.requests.update(message["asked"])
            self._record(message)
            tokens = messages.tokens_from(message["tokens"])
            self._gateway.record_answer(self._request, message["status"], message["seconds"], tokens, message["answer_id"])
        except ChannelLostError:
            self._end(_LOST_STATUS, None, 0.0)
        finally:
            self._record(self._latest or {"engine": "", "tokens": messages.tokens_document(TokenCounts())})
            self._count_running("", -1)
            holding.cancel()
            await asyncio.wait([holding])

    def _end(self, status: int, first: float | None, seconds: float) -> None:
        self._gateway.metrics.count(self._request.label, self._request.path, status, first, seconds)

    def _record(self, message: Message) -> None:
        """Count the tokens of the request, once."""
        if not self._is_recorded:
            self._is_recorded = True
            self._request.engine = message["engine"]
            self._gateway.record_tokens(self._request, messages.tokens_from(message["tokens"]))

    def _count_running(self, engine: str, change: int) -> None:
        """Count the request at the one of several engines that answers it."""
        name, self._engine = engine or self._engine, engine
        if isinstance(self._gateway.engine, EnginePool):
            for member in self._gateway.engine.members:
                if member.address.name == name:
                    member.running += change

    async def _hold(self) -> None:
        """Keep the request among those that run, and its versions in the engine, until this is canceled."""
        request, gateway, opening = self._request, self._gateway, False
        try:
            async with gateway.enter(request):
                self._talk.send(key=messages.key_document(request.key))
                step = await self._steps.get()
                request.model, request.expected_tokens, opening = step["model"], step["tokens"], True
                async with gateway.open_versions(request, step["identifiers"]) as blend:
                    self._talk.send(facts=messages.request_facts(request), blend=messages.blend_document(blend))
                    opening = False
                    while True:
                        await self._relay(await self._steps.get(), blend)
        except Exception as error:  # noqa: BLE001 - told to the worker, and logged
            facts = {"facts": messages.request_facts(request)} if opening else {}
            self._talk.send(problem=messages.problem_document(self._public(error), request.model), **facts)

    def _public(self, error: Exception) -> Exception:
        """Return the error that a client gets for one, and log one whose details are not for clients."""
        if not isinstance(error, messages.CAUGHT):
            _request_log.error("a request failed (%s)", self._id, exc_info=error)
            return ProblemError(500, f"internal error; the gateway's log has it as {self._id}", code="internal")
        problem = problem_of(error, self._request.model)
        if problem.status >= 500 and problem is not error:
            _request_log.warning("%s (%s)", error, self._id)
        return problem

    async def _relay(self, step: Message, blend: Blend) -> None:
        """Ask the engine for a worker, and pass the answer on."""
        headers: Mapping[str, str] = step["headers"]
        REQUEST_HEADERS.set(headers)
        answer = await self._gateway.engine.request(step["path"], step["body"], blend)
        head = {"status": answer.status, "media_type": answer.media_type, "model": answer.model, "engine": answer.engine}
        self._talk.send(**head)
        try:
            async for piece in answer.body:
                self._talk.send(piece=piece.decode("latin-1"))
            self._talk.send(finished=True)
        finally:
            await answer.close()


def run(
    settings: GatewaySettings, engine: Engine, sock: Socket, *, count: int, drain: int, ready: Callable[[], object]
) -> None:
    """Run a gateway of several workers until a signal stops it, or its engine cannot be started.

    Args:
        sock: The listening socket, which only the workers use.
        count: The number of workers.
        drain: Seconds for running requests at the end.
        ready: Called once all workers answer.
    """
    with atomic.scratch_folder(Path(tempfile.gettempdir(), "adapterhub-host")) as folder:
        path = folder / "host"
        # The bodies that one process may hold are shared among the workers; all other limits are counted in the host.
        worker_settings = replace(settings, bodies=max(settings.bodies // count, settings.max_body))
        work = partial(run_worker, worker_settings, engine, sock=sock, path=path, drain=drain)
        processes = fork_workers(count, work, sock.close)
        sock.close()
        originals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            number = asyncio.run(_run(lambda: HostGateway(settings, engine, count, ready), path, processes))
        finally:
            processes.stop()
            for signal_number, handler in originals.items():
                signal.signal(signal_number, handler)
        # As a server of one process ends.
        signal.raise_signal(number)


async def _run(make_gateway: Callable[[], HostGateway], path: Path, processes: WorkerProcesses) -> int:
    """Serve the workers; return the signal that ended it."""
    loop = asyncio.get_running_loop()
    stopping: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopping.done():
            stopping.set_result(number)

    def fail() -> None:
        loop.remove_reader(processes.life_end)
        if not stopping.done():
            stopping.set_exception(LocalIOError("workers", "the process that starts them has ended"))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    loop.add_reader(processes.life_end, fail)
    gateway = make_gateway()
    loop.add_signal_handler(signal.SIGHUP, gateway.reload)
    starting = asyncio.create_task(gateway.start())
    try:
        async with listening(path, gateway.attend):
            try:
                outcomes: tuple[asyncio.Future[Any], ...] = (starting, stopping)
                await asyncio.wait(outcomes, return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    gateway.started.set()
                return await stopping
            finally:
                loop.remove_reader(processes.life_end)
                gateway.is_ending = True
                gateway.started.set()  # for workers that wait for it
                await asyncio.to_thread(processes.stop)
    finally:
        starting.cancel()
        await asyncio.wait([starting])
        await gateway.close()
