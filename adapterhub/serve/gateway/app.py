"""The ASGI application of a gateway: the paths that its engine answers, with one log line for each request."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.evidence.version_names import VERSION_HEADER
from adapterhub.http_server.request_bodies import BodyBudget, BodyGuard, until_disconnect
from adapterhub.serve.engines import EngineAnswer, EngineDownError, error_text
from adapterhub.serve.engines.api_paths import ALL_PATHS, WITHOUT_MODEL, answers_no_such_path
from adapterhub_converters.containers import json_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, FormatError

from . import api_forms, deprecations, ollama, rewriting, spans, trace_context
from .cross_origin import CrossOrigin
from .front import GatewayFront, GatewayRequest, body_limits, read_json
from .local_routes import EXCEPTION_HANDLERS, LOCAL_ROUTES
from .openai_errors import DOWN, ProblemError, engine_failed, problem_of

_log = logging.getLogger("adapterhub.serve.requests")
# What llama-server (b10434) says with status 500 of a request that it can never answer; clients would repeat it.
_UNSUPPORTED = (" input is not supported", "Failed to parse tools")
_INCOMPLETE = "' is required"
# The second is vLLM's type for embeddings as bytes, which name no model.
_JSON, _RAW = "application/json", "application/octet-stream"


def create_app(
    gateway: GatewayFront,
    *,
    ready: Callable[[], object] = lambda: None,
    failed: Callable[[BaseException], object] = lambda _: None,
    local_routes: Sequence[BaseRoute] = LOCAL_ROUTES,
    starts_first: bool = False,
) -> ASGIApp:
    """Create the application, whose engine starts and stops with the server.

    Args:
        ready: Called once the engine answers.
        failed: Called with the error if the engine cannot be started.
        local_routes: What is answered without the engine.
        starts_first: Whether nothing is answered before the engine is.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.gateway = gateway
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reload)
        # In the background, so that /health, /ready and /metrics answer while the engine loads its model.
        starting = asyncio.create_task(gateway.start())

        def report_start(task: asyncio.Task[None]) -> None:
            if not task.cancelled():  # codespell:ignore
                error = task.exception()
                ready() if error is None else failed(error)

        starting.add_done_callback(report_start)
        if starts_first:
            await asyncio.wait([starting])
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.wait([starting])
            await gateway.close()

    routes = [
        *(Route(path, _Generation(path), methods=["POST"]) for path in sorted(ALL_PATHS)),
        *(Route(path, _OllamaGeneration(path), methods=["POST"]) for path in (ollama.CHAT_PATH, ollama.GENERATE_PATH)),
        *local_routes,
    ]
    budget = BodyBudget(body_limits(gateway.settings))
    middleware = [Middleware(BodyGuard, budget=budget, behind_proxy=gateway.settings.behind_proxy)]
    app = Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers=EXCEPTION_HANDLERS)
    app.router.redirect_slashes = False  # a redirect would go to the host that the client's own headers name
    return CrossOrigin(app, gateway.settings.cors) if gateway.settings.cors else app


