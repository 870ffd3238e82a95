"""What the gateway answers without the engine: its models, its health, its metrics, its page, and errors of all paths."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapterhub.evidence.version_names import VERSION_HEADER
from adapterhub.serve.engines.api_paths import RESPONSES
from adapterhub.version import __version__
from adapterhub_converters.containers import json_file, open_file
from adapterhub_converters.errors import AdapterhubError

from . import api_forms, deprecations, metrics, ollama
from .front import GatewayRequest, read_json
from .gateway import Gateway
from .openai_errors import ProblemError, not_served, problem_of

MAX_NAME_BODY = 64 << 10
"""Bytes of a body that has the name of a model."""
_MAX_TEXTS = {"label": 200, "comment": 10_000}  # characters
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


def _gateway(request: Request) -> Gateway:
    """Return the gateway of the application."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _problem(request: Request, error: Exception) -> Response:
    """Answer with an error."""
    problem = problem_of(error, "")
    return Response(
        api_forms.problem_body(problem, request.url.path, ""), problem.status, problem.headers(), "application/json"
    )


async def _unknown_route(request: Request, error: Exception) -> Response:
    """Answer a request for an unknown path, or with an unsupported method."""
    status = getattr(error, "status_code", 404)
    return await _problem(request, ProblemError(status, f"{request.method} {request.url.path[:200]} is not answered here"))


async def _models(request: Request) -> Response:
    """GET /v1/models: the models that the client may ask for."""
    gateway = _gateway(request)
    key = gateway.access.key_of(request.headers)
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
    gateway_request = GatewayRequest("", request.headers, gateway.access.key_of(request.headers), name)
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
    key = gateway.access.key_of(request.headers)
    with gateway.admit(key):
        models = await gateway.list_models(key)
    base, precision = gateway.settings.base_name, gateway.engine.precision
    digests = [(name, str(version.digest).partition(":")[2] if version else "") for name, version in models]
    entries = [ollama.model_entry(name, digest, "" if name == base else base, precision) for name, digest in digests]
    return JSONResponse({"models": entries})


async def _ollama_model(request: Request) -> Response:
    """POST /api/show: the version that a name means now."""
    gateway = _gateway(request)
    body = await read_json(request, MAX_NAME_BODY, gateway.access.key_of(request.headers))
    name = body.get("model") or body.get("name")
    if not isinstance(name, str):
        raise ProblemError(400, "`model` is missing, or not a text", param="model")
    version, base, headers = await _resolve(request, name)
    details = ollama.model_details(version, base, gateway.engine.precision, gateway.engine.context)
    return JSONResponse(details, headers=headers)


async def _ollama_version(request: Request) -> Response:
    """GET /api/version."""
    _gateway(request).access.key_of(request.headers)
    return JSONResponse({"version": __version__})


async def _stored_response(request: Request) -> Response:
    """/v1/responses/ID and what is below it: an engine would show responses of any version to any client."""
    _gateway(request).access.key_of(request.headers)
    raise ProblemError(404, "No responses are stored here; send the whole conversation", code="unsupported")


async def _feedback(request: Request) -> Response:
    """POST /v1/feedback: a client's feedback on an answer that it got."""
    gateway = _gateway(request)
    key = gateway.access.key_of(request.headers)
    body = await read_json(request, MAX_NAME_BODY, key)
    ident, score = body.get("id"), body.get("score")
    if not isinstance(ident, str) or not ident:
        raise ProblemError(400, "`id` is that of an answer, or its x-request-id", param="id")
    if not json_file.is_number(score) or not 0 <= score <= 1:
        raise ProblemError(400, "`score` is a number from 0, bad, to 1, good", param="score")
    texts = {name: body.get(name) or "" for name in ("label", "comment")}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > _MAX_TEXTS[name]:
            raise ProblemError(400, f"`{name}` is a text of at most {_MAX_TEXTS[name]:,} characters", param=name)
    with gateway.admit(key):
        answer = await gateway.add_feedback(key, ident, float(score), **texts)
    return JSONResponse(
        {"object": "feedback", "id": ident, "version": answer.version, "route": answer.route, "arm": answer.arm}
    )


async def _served(request: Request) -> Response:
    """GET /v1/served/ID: which version gave an answer to this client."""
    gateway = _gateway(request)
    key = gateway.access.key_of(request.headers)
    with gateway.admit(key):
        answer, feedback = await gateway.find_answer(key, request.path_params["id"][: _MAX_TEXTS["label"]])
    return JSONResponse({"object": "served", **asdict(answer), "score": feedback.score if feedback else None})


async def _rollouts(request: Request) -> Response:
    """GET /v1/rollouts: where the rollouts of routes stand, for clients that may ask for everything."""
    gateway = _gateway(request)
    key = gateway.access.key_of(request.headers)
    if key is not None and key.allowed.patterns:
        raise not_served("/v1/rollouts")
    return JSONResponse({"object": "list", "data": gateway.rollouts.documents(), "shadows": gateway.shadows.documents()})


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
    document |= gateway.states()
    if not reason:
        return JSONResponse(document)
    return JSONResponse({**document, "reason": reason}, 503, {"retry-after": "2"})


async def _metrics(request: Request) -> Response:
    """GET /metrics: only for clients that may ask for everything, because it has the names of all models."""
    gateway = _gateway(request)
    key = gateway.access.key_of(request.headers)
    if key is not None and key.allowed.patterns:
        raise not_served("/metrics")
    return Response(gateway.metrics.page(), media_type=metrics.TYPE)


async def _page(request: Request) -> Response:
    """GET /: the page that asks adapters, one or two side by side."""
    name, kind = _PAGE[request.url.path]
    return Response(open_file.read_bytes(_FOLDER / name), media_type=kind, headers=_PAGE_HEADERS)


NAME_ROUTES = [
    Route(RESPONSES + "/{rest:path}", _stored_response, methods=["GET", "POST", "DELETE"]),
    Route("/api/tags", _ollama_models),
    Route("/api/show", _ollama_model, methods=["POST"]),
    Route("/api/version", _ollama_version),
    Route("/v1/feedback", _feedback, methods=["POST"]),
    Route("/v1/rollouts", _rollouts),
    Route("/v1/served/{id:path}", _served),
    Route("/v1/models", _models),
    Route("/v1/models/{model:path}", _model),
    Route("/ready", _ready),
    Route("/metrics", _metrics),
]
"""The paths that need the gateway's names, keys or counts."""
LOCAL_ROUTES = [*NAME_ROUTES, Route("/health", _health), *(Route(path, _page) for path in _PAGE)]
# Whatever has no route is answered in OpenAI's form too.
EXCEPTION_HANDLERS: Any = {ProblemError: _problem, AdapterhubError: _problem, 404: _unknown_route, 405: _unknown_route}
