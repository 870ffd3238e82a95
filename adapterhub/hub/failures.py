"""What the hub itself lacks for an answer: space on its disk, its database, its bucket, a file that was there.

Clients are told what it is, and not where: neither the folders of the hub nor the hosts behind it are theirs to know.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError, RemoteError


def told(failed: AdapterhubError) -> tuple[int, str, dict[str, str]]:
    """The status, the words and the headers for an error that is the hub's own; status 0 for any other error."""
    if isinstance(failed, LocalIOError):
        return 507, f"the hub cannot write: {failed.what}", {}
    if isinstance(failed, RemoteError):  # the database or the bucket may be back in a moment: that is worth trying again
        return 503, f"the hub cannot do that now: {failed.what}", {"retry-after": "5"}
    if isinstance(failed, IntegrityError) and failed.code == "check-registry":
        return 500, f"{failed.what}; the operator of the hub has to restore it", {}
    return 0, "", {}


async def answer(_request: Request, failed: Exception) -> Response:
    """The answer for what fails after a handler has answered, as when a blob is opened."""
    status, words, headers = told(failed) if isinstance(failed, AdapterhubError) else (0, "", {})
    if not status:
        raise failed
    return JSONResponse({"error": words}, status, headers)