class _Generation:
    """A path of the API that the engine answers."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive)
        gateway: GatewayFront = scope["app"].state.gateway
        with spans.request_span(gateway.settings.tracing, self._path, trace_context.read(request.headers)) as trace:
            name = trace_context.request_id(request.headers)
            await self._handle(gateway, request, GatewayRequest(self._path, request.headers, id=name, trace=trace), send)

    async def _handle(self, gateway: GatewayFront, request: Request, gateway_request: GatewayRequest, send: Send) -> None:
        """Answer a request, if only with an error, and record it."""
        reply = _Reply(send, self._path, gateway_request)
        try:
            async with gateway.enter(gateway_request):
                await self._answer(gateway, request, gateway_request, reply)
        except (ProblemError, EngineDownError, AdapterhubError) as error:
            problem = problem_of(error, gateway_request.model)
            gateway_request.failed = problem.status >= 500 or isinstance(error, AdapterhubError)
            if problem.status >= 500 and problem is not error:
                _log.warning("%s (%s)", error, reply.id)
            await reply.problem(problem, gateway_request.version)
        except (ClientDisconnect, OSError):
            gateway_request.left = True
            reply.status = reply.status or 499  # nginx's status for a client that has disconnected
        except Exception:
            gateway_request.failed = True
            _log.exception("a request failed (%s)", reply.id)
            if reply.status:
                raise
            problem = ProblemError(500, f"internal error; the gateway's log has it as {reply.id}", code="internal")
            await reply.problem(problem, gateway_request.version)
        finally:
            _record_end(gateway, request, gateway_request, reply)

    async def _answer(self, gateway: GatewayFront, request: Request, gateway_request: GatewayRequest, reply: _Reply) -> None:
        """Read the body, and answer unless the client disconnects."""
        body = await read_json(request, gateway.settings.max_body, gateway_request.key)
        await until_disconnect(request.receive, self._forward(gateway, gateway_request, body, reply))

    async def _forward(
        self,
        gateway: GatewayFront,
        gateway_request: GatewayRequest,
        body: Mapping[str, Any],
        reply: _Reply | ollama.TranslatedReply,
    ) -> None:
        """Ask the engine, and send its answer on, rewritten for the client."""
        with gateway.meter(gateway_request, body) as usage:
            async with gateway.open_answer(gateway_request, usage.engine_body()) as answer:
                copy = gateway.begin_copy(gateway_request, body) if answer.status == 200 else None
                usage.has_begun = answer.status == 200 and gateway_request.engine_path not in WITHOUT_MODEL
                kind = answer.media_type.partition(";")[0].strip().lower()
                if answer.status == 200 and kind == "text/event-stream":
                    async for piece in rewriting.events(answer, gateway_request.version, usage):
                        if not reply.status:  # only now, so that the headers and the first event are sent together
                            await reply.begin(gateway_request.version)
                        if usage.has_ended:
                            await gateway.settle(gateway_request)
                        await reply.send_piece(piece)
                        if copy is not None:
                            copy.add(piece)
                    await reply.end()
                    if copy is not None:
                        copy.send()
                    return
                whole = await rewriting.read_whole(answer.body)
            if answer.status != 200:
                raise engine_problem(answer, whole, f"{gateway.engine.name} does not answer {gateway_request.engine_path}")
            if kind != _RAW:
                kind, whole = _JSON, rewriting.rename_model(whole, gateway_request.version, usage, expected=answer.model)
            await gateway.settle(gateway_request)
            await reply.send_whole(200, kind, gateway_request.version, whole)
            if copy is not None:
                copy.add(whole)
                copy.send()


class _OllamaGeneration(_Generation):
    """A path of Ollama's API, which a chat or a completion of the engine answers."""

    async def _forward(
        self,
        gateway: GatewayFront,
        gateway_request: GatewayRequest,
        body: Mapping[str, Any],
        reply: _Reply | ollama.TranslatedReply,
    ) -> None:
        translation = ollama.Translation(self._path, body, gateway.engine.name, gateway.engine.context)
        gateway_request.engine_path = translation.path
        translated = ollama.TranslatedReply(cast(_Reply, reply), translation)
        await super()._forward(gateway, gateway_request, translation.body, translated)


def engine_problem(answer: EngineAnswer, whole: bytes, no_such_path: str = "") -> ProblemError:
    """Return the client's error for an error of the engine: what the client did wrong, or that the engine has failed.

    Args:
        no_such_path: What to say if the engine, as it was started, does not have the path.
    """
    try:
        document = json_file.parse(whole, "answer")
    except FormatError:
        document = whole.decode(errors="replace")
    words, error = error_text(document), document.get("error") if isinstance(document, dict) else None
    code, param = (error.get(name) if isinstance(error, dict) else None for name in ("code", "param"))
    if no_such_path and answers_no_such_path(answer.status, words):
        return ProblemError(404, f"{no_such_path} ({words})", code="unsupported")
    if answer.status in (429, 503):
        return ProblemError(answer.status, f"The engine is busy: {words}", code=DOWN, seconds=2)
    if answer.status == 500 and any(mark in words for mark in _UNSUPPORTED):
        return ProblemError(400, words, code="unsupported")
    if answer.status == 500 and words.endswith(_INCOMPLETE):
        return ProblemError(400, words, code="refused")
    # 401, 403 and 407 would be about the gateway's own access to the engine.
    if 400 <= answer.status < 500 and answer.status not in (401, 403, 407):
        code, param = (text[:80] if isinstance(text, str) else None for text in (code, param))
        return ProblemError(answer.status, words, code=code or "refused", param=param)
    return engine_failed(f"{answer.status} {words}")


