"""What every process of a gateway has: a request is checked, answered by its engine, and its tokens are counted on the way."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import field
from functools import partial
from typing import Any

from starlette.requests import Request

from adapterhub.http_server.request_bodies import TOO_MANY, BodyError, BodyLimits, body_of
from adapterhub.serve.engines import REQUEST_HEADERS, Blend, Engine, EngineAnswer
from adapterhub.serve.engines.api_paths import WITHOUT_MODEL
from adapterhub.serve.engines.ignored_fields import fields_ignored
from adapterhub.serve.usage.token_counts import TokenCounts
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from . import api_forms, priorities, spans
from .access import ReservedTokens
from .gateway_settings import GatewaySettings
from .openai_errors import BUSY, ProblemError
from .rewriting import Usage
from .rollout_evidence import AnswerOutcome
from .rollouts import Choice
from .route_file import Key
from .shadows import RequestCopy
from .trace_context import REQUEST_ID, TraceContext

_MEMORY = 8  # memory of a parsed document, as a multiple of the largest body


def body_limits(settings: GatewaySettings) -> BodyLimits:
    """Return the limits on bodies: with keys, half of all for each of them, and for each address."""
    share = max(settings.bodies // 2, settings.max_body) if settings.routes else settings.bodies
    return BodyLimits(process=settings.bodies, address=share, account=share, stranger=share)


async def read_json(request: Request, limit: int, key: Key | None) -> Mapping[str, Any]:
    """Return the JSON object of at most `limit` bytes in the body of a request, whose key was asked for before.

    Raises:
        ProblemError: It is too large, too slow or malformed, or there are too many large ones.
    """
    account = key.name if key is not None else ""
    try:
        parse = partial(json_file.parse_object, location="body", memory=_MEMORY * limit)
        return await body_of(request).read_object(limit, account, parse)
    except FormatError as error:
        raise ProblemError(400, str(error), code="invalid_json") from error
    except BodyError as error:
        code = BUSY if error.code == TOO_MANY else error.code
        raise ProblemError(error.status, str(error), code=code, seconds=error.seconds) from error


@dataclass(slots=True)
class GatewayRequest:
    """The facts about a request.

    Attributes:
        path: The path that the client asked for.
        headers: The headers by lowercase name.
        key: The key of the client; None if no key is needed.
        model: The name in the request.
        version: What answers it: the base's name, `Served.model`, or a blend of those. Empty until it is known.
        label: The same for metrics, where all blends share one label.
        route: The name of the route that chose the version; empty without one.
        arm: The ref or blend that the route chose.
        engine: The engine that was asked; empty until then.
        usage: The tokens of the request and its answer; None until its body was read.
        id: Its name in `x-request-id`; empty for a request of this process's own.
        trace: Its span; None without a trace.
        deprecated: Why a version in it is deprecated; empty if none is.
        engine_path: The path of the engine that answers it, which differs for Ollama's API.
        number: Its number on the channel of a worker; 0 in any other process.
        choice: What a rollout chose for it; None without one.
        failed: Whether the gateway or its engine failed, also in the middle of a stream.
        left: Whether its client left before the answer ended.
        has_token_limits: Whether the tokens of its key are limited.
        expected_tokens: Its tokens, and at most those of its answer, as far as that is limited.
        reserved: Its tokens that were counted against the limits of its key.
    """

    path: str
    headers: Mapping[str, str]
    key: Key | None = None
    model: str = ""
    version: str = ""
    label: str = ""
    route: str = ""
    arm: str = ""
    engine: str = ""
    usage: Usage | None = None
    id: str = ""
    trace: TraceContext | None = None
    deprecated: str = ""
    engine_path: str = ""
    number: int = 0
    choice: Choice | None = None
    failed: bool = False
    left: bool = False
    has_token_limits: bool = False
    expected_tokens: int = 0
    reserved: ReservedTokens = field(default_factory=ReservedTokens)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.engine_path = self.engine_path or self.path

    @property
    def tokens(self) -> TokenCounts:
        """Its tokens so far, and those of its answer."""
        return self.usage.tokens if self.usage else TokenCounts()

    def outcome(self, status: int, first: float | None, seconds: float) -> AnswerOutcome | None:
        """Return how it was answered, as evidence about the version; None if that says nothing: the client left, or erred."""
        if self.left or (status != 200 and not self.failed):
            return None
        usage = self.usage
        is_stream = usage is not None and bool(usage.body.get("stream"))
        by_length = usage.by_length if usage else None
        return AnswerOutcome(self.failed, first if is_stream else None, seconds, self.tokens.answer, by_length)

    def engine_headers(self) -> dict[str, str]:
        """Return the headers by which an engine knows the request."""
        trace = spans.current() or self.trace
        return {**({REQUEST_ID: self.id} if self.id else {}), **(trace.headers() if trace else {})}


class GatewayFront(ABC):
    """The part of a gateway that answers clients."""

    def __init__(self, settings: GatewaySettings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine

    @abstractmethod
    async def start(self) -> None:
        """Start the engine; LocalIOError or RefusedError if it cannot be started."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine, and release all versions."""

    @abstractmethod
    def reload(self) -> None:
        """Read the files of rules again."""

    @abstractmethod
    def enter(self, request: GatewayRequest) -> AbstractAsyncContextManager[None]:
        """Find the key of a request, and count the request until the context ends.

        Raises:
            ProblemError: The client needs a key, or there are too many requests.
        """

    @abstractmethod
    def open_versions(self, request: GatewayRequest, identifiers: Mapping[str, str]) -> AbstractAsyncContextManager[Blend]:
        """Find the versions that a request means, record them in it, and keep them in the engine until the context ends.

        Args:
            identifiers: What the request says of its client (`api_forms.identifiers_of`).

        Raises:
            ProblemError: The client may not use them, or the engine cannot answer with them.
            AdapterhubError: There is no such version, or the engine would not apply it as it was trained.
            EngineDownError: The engine does not answer for now.
        """

    @abstractmethod
    async def settle(self, request: GatewayRequest) -> None:
        """Count the tokens of an answer that is complete, before its client can know that it is."""

    @abstractmethod
    def record_end(self, request: GatewayRequest, status: int, first: float | None, seconds: float) -> None:
        """Record a request that has ended.

        Args:
            first: Seconds until the answer began; None if none did.
        """

    def begin_copy(self, _request: GatewayRequest, _body: Mapping[str, Any]) -> RequestCopy | None:
        """Return a copy of a request for the shadow of its route, to which its answer is added; None for no copy."""
        return None

    @contextmanager
    def meter(self, request: GatewayRequest, body: Mapping[str, Any]) -> Iterator[Usage]:
        """Count the tokens of a request, even if its client cancels it."""
        request.usage = usage = Usage(body, path=request.engine_path)
        try:
            yield usage
        except asyncio.CancelledError:  # codespell:ignore
            # It may have read the prompt.
            usage.has_begun = bool(request.engine) and request.engine_path not in WITHOUT_MODEL
            raise

    @asynccontextmanager
    async def open_answer(self, request: GatewayRequest, body: Mapping[str, Any]) -> AsyncIterator[EngineAnswer]:
        """Ask the engine with the version that a request names; the answer ends with the context.

        Raises:
            ProblemError: The request cannot be answered in this form.
            AdapterhubError: There is no such version, or the engine would not apply it as it was trained.
            EngineDownError: The engine does not answer for now.
        """
        self._check(request, body)
        if request.has_token_limits:
            request.expected_tokens = api_forms.expected_tokens(request.engine_path, body, self.engine.context)
        body = priorities.with_priority(body, request.key, self.engine)
        async with self.open_versions(request, api_forms.identifiers_of(body)) as blend:
            with spans.span("engine"):
                request.engine, asked_at = self.engine.name, time.time_ns()
                REQUEST_HEADERS.set(request.engine_headers())
                answer = await self.engine.request(request.engine_path, api_forms.engine_body(request.engine_path, body), blend)
                request.engine = answer.engine or request.engine
                answer = spans.with_first_token(answer, asked_at)
                try:
                    yield answer
                finally:
                    # Also when the client has gone: the engine must stop generating.
                    await answer.close()

    def _check(self, request: GatewayRequest, body: Mapping[str, Any]) -> None:
        """Check the path and the body of a request, and record its `model`."""
        if request.engine_path not in self.engine.paths:
            *first, last = sorted(self.engine.paths)
            answered = f"{', '.join(first)} and {last}" if first else last
            message = f"{self.engine.name}, as it was started, answers {answered}, not {request.engine_path}"
            raise ProblemError(404, message, code="unsupported")
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise ProblemError(400, "`model` is missing, or not a text", param="model")
        request.model = model
        for name in self.engine.forbidden_fields:
            if name in body:
                message = f"`{name}` would choose an adapter or a cache regardless of `model`; leave it out"
                raise ProblemError(400, message, code="unsupported", param=name)
        for name in fields_ignored(self.engine.name, request.engine_path, body):
            message = f"`{name}` is ignored by {self.engine.name} on {request.engine_path}; leave it out"
            raise ProblemError(400, message, code="unsupported", param=name)
        api_forms.check_state(request.engine_path, body)
