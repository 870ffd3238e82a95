"""Errors and challenges as clients of OCI registries read them (distribution-spec v1.1, "Error codes"; RFC 9110, 11.6.1)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from adapterhub.hub import failures
from adapterhub.hub.access import BadTokenError, ForbiddenError, NoTokenError, ThrottledError
from adapterhub.hub.hub import Hub
from adapterhub.hub.mirror import NotMirroredError
from adapterhub.ref import is_name
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
VERSION = {"docker-distribution-api-version": "registry/2.0"}
"""Of every answer: older clients of docker look for it."""
DIGEST = "docker-content-digest"
# What errors of the registry mean where a handler does not know better.
_ERRORS: tuple[tuple[type[AdapterhubError], int, str], ...] = (
    (NotMirroredError, 404, "NAME_UNKNOWN"), (NotFoundError, 404, "MANIFEST_UNKNOWN"), (ConflictError, 409, "DENIED"),
    (RefusedError, 400, "MANIFEST_INVALID"), (IntegrityError, 400, "MANIFEST_INVALID"), (UsageError, 400, "NAME_INVALID"),
)  # fmt: skip


class OciError(Exception):
    """An error with its status, its code for programs and its words."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


def answering(handler: Handler) -> Callable[[Request], Awaitable[Any]]:
    """The endpoint of a handler, whose errors become answers."""

    @wraps(handler)
    async def endpoint(request: Request) -> Any:
        hub: Hub = request.app.state.hub
        try:
            await hub.prepare(request)
            return await handler(hub, request)
        except ClientDisconnect:
            return _error(400, "BLOB_UPLOAD_INVALID", "the connection was closed before the whole body had arrived")
        except ThrottledError as error:  # before the errors that it is one of
            return _error(429, "TOOMANYREQUESTS", str(error), {"retry-after": str(error.seconds)})
        except NoTokenError as error:
            return _challenge(hub, request, bad=isinstance(error, BadTokenError))
        except (OciError, ForbiddenError, AdapterhubError) as failed:
            return _answer(failed)

    return endpoint


def _answer(failed: Exception) -> Response:
    """The answer for an error; one that is a bug of ours is raised again."""
    if isinstance(failed, OciError):
        return _error(failed.status, failed.code, failed.message, failed.headers)
    if isinstance(failed, ForbiddenError) or (isinstance(failed, RefusedError) and failed.code == "protected"):
        return _error(403, "DENIED", str(failed))
    if isinstance(failed, AdapterhubError) and (own := failures.told(failed))[0]:
        return _error(own[0], "UNKNOWN", own[1], own[2])
    for kind, status, code in _ERRORS:
        if isinstance(failed, kind):
            return _error(status, code, str(failed))
    raise failed


def _error(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    error = {"code": code, "message": printable(message)[:2000]}
    return JSONResponse({"errors": [error]}, status, {**VERSION, **(headers or {})})


def _challenge(hub: Hub, request: Request, *, bad: bool) -> Response:
    """The answer to who has no token, or not a good one: where there is one, or that it can be sent as a password.

    Bearer comes first: skopeo takes the first of several, and would send an empty password to the other.
    """
    message = "the token is not valid" if bad else "a token is needed: log in with any user name and the token as the password"
    url, name = hub.url(request), str(request.path_params.get("name", ""))
    actions = "pull" if request.method in ("GET", "HEAD") else "pull,push"
    scope = f',scope="repository:{name}:{actions}"' if is_name(name) else ""
    answer = _error(401, "UNAUTHORIZED", message)
    answer.headers.append("www-authenticate", f'Bearer realm="{url}/v2/token",service="{urlsplit(url).netloc}"{scope}')
    answer.headers.append("www-authenticate", 'Basic realm="adapterhub"')
    return answer