class _Reply:
    """The reply to a client, with the headers that every reply has."""

    def __init__(self, send: Send, path: str, request: GatewayRequest) -> None:
        self._send, self._path, self._request = send, path, request
        self.id = request.id
        self.status = 0
        self.first: float | None = None
        self._streams = False

    async def send_whole(
        self, status: int, media_type: str, version: str, body: bytes, extra_headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a complete reply."""
        await self._head(status, media_type, version, {"content-length": str(len(body)), **(extra_headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(
        self, version: str, media_type: str = "text/event-stream", extra_headers: Mapping[str, str] | None = None
    ) -> None:
        """Begin a stream, of events unless it has another type."""
        self._streams = True
        await self._head(200, media_type, version, {"cache-control": "no-cache", **(extra_headers or {})})

    async def send_piece(self, body: bytes) -> None:
        """Send the next piece of the stream."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """End the stream."""
        self._streams = False
        await self._send({"type": "http.response.body", "body": body})

    async def problem(self, problem: ProblemError, version: str) -> None:
        """Send an error: as the reply, or as the last event of a stream that has begun."""
        with suppress(OSError, ClientDisconnect):
            if not self.status:
                body = api_forms.problem_body(problem, self._path, self.id)
                await self.send_whole(problem.status, _JSON, version, body, problem.headers())
            elif self._streams:
                await self.end(api_forms.problem_event(problem, self._path, self.id))

    async def _head(self, status: int, media_type: str, version: str, extra_headers: Mapping[str, str]) -> None:
        """Send the status and the headers."""
        self.status, self.first = status, time.monotonic()
        headers = {
            "content-type": media_type,
            trace_context.REQUEST_ID: self.id,
            **extra_headers,
            **({VERSION_HEADER: version} if version else {}),
            **({deprecations.HEADER: self._request.deprecated} if self._request.deprecated else {}),
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


def _record_end(gateway: GatewayFront, request: Request, gateway_request: GatewayRequest, reply: _Reply) -> None:
    """Count and log a request that has ended."""
    now = time.monotonic()
    first = reply.first and reply.first - gateway_request.started
    gateway.record_end(gateway_request, reply.status, first, now - gateway_request.started)
    address = request.client.host if request.client else ""
    key_name = gateway_request.key.name if gateway_request.key else ""
    tokens = gateway_request.tokens
    model, took = printable(gateway_request.model[:200]), round((now - gateway_request.started) * 1000, 1)
    fields = {
        "id": reply.id,
        "path": gateway_request.path,
        "model": model,
        "version": gateway_request.version,
        "status": reply.status,
        "ms": took,
    }
    fields |= {"first_ms": first and round(first * 1000, 1), "key": key_name, "address": address}
    fields |= {"route": gateway_request.route, "arm": gateway_request.arm, "engine": gateway_request.engine}
    fields |= tokens.fields()
    trace = gateway_request.trace
    if trace:
        fields |= {"trace_id": trace.trace_id, "span_id": trace.span_id}
    spans.annotate(fields)
    line = "%s %s -> %s %d %.1f ms %s %s (%s)"
    _log.info(
        line,
        gateway_request.path,
        model,
        gateway_request.version or "-",
        reply.status,
        took,
        tokens,
        key_name or "-",
        f"{reply.id}, trace {trace.trace_id}" if trace else reply.id,
        extra={"fields": fields},
    )
