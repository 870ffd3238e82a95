"""The ASGI application of a gateway: OpenAI's API over one `Gateway`, with bounded bodies and one log line per request."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from adapterhub.serve.engines import EngineAnswer, EngineDownError, error_text
from adapterhub.serve.engines.api_paths import ALL_PATHS, RESPONSES, WITHOUT_MODEL, answers_no_such_path
from adapterhub.serve.engines.engine_pool import EnginePool
from adapterhub.version import __version__
from adapterhub_converters.containers import json_file, open_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import AdapterhubError, FormatError

from . import api_forms, deprecations, metrics, ollama, rewriting, spans, trace_context
from .cross_origin import CrossOrigin
from .gateway import Gateway, GatewayRequest
from .problems import BUSY, DOWN, ProblemError, engine_failed, not_served, problem_of

_log = logging.getLogger("adapterhub.serve.requests")
VERSION_HEADER = "x-adapterhub-version"
_BODY_SECONDS = 60.0  # until the whole body must have arrived
_MEMORY = 8  # memory of a parsed document, as a multiple of the largest body
_PARSED_IN_THREAD = 64 << 10  # bytes; larger bodies are parsed in a thread, so that other requests go on
# What llama-server (b10434) says with status 500 of a request that it can never answer; clients would repeat it.
_UNSUPPORTED = (" input is not supported", "Failed to parse tools")
_INCOMPLETE = "' is required"
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
        # In the background, so that /health, /ready and /metrics answer while the engine loads its model.
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
        *(Route(path, _Generation(path), methods=["POST"]) for path in sorted(ALL_PATHS)),
        Route(RESPONSES + "/{rest:path}", _stored_response, methods=["GET", "POST", "DELETE"]),
        *(Route(path, _OllamaGeneration(path), methods=["POST"]) for path in (ollama.CHAT_PATH, ollama.GENERATE_PATH)),
        Route("/api/tags", _ollama_models),
        Route("/api/show", _ollama_model, methods=["POST"]),
        Route("/api/version", _ollama_version),
        Route("/v1/models", _models),
        Route("/v1/models/{model:path}", _model),
        Route("/health", _health),
        Route("/ready", _ready),
        Route("/metrics", _metrics),
        *(Route(path, _page) for path in _PAGE),
    ]
    problems: Any = {ProblemError: _problem, AdapterhubError: _problem, 404: _unknown_route, 405: _unknown_route}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=problems)
    app.router.redirect_slashes = False  # a redirect would go to the host that the client's own headers name
    return CrossOrigin(app, gateway.settings.cors) if gateway.settings.cors else app


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
        gateway: Gateway = scope["app"].state.gateway
        with spans.request_span(gateway.settings.tracing, self._path, trace_context.read(request.headers)) as trace:
            name = trace_context.request_id(request.headers)
            await self._handle(gateway, request, GatewayRequest(self._path, request.headers, id=name, trace=trace), send)

    async def _handle(self, gateway: Gateway, request: Request, gateway_request: GatewayRequest, send: Send) -> None:
        """Answer a request, if only with an error, and record it."""
        reply = _Reply(send, self._path, gateway_request)
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

    async def _forward(
        self, gateway: Gateway, gateway_request: GatewayRequest, body: Mapping[str, Any], reply: _Reply | ollama.TranslatedReply
    ) -> None:
        """Ask the engine, and send its answer on, rewritten for the client."""
        with gateway.meter(gateway_request, body) as usage:
            async with gateway.open_answer(gateway_request, usage.engine_body()) as answer:
                usage.has_begun = answer.status == 200 and gateway_request.path not in WITHOUT_MODEL
                kind = answer.media_type.partition(";")[0].strip().lower()
                if answer.status == 200 and kind == "text/event-stream":
                    async for piece in rewriting.events(answer, gateway_request.version, usage):
                        if not reply.status:  # only now, so that the headers and the first event are sent together
                            await reply.begin(gateway_request.version)
                        await reply.send_piece(piece)
                    await reply.end()
                    return
                whole = await rewriting.read_whole(answer.body)
            if answer.status != 200:
                raise engine_problem(answer, whole, f"{gateway.engine.name} does not answer {gateway_request.path}")
            if kind != _RAW:
                kind, whole = _JSON, rewriting.rename_model(whole, gateway_request.version, usage, expected=answer.model)
            await reply.send_whole(200, kind, gateway_request.version, whole)


class _OllamaGeneration(_Generation):
    """A path of Ollama's API, which a chat or a completion of the engine answers."""

    async def _forward(
        self, gateway: Gateway, gateway_request: GatewayRequest, body: Mapping[str, Any], reply: _Reply | ollama.TranslatedReply
    ) -> None:
        translation = ollama.Translation(self._path, body, gateway.engine.name, gateway.engine.context)
        gateway_request.path = translation.path
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


