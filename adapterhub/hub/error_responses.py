"""Error responses for failures of the hub itself: a full disk, its database, its bucket, a file that is gone.

Clients learn what failed but not where: the hub's folders and the hosts behind it are none of their business.
"""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from adapterhub.http_server.request_bodies import BodyError
from adapterhub_converters.display import printable
from adapterhub_converters.errors import (
    AdapterhubError,
    IntegrityError,
    LocalIOError,
    RefusedError,
    RemoteError,
    UsageError,
)

_NEWER = ("newer-index", "newer-store")
CLIENT_GONE = 499
"""nginx's status for a client that has disconnected."""


def error_status(error: AdapterhubError) -> tuple[int, str, dict[str, str]]:
    """Return status, message and headers for an error that is the hub's own fault; status 0 for any other error."""
    if isinstance(error, LocalIOError):
        return 507, f"the hub cannot write: {error.what}", {}
    if isinstance(error, RefusedError) and error.code in _NEWER:
        return (
            503,
            "the hub cannot do that now: a newer adapterhub has written its registry; its operator has to upgrade it",
            {},
        )
    if isinstance(error, RemoteError):  # the database or bucket may soon be back: ask the client to retry
        return 503, f"the hub cannot do that now: {error.what}", {"retry-after": "5"}
    # Damage in the hub's own store; other integrity errors are about what the client sent.
    if isinstance(error, IntegrityError) and error.code == "check-registry":
        return 500, f"{error.what}; the operator of the hub has to restore it", {}
    return 0, "", {}


def usage_response(error: UsageError) -> Response:
    """Return the response for a request that no protocol's handler has taken, in the forms of all protocols."""
    message = printable(str(error))
    document = {"error": message, "errors": [{"code": "UNSUPPORTED", "message": message}]}
    # A browser shows it where a page was asked for.
    headers = {"content-security-policy": "default-src 'none'", "x-content-type-options": "nosniff"}
    headers["x-error-message"] = message.encode("latin-1", "replace").decode("latin-1")
    return JSONResponse(document, 400, headers)


async def error_response(_request: Request, error: Exception) -> Response:
    """Return the response for an error after the handler has returned, as when opening a blob fails."""
    if isinstance(error, BodyError):
        return JSONResponse({"error": str(error)}, error.status, error.headers())
    if isinstance(error, UsageError):
        return usage_response(error)
    if isinstance(error, ClientDisconnect):  # nobody reads it, but the log has its status
        return Response(status_code=CLIENT_GONE)
    status, words, headers = error_status(error) if isinstance(error, AdapterhubError) else (0, "", {})
    if not status:
        raise error
    return JSONResponse({"error": words}, status, headers)
