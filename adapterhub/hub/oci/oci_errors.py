"""Errors and challenges as registry clients read them (distribution-spec v1.1, "Error codes"; RFC 9110, 11.6.1)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from adapterhub.http_server.request_bodies import TOO_LARGE, TOO_MANY, BodyError
from adapterhub.hub import error_responses
from adapterhub.hub.access_control import BadTokenError, ForbiddenError, GatedError, NoTokenError, ThrottledError
from adapterhub.hub.hub import Hub
from adapterhub.hub.mirror import NotMirroredError
from adapterhub.ref import is_name
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
VERSION = {"docker-distribution-api-version": "registry/2.0"}
"""A header of every response: older docker clients look for it."""
DIGEST = "docker-content-digest"
_BODY_CODES = {TOO_LARGE: "SIZE_INVALID", TOO_MANY: "TOOMANYREQUESTS"}
_DENIED = ("protected", "requirements-unmet")
# Status and code for errors that a handler does not map itself.
_ERRORS: tuple[tuple[type[AdapterhubError], int, str], ...] = (
    (NotMirroredError, 404, "NAME_UNKNOWN"), (NotFoundError, 404, "MANIFEST_UNKNOWN"), (ConflictError, 409, "DENIED"),
    (RefusedError, 400, "MANIFEST_INVALID"), (IntegrityError, 400, "MANIFEST_INVALID"), (UsageError, 400, "NAME_INVALID"),
)  # fmt: skip


class OciError(Exception):
    """An error with its HTTP status, its code for programs, and its message."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})


def endpoint_of(handler: Handler) -> Callable[[Request], Awaitable[Any]]:
    """Return the endpoint of a handler, with its errors turned into responses."""

    @wraps(handler)
    async def endpoint(request: Request) -> Any:
        hub: Hub = request.app.state.hub
        try:
            await hub.prepare(request)
            return await handler(hub, request)
        except ClientDisconnect:
            return _error_response(400, "BLOB_UPLOAD_INVALID", "the connection was closed before the whole body had arrived")
        except BodyError as error:
            code = _BODY_CODES.get(error.code, "BLOB_UPLOAD_INVALID")
            return _error_response(error.status, code, str(error), error.headers())
        except ThrottledError as error:  # a subclass of NoTokenError, so it comes first
            return _error_response(429, "TOOMANYREQUESTS", str(error), {"retry-after": str(error.seconds)})
        except NoTokenError as error:
            return _challenge(hub, request, is_invalid=isinstance(error, BadTokenError))
        except (OciError, ForbiddenError, AdapterhubError) as failure:
            # Clients that log in only when challenged may belong to an account with access.
            is_challenged = isinstance(failure, GatedError) and failure.anonymous
            return _challenge(hub, request, message=str(failure)) if is_challenged else _failure_response(failure)

    return endpoint


def _failure_response(failure: Exception) -> Response:
    """Return the response for an error; raise it again if it is a bug of ours."""
    if isinstance(failure, OciError):
        return _error_response(failure.status, failure.code, failure.message, failure.headers)
    if isinstance(failure, ForbiddenError) or (isinstance(failure, RefusedError) and failure.code in _DENIED):
        return _error_response(403, "DENIED", str(failure))
    if isinstance(failure, RefusedError) and failure.code == withdrawals.CODE:
        return _error_response(410, "MANIFEST_UNKNOWN", str(failure))
    if isinstance(failure, AdapterhubError) and (hub_error := error_responses.error_status(failure))[0]:
        return _error_response(hub_error[0], "UNKNOWN", hub_error[1], hub_error[2])
    for kind, status, code in _ERRORS:
        if isinstance(failure, kind):
            return _error_response(status, code, str(failure))
    raise failure


def _error_response(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    error = {"code": code, "message": printable(message)[:2000]}
    return JSONResponse({"errors": [error]}, status, {**VERSION, **(headers or {})})


def _challenge(hub: Hub, request: Request, *, is_invalid: bool = False, message: str = "") -> Response:
    """Return the response to a client without a valid token: where to get one, or that it can be sent as a password.

    Bearer comes first: skopeo takes the first challenge it gets, and would answer a Basic one with an empty password.
    """
    message = message or (
        "the token is not valid" if is_invalid else "a token is needed: log in with any user name and the token as the password"
    )
    url, name = hub.url(request), str(request.path_params.get("name", ""))
    actions = "pull" if request.method in ("GET", "HEAD") else "pull,push"
    scope = f',scope="repository:{name}:{actions}"' if is_name(name) else ""
    answer = _error_response(401, "UNAUTHORIZED", message)
    answer.headers.append("www-authenticate", f'Bearer realm="{url}/v2/token",service="{urlsplit(url).netloc}"{scope}')
    answer.headers.append("www-authenticate", 'Basic realm="adapterhub"')
    return answer
