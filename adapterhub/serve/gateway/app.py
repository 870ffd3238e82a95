"""The ASGI application of a gateway: OpenAI's API over one `Gateway`, with bounded bodies and one log line per request."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.serve.engines import CHAT, COMPLETIONS, EMBEDDINGS, EngineAnswer, EngineDownError, error_text
from adapterhub.serve.engines.engine_pool import EnginePool
from adapterhub.version import __version__
from adapterhub_converters.containers import json_file, open_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, FormatError

from . import metrics, rewriting
from .gateway import Gateway, GatewayRequest
from .problems import BUSY, DOWN, ProblemError, engine_failed, not_served, problem_of

_log = logging.getLogger("adapterhub.serve.requests")
VERSION_HEADER = "x-adapterhub-version"
_BODY_SECONDS = 60.0  # until the whole body must have arrived
_MEMORY = 8  # memory of a parsed document, as a multiple of the largest body
_PARSED_IN_THREAD = 64 << 10  # bytes; larger bodies are parsed in a thread, so that other requests go on
# What llama-server (b10434) says with status 500 of a request that it can never answer; clients would repeat it.
_UNSUPPORTED = (" input is not supported", "Failed to parse tools")
# The second is vLLM's type for embeddings as bytes, which name no model.
_JSON, _RAW = "application/json", "application/octet-stream"
_FOLDER = Path(__file__).parent / "page"
# The page for people, which uses the API like any other client.
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(
    gateway: Gateway, *, ready: Callable[[], object] = lambda: None, failed: Callable[[BaseException], object] = lambda _: None
) -> ASGIApp:
    """Create the application, whose engine starts and stops with the server.

    Args:
        ready: Called once the engine answers.
        failed: Called with the error if the engine cannot be started.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.gateway, app.state.bodies = gateway, _Bodies(gateway.settings.bodies)
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, gateway.reload)
        # In the background, so that /health and /metrics answer while the engine loads its model.
        starting = asyncio.create_task(gateway.start())

        def report_start(task: asyncio.Task[None]) -> None:
            if not task.cancelled():  # codespell:ignore
                error = task.exception()
                ready() if error is None else failed(error)

        starting.add_done_callback(report_start)
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.wait([starting])
            await gateway.close()

    # Everything else is answered by the exception handlers, in OpenAI's form.
    routes = [
        *(Route(path, _Generation(path), methods=["POST"]) for path in (COMPLETIONS, CHAT, EMBEDDINGS)),
        Route("/v1/models", _models),
        Route("/v1/models/{model:path}", _model),
        Route("/health", _health),
        Route("/metrics", _metrics),
        *(Route(path, _page) for path in _PAGE),
    ]
    problems: Any = {ProblemError: _problem, AdapterhubError: _problem, 404: _unknown_route, 405: _unknown_route}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=problems)
    app.router.redirect_slashes = False  # a redirect would go to the host that the client's own headers name
    return app


class _Bodies:
    """A budget for the bytes of all bodies that are being read or answered."""

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0

    def take(self, count: int) -> None:
        """Take a number of bytes; ProblemError if the budget does not allow it."""
        if self._used + count > self._most:
            raise ProblemError(429, "The gateway has too many large requests", code=BUSY, seconds=2)
        self._used += count

    def give(self, count: int) -> None:
        """Give back bytes that were taken."""
        self._used -= count


