"""Answers as clients of the Hugging Face Hub read them: headers have an error's code and its words.

The names of the headers and codes are those of huggingface_hub's `utils/_http.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from adapterhub.hub import failures
from adapterhub.hub.access import BadTokenError, ForbiddenError, NoTokenError, ThrottledError
from adapterhub.hub.hub import Hub
from adapterhub.hub.mirror import NotMirroredError
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
REPO, REVISION, ENTRY = "RepoNotFound", "RevisionNotFound", "EntryNotFound"
# A refusal is never 5xx, which clients try again five times; 400 shows our words without a URL before them.
_STATUS: tuple[tuple[type[AdapterhubError], int], ...] = (
    (NotFoundError, 404), (ConflictError, 409), (RefusedError, 400), (IntegrityError, 400), (UsageError, 400),
)  # fmt: skip


class AnswerError(Exception):
    """An error with its status, its code for programs and its words."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def response(self) -> Response:
        """The answer."""
        return error(self.status, self.message, self.code, self.headers)


class MovedError(Exception):
    """A repository has another name now."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, new)
        self.old, self.new = old, new

    def response(self, request: Request) -> Response:
        """The answer: the same request under the new name."""
        query = f"?{request.url.query}" if request.url.query else ""
        return RedirectResponse(request.url.path.replace(f"/{self.old}", f"/{self.new}", 1) + query, 307)


def error(status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> Response:
    """An error as JSON, and in the headers that huggingface_hub shows."""
    shown = printable(message)[:2000]
    found = {"x-error-message": shown.encode("latin-1", "replace").decode("latin-1"), **(headers or {})}
    if code:
        found["x-error-code"] = code
    return JSONResponse({"error": shown}, status, found)


def no_such_repository(name: str) -> AnswerError:
    """The error for a repository that does not exist, or that the client may not see."""
    return AnswerError(404, REPO, f"{name}: no such repository")


def answering(handler: Handler) -> Callable[[Request], Awaitable[Any]]:
    """The endpoint of a handler, whose errors become answers."""

    @wraps(handler)
    async def endpoint(request: Request) -> Any:
        try:
            await request.app.state.hub.prepare(request)
            return await handler(request.app.state.hub, request)
        except MovedError as moved:
            return moved.response(request)
        except (AnswerError, NoTokenError, ForbiddenError, ThrottledError, AdapterhubError) as failed:
            return answer(failed)

    return endpoint


def answer(failed: Exception) -> Response:
    """The answer for an error; one that is a bug of ours is raised again."""
    if isinstance(failed, AnswerError):
        return failed.response()
    if isinstance(failed, ThrottledError):
        return error(429, str(failed), headers={"retry-after": str(failed.seconds)})
    if isinstance(failed, BadTokenError):
        return error(401, "Invalid credentials in Authorization header")
    if isinstance(failed, NoTokenError):
        return error(401, "A token is needed: log in with `hf auth login`, or set HF_TOKEN")
    if isinstance(failed, AdapterhubError) and (own := failures.told(failed))[0]:
        return error(own[0], own[1], headers=own[2])
    status = (
        403 if isinstance(failed, ForbiddenError) else next((code for kind, code in _STATUS if isinstance(failed, kind)), 0)
    )
    if not status:
        raise failed
    code = "" if status != 404 else REPO if isinstance(failed, NotMirroredError) else REVISION
    return error(status, str(failed), code)
