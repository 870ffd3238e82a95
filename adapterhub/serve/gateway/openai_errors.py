"""Error responses in the form of OpenAI's API, which its clients raise as their own exceptions."""

from __future__ import annotations

import json
from collections.abc import Mapping

from adapterhub.http.http_errors import DeniedError
from adapterhub.ref import RefError
from adapterhub.registry import withdrawals
from adapterhub.serve.engines import EngineDownError, EngineTimeoutError
from adapterhub.serve.model_names import NOT_SERVED
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import (
    AdapterhubError,
    IntegrityError,
    LocalIOError,
    NotFoundError,
    RefusedError,
    RemoteError,
)

_MAX_MESSAGE = 1000  # characters of a message
_BEFORE_PATH = " (\"'`=,"
_PATH = safe_regex.Pattern(rf"(^|[\s{_BEFORE_PATH}])/(?:[^\s/:;,'\"()`]+/)+([^\s/:;,'\"()`]*)")
INVALID, MISSING, BUSY, DOWN = "invalid_request_error", "model_not_found", "rate_limit_exceeded", "service_unavailable"


class ProblemError(Exception):
    """An error to send instead of a completion.

    Attributes:
        seconds: The value of Retry-After; 0 for none.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, seconds: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.seconds = status, message, code, param, seconds

    def document(self) -> dict[str, dict[str, object]]:
        """Return the error object."""
        kind = INVALID if self.status < 500 and self.status != 429 else "server_error" if self.status != 429 else "requests"
        message = without_paths(self.message[:_MAX_MESSAGE])
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def body(self) -> bytes:
        """Return the error object as JSON."""
        return json.dumps(self.document(), ensure_ascii=False).encode("utf-8", "replace")

    def headers(self) -> Mapping[str, str]:
        """Return the additional headers of the response."""
        headers = {"retry-after": str(self.seconds)} if self.seconds else {}
        return {"www-authenticate": "Bearer", **headers} if self.status == 401 else headers


def without_paths(text: str) -> str:
    """Return a text with the last part only of each path on this machine's disk, whose folders are not for clients."""
    return _PATH.sub(lambda match: match[0] if match[0].lstrip(_BEFORE_PATH).startswith("/v1/") else match[1] + match[2], text)


def not_served(model: str) -> ProblemError:
    """Return the error for a name that is not served to this client; the same whether or not the name exists."""
    return ProblemError(404, f"The model `{model[:200]}` does not exist or is not served here", code=MISSING, param="model")


def engine_failed(reason: str) -> ProblemError:
    """Return the error for an engine's answer that cannot be passed on."""
    return ProblemError(502, f"The engine failed: {reason}", code="engine_failed")


def _is_unknown(error: AdapterhubError) -> bool:
    """Return whether an error is about a name that is not served; a remote may deny a name that it lacks."""
    is_missing = isinstance(error, NotFoundError) and error.code != "no-registry"
    is_denied = isinstance(error, DeniedError) and not error.refuses_login
    return is_missing or is_denied or (isinstance(error, RefusedError) and error.code == NOT_SERVED)


def problem_of(error: Exception, model: str) -> ProblemError:
    """Convert an error into the one to send; other exceptions are raised again."""
    match error:
        case ProblemError():
            return error
        case EngineTimeoutError():
            problem = ProblemError(504, "The engine did not answer in time", code="timeout")
        case EngineDownError():
            problem = ProblemError(503, f"The engine does not answer for now: {error}", code=DOWN, seconds=error.seconds)
        case AdapterhubError() if _is_unknown(error):
            problem = not_served(model)
        case RefError():
            problem = ProblemError(
                404, f"The model `{model[:200]}` does not exist: {error.what}. {error.hint}", code=MISSING, param="model"
            )
        case DeniedError():
            reason = "The registry refuses the login of this gateway, which its operator has to renew"
            problem = ProblemError(503, reason, code=DOWN, seconds=5)
        case RemoteError() | LocalIOError() | NotFoundError():  # details, such as paths, are only for the log
            problem = ProblemError(
                503, "The registry, or the disk of the gateway, cannot be used for now", code=DOWN, seconds=5
            )
        case IntegrityError():
            problem = ProblemError(502, f"The files of `{model[:200]}` are damaged", code="damaged")
        case AdapterhubError():
            status = 410 if error.code == withdrawals.CODE else 400
            # Its location is a folder of the gateway; the client knows the version by its name.
            parts = (f"{model[:200]}: {error.what}", error.hint)
            problem = ProblemError(
                status, ". ".join(part for part in parts if part), code=error.own_code or "refused", param="model"
            )
        case _:
            raise error
    return problem