def _record_end(gateway: Gateway, request: Request, gateway_request: GatewayRequest, reply: _Reply) -> None:
    """Count and log a request that has ended."""
    now = time.monotonic()
    first = reply.first and reply.first - gateway_request.started
    gateway.metrics.count(gateway_request.label, gateway_request.path, reply.status, first, now - gateway_request.started)
    address = request.client.host if request.client else ""
    key_name = gateway_request.key.name if gateway_request.key else ""
    tokens = gateway.record_usage(gateway_request)
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


# ---- the other paths


def _gateway(request: Request) -> Gateway:
    """Return the gateway of the application."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _problem(request: Request, error: Exception) -> Response:
    """Answer with an error."""
    problem = problem_of(error, "")
    return Response(api_forms.problem_body(problem, request.url.path, ""), problem.status, problem.headers(), _JSON)


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
    name = request.path_params["model"]
    version, base, headers = await _resolve(request, name)
    return JSONResponse(_entry(name, version if base else "", base), headers=headers)


async def _resolve(request: Request, name: str) -> tuple[str, str, dict[str, str]]:
    """Return the version that a name means now, its base, empty for the base itself, and the headers of an answer about it."""
    gateway = _gateway(request)
    gateway_request = GatewayRequest("", request.headers, gateway.key_of(request.headers), name)
    try:
        with gateway.admit(gateway_request.key):
            parts = await gateway.resolve_model(gateway_request)
    except AdapterhubError as error:
        raise problem_of(error, name) from error
    version, deprecated = gateway.version_of(parts), deprecations.header_of(part for part, _ in parts)
    headers = {VERSION_HEADER: version, **({deprecations.HEADER: deprecated} if deprecated else {})}
    return version, gateway.settings.base_name if parts else "", headers


async def _ollama_models(request: Request) -> Response:
    """GET /api/tags: the models that the client may ask for."""
    gateway = _gateway(request)
    key = gateway.key_of(request.headers)
    with gateway.admit(key):
        models = await gateway.list_models(key)
    base, precision = gateway.settings.base_name, gateway.engine.precision
    digests = [(name, str(version.digest).partition(":")[2] if version else "") for name, version in models]
    entries = [ollama.model_entry(name, digest, "" if name == base else base, precision) for name, digest in digests]
    return JSONResponse({"models": entries})


async def _ollama_model(request: Request) -> Response:
    """POST /api/show: the version that a name means now."""
    gateway, raw = _gateway(request), bytearray()
    gateway.key_of(request.headers)
    bodies: _Bodies = request.app.state.bodies
    try:
        await _read(request, raw, bodies, gateway.settings.max_body)
        body = await _document(raw, gateway.settings.max_body)
    finally:
        bodies.give(len(raw))
    name = body.get("model") or body.get("name")
    if not isinstance(name, str):
        raise ProblemError(400, "`model` is missing, or not a text", param="model")
    version, base, headers = await _resolve(request, name)
    details = ollama.model_details(version, base, gateway.engine.precision, gateway.engine.context)
    return JSONResponse(details, headers=headers)


async def _ollama_version(request: Request) -> Response:
    """GET /api/version."""
    _gateway(request).key_of(request.headers)
    return JSONResponse({"version": __version__})


async def _stored_response(request: Request) -> Response:
    """/v1/responses/ID and what is below it: an engine would show responses of any version to any client."""
    _gateway(request).key_of(request.headers)
    raise ProblemError(404, "No responses are stored here; send the whole conversation", code="unsupported")


def _entry(name: str, version: str, parent: str) -> dict[str, Any]:
    """Return OpenAI's description of a model."""
    optional = {key: value for key, value in (("root", version), ("parent", parent)) if value}
    return {"id": name, "object": "model", "created": 0, "owned_by": "adapterhub", **optional}


async def _health(request: Request) -> Response:
    """GET /health: 200 as long as this process answers, whatever its engine does."""
    return JSONResponse({"status": "ok", "engine": _gateway(request).engine.name, "version": __version__})


async def _ready(request: Request) -> Response:
    """GET /ready: 200 while requests are answered, 503 with the reason if not."""
    gateway = _gateway(request)
    reason = await gateway.not_ready_reason()
    state = "not ready" if reason else "ready"
    document: dict[str, object] = {"status": state, "engine": gateway.engine.name, "version": __version__}
    document |= {"engines": gateway.engine.states()} if isinstance(gateway.engine, EnginePool) else {}
    if not reason:
        return JSONResponse(document)
    return JSONResponse({**document, "reason": reason}, 503, {"retry-after": "2"})


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