class _Generation:
    """A path of the API that the engine answers."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        request = Request(scope, receive)
        reply = _Reply(send)
        gateway_request = GatewayRequest(self._path, request.headers)
        gateway: Gateway = scope["app"].state.gateway
        try:
            gateway_request.key = gateway.key_of(gateway_request.headers)
            with gateway.admit(gateway_request.key):
                await self._answer(gateway, request, gateway_request, reply)
        except (ProblemError, EngineDownError, AdapterhubError) as error:
            problem = problem_of(error, gateway_request.model)
            if problem.status >= 500 and problem is not error:
                _log.warning("%s (%s)", error, reply.id)
            await reply.problem(problem, gateway_request.version)
        except (ClientDisconnect, OSError):
            reply.status = reply.status or 499  # nginx's status for a client that has disconnected
        except Exception:
            _log.exception("a request failed (%s)", reply.id)
            if reply.status:
                raise
            problem = ProblemError(500, f"internal error; the gateway's log has it as {reply.id}", code="internal")
            await reply.problem(problem, gateway_request.version)
        finally:
            _record_end(gateway, request, gateway_request, reply)

    async def _answer(self, gateway: Gateway, request: Request, gateway_request: GatewayRequest, reply: _Reply) -> None:
        """Read the body, and answer unless the client disconnects."""
        bodies: _Bodies = request.app.state.bodies
        raw = bytearray()
        try:
            await _read(request, raw, bodies, gateway.settings.max_body)
            body = await _document(raw, gateway.settings.max_body)
            await _until_disconnect(request.receive, self._forward(gateway, gateway_request, body, reply))
        finally:
            bodies.give(len(raw))
            raw.clear()  # now, not when the garbage collector finds an error that refers to it

    async def _forward(self, gateway: Gateway, gateway_request: GatewayRequest, body: Mapping[str, Any], reply: _Reply) -> None:
        """Ask the engine, and send its answer on, rewritten for the client."""
        with gateway.meter(gateway_request.key, body) as usage:
            async with gateway.open_answer(gateway_request, usage.engine_body()) as answer:
                usage.has_begun = answer.status == 200
                kind = answer.media_type.partition(";")[0].strip().lower()
                if usage.has_begun and kind == "text/event-stream":
                    async for piece in rewriting.events(answer, gateway_request.version, usage):
                        if not reply.status:  # only now, so that the headers and the first event are sent together
                            await reply.begin(gateway_request.version)
                        await reply.send_piece(piece)
                    await reply.end()
                    return
                whole = await rewriting.read_whole(answer.body)
            if answer.status != 200:
                raise engine_problem(answer, whole)
            if kind != _RAW:
                kind, whole = _JSON, rewriting.rename_model(whole, gateway_request.version, usage, expected=answer.model)
            await reply.send_whole(200, kind, gateway_request.version, whole)


def engine_problem(answer: EngineAnswer, whole: bytes) -> ProblemError:
    """Return the client's error for an error of the engine: what the client did wrong, or that the engine has failed."""
    try:
        document = json_file.parse(whole, "answer")
    except FormatError:
        document = whole.decode(errors="replace")
    words, error = error_text(document), document.get("error") if isinstance(document, dict) else None
    code, param = (error.get(name) if isinstance(error, dict) else None for name in ("code", "param"))
    if answer.status in (429, 503):
        return ProblemError(answer.status, f"The engine is busy: {words}", code=DOWN, seconds=2)
    if answer.status == 500 and any(mark in words for mark in _UNSUPPORTED):
        return ProblemError(400, words, code="unsupported")
    # 401, 403 and 407 would be about the gateway's own access to the engine.
    if 400 <= answer.status < 500 and answer.status not in (401, 403, 407):
        code, param = (text[:80] if isinstance(text, str) else None for text in (code, param))
        return ProblemError(answer.status, words, code=code or "refused", param=param)
    return engine_failed(f"{answer.status} {words}")


async def _read(request: Request, raw: bytearray, bodies: _Bodies, most: int) -> None:
    """Read a body into `raw`; ProblemError for one that is too large or too slow."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                if len(raw) + len(piece) > most:
                    raise _too_large(most)
                # Counted as it arrives, because a client may declare another length, or none.
                bodies.take(len(piece))
                raw += piece
    except TimeoutError as error:
        raise ProblemError(408, f"The body took more than {_BODY_SECONDS:.0f} seconds", code="timeout") from error


def _too_large(most: int) -> ProblemError:
    return ProblemError(413, f"A body has at most {most:,} bytes", code="too_large")


async def _document(raw: bytearray, most: int) -> Mapping[str, Any]:
    """Parse a body as a JSON object; ProblemError for a malformed one."""

    def parse() -> dict[str, Any]:
        return json_file.parse_object(bytes(raw), "body", memory=_MEMORY * most)

    try:
        return parse() if len(raw) < _PARSED_IN_THREAD else await asyncio.to_thread(parse)
    except FormatError as error:
        raise ProblemError(400, str(error), code="invalid_json") from error


async def _until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, but cancel it and raise ClientDisconnect if the client closes the connection before it is done."""

    async def wait_for_disconnect() -> None:
        """Wait until the client has disconnected."""
        while (await receive())["type"] != "http.disconnect":
            pass

    working, disconnect = asyncio.create_task(work), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        disconnect.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Exception):  # codespell:ignore
                await working


