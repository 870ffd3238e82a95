"""Error responses as clients of the Hugging Face Hub read them: headers carry the code and the message.

The names of the headers and the codes are those of huggingface_hub's `utils/_http.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from adapterhub.http_server.request_bodies import BodyError
from adapterhub.hub import error_responses
from adapterhub.hub.access_control import BadTokenError, ForbiddenError, GatedError, NoTokenError, ThrottledError
from adapterhub.hub.hub import Hub
from adapterhub.hub.mirror import NotMirroredError
from adapterhub.registry import withdrawals
from adapterhub_converters.display import printable
from adapterhub_converters.errors import (
    AdapterhubError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    RefusedError,
    UsageError,
)

Handler = Callable[[Hub, Request], Awaitable[Any]]
REPO, REVISION, ENTRY, GATED = "RepoNotFound", "RevisionNotFound", "EntryNotFound", "GatedRepo"
# A refusal is never 5xx, which clients retry five times; for 400 they show our message without a URL before it.
_STATUS: tuple[tuple[type[AdapterhubError], int], ...] = (
    (NotFoundError, 404), (ConflictError, 409), (RefusedError, 400), (IntegrityError, 400), (UsageError, 400),
)  # fmt: skip


class ResponseError(Exception):
    """An error with its HTTP status, its code for programs, and its message."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def response(self) -> Response:
        """Return the response."""
        return error_response(self.status, self.message, self.code, self.headers)


class MovedError(Exception):
    """A repository that has another name now."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, new)
        self.old, self.new = old, new

    def response(self, request: Request) -> Response:
        """Return a redirect to the same request under the new name."""
        query, path = f"?{request.url.query}" if request.url.query else "", request.url.path
        # The name as the client wrote it, at its place in the path: other parts may be spelled like it.
        name = "{namespace}/{repo}".format_map(request.path_params)
        start = len(request.scope["route"].path.partition("{namespace}")[0])
        return RedirectResponse(path[:start] + self.new + path[start + len(name) :] + query, 307)


def error_response(status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> Response:
    """Return an error response as JSON, with the headers that huggingface_hub shows."""
    text = printable(message)[:2000]
    all_headers = {"x-error-message": text.encode("latin-1", "replace").decode("latin-1"), **(headers or {})}
    if code:
        all_headers["x-error-code"] = code
    return JSONResponse({"error": text}, status, all_headers)


def no_such_repository(name: str) -> ResponseError:
    """Return the error for a repository that does not exist or that the client may not see."""
    return ResponseError(404, REPO, f"{name}: no such repository")


def endpoint_of(handler: Handler, upstream: Handler | None = None) -> Callable[[Request], Awaitable[Any]]:
    """Return the endpoint of a handler, with its errors turned into responses.

    `upstream`: Answers for a repository that is not here; if it is not there either, the response is that of `handler`.
    """

    @wraps(handler)
    async def endpoint(request: Request) -> Any:
        response = await _response(handler, request, prepare=True)
        if upstream is None or not _is_missing(response):
            return response
        upstream_response = await _response(upstream, request)
        return response if _is_missing(upstream_response) else upstream_response

    return endpoint


async def _response(handler: Handler, request: Request, *, prepare: bool = False) -> Any:
    try:
        if prepare:
            await request.app.state.hub.prepare(request)
        return await handler(request.app.state.hub, request)
    except MovedError as moved:
        return moved.response(request)
    except BodyError as error:
        return error_response(error.status, str(error), headers=error.headers())
    except (ResponseError, NoTokenError, ForbiddenError, ThrottledError, AdapterhubError) as failure:
        return failure_response(failure)


def _is_missing(response: Any) -> bool:
    """Return whether a response says that there is no such repository."""
    return isinstance(response, Response) and response.headers.get("x-error-code") == REPO


def failure_response(failure: Exception) -> Response:
    """Return the response for an error; raise it again if it is a bug of ours."""
    if isinstance(failure, ResponseError):
        return failure.response()
    if isinstance(failure, ThrottledError):
        return error_response(429, str(failure), headers={"retry-after": str(failure.seconds)})
    if isinstance(failure, BadTokenError):
        return error_response(401, "Invalid credentials in Authorization header")
    if isinstance(failure, NoTokenError):
        return error_response(401, "A token is needed: log in with `hf auth login`, or set HF_TOKEN")
    if isinstance(failure, AdapterhubError) and (hub_error := error_responses.error_status(failure))[0]:
        return error_response(hub_error[0], hub_error[1], headers=hub_error[2])
    status = (
        403 if isinstance(failure, ForbiddenError) else next((code for kind, code in _STATUS if isinstance(failure, kind)), 0)
    )
    if isinstance(failure, RefusedError) and failure.code == withdrawals.CODE:
        status = 410
    if not status:
        raise failure
    # huggingface_hub raises its own exception for each of these codes.
    code = GATED if isinstance(failure, GatedError) else ""
    if status == 404:
        code = REPO if isinstance(failure, NotMirroredError) else REVISION
    return error_response(status, str(failure), code)