class _Reply:
    """The reply to a client, with the headers that every reply has."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.id = secrets.token_hex(8)
        self.status = 0
        self.first: float | None = None
        self._streams = False

    async def send_whole(
        self, status: int, media_type: str, version: str, body: bytes, extra_headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a complete reply."""
        await self._head(status, media_type, version, {"content-length": str(len(body)), **(extra_headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def begin(self, version: str) -> None:
        """Begin a stream of events."""
        self._streams = True
        await self._head(200, "text/event-stream", version, {"cache-control": "no-cache"})

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
                await self.send_whole(problem.status, _JSON, version, problem.body(), problem.headers())
            elif self._streams:
                await self.end(b"data: " + problem.body() + b"\n\n")

    async def _head(self, status: int, media_type: str, version: str, extra_headers: Mapping[str, str]) -> None:
        """Send the status and the headers."""
        self.status, self.first = status, time.monotonic()
        headers = {
            "content-type": media_type,
            "x-request-id": self.id,
            **extra_headers,
            **({VERSION_HEADER: version} if version else {}),
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})


def _record_end(gateway: Gateway, request: Request, gateway_request: GatewayRequest, reply: _Reply) -> None:
    """Count and log a request that has ended."""
    now = time.monotonic()
    first = reply.first and reply.first - gateway_request.started
    gateway.metrics.count(gateway_request.label, gateway_request.path, reply.status, first, now - gateway_request.started)
    address = request.client.host if request.client else ""
    key_name = gateway_request.key.name if gateway_request.key else ""
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
    line = "%s %s -> %s %d %.1f ms %s (%s)"
    _log.info(
        line,
        gateway_request.path,
        model,
        gateway_request.version or "-",
        reply.status,
        took,
        key_name or "-",
        reply.id,
        extra={"fields": fields},
    )


# ---- the other paths


def _gateway(request: Request) -> Gateway:
    """Return the gateway of the application."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _problem(_request: Request, error: Exception) -> Response:
    """Answer with an error."""
    problem = problem_of(error, "")
    return Response(problem.body(), problem.status, problem.headers(), _JSON)


async def _unknown_route(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with an unsupported method."""
    status = getattr(error, "status_code", 404)
    return await _problem(request, ProblemError(status, f"{request.method} {request.url.path[:200]} is not answered here"))


async def _models(request: Request) -> Response:
    """GET /v1/models: the models that the client may ask for."""
    gateway = _gateway(request)
    key = gateway.key_of(request.headers)
    with gateway.admit(key):
        models = await gateway.list_models(key)
    base = gateway.settings.base_name
    data = [_entry(name, version.model if version else "", "" if name == base else base) for name, version in models]
    return JSONResponse({"object": "list", "data": data})


async def _model(request: Request) -> Response:
    """GET /v1/models/NAME: the version that a name means now."""
    gateway, name = _gateway(request), request.path_params["model"]
    gateway_request = GatewayRequest("", request.headers, gateway.key_of(request.headers), name)
    try:
        with gateway.admit(gateway_request.key):
            parts = await gateway.resolve_model(gateway_request)
    except AdapterhubError as error:
        raise problem_of(error, name) from error
    version = gateway.version_of(parts)
    document = _entry(name, version if parts else "", gateway.settings.base_name if parts else "")
    return JSONResponse(document, headers={VERSION_HEADER: version})


def _entry(name: str, version: str, parent: str) -> dict[str, Any]:
    """Return OpenAI's description of a model."""
    optional = {key: value for key, value in (("root", version), ("parent", parent)) if value}
    return {"id": name, "object": "model", "created": 0, "owned_by": "adapterhub", **optional}


async def _health(request: Request) -> Response:
    """GET /health: 200 while requests are answered."""
    gateway = _gateway(request)
    is_healthy = await gateway.healthy()
    state = "ok" if is_healthy else "loading" if not gateway.ready else "down"
    document: dict[str, object] = {"status": state, "engine": gateway.engine.name, "version": __version__}
    document |= {"engines": gateway.engine.states()} if isinstance(gateway.engine, EnginePool) else {}
    return JSONResponse(document, 200 if is_healthy else 503, {} if is_healthy else {"retry-after": "2"})


async def _metrics(request: Request) -> Response:
    """GET /metrics: only for clients that may ask for everything, because it has the names of all models."""
    gateway = _gateway(request)
    key = gateway.key_of(request.headers)
    if key is not None and key.allowed.patterns:
        raise not_served("/metrics")
    return Response(gateway.metrics.page(), media_type=metrics.TYPE)


async def _page(request: Request) -> Response:
    """GET /: the page that asks adapters, one or two side by side."""
    name, kind = _PAGE[request.url.path]
    return Response(open_file.read_bytes(_FOLDER / name), media_type=kind, headers=_PAGE_HEADERS)
