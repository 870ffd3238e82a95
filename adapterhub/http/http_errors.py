"""Errors of requests: temporary ones, permanent ones, and missing credentials."""

from __future__ import annotations

from adapterhub_converters.errors import RemoteError


class RetryableError(Exception):
    """A failure that a retry may not have: its reason, and the pause in seconds that the server asked for, if any."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


class RetriesExhaustedError(RemoteError):
    """A RetryableError after the last attempt."""

    default_code = "no-answer"


class DeniedError(RemoteError):
    """The server requires a login or refuses the given one; code `login-required` if this program can log in at `host`.

    Attributes:
        refuses_login: Whether the server refuses the login that was sent, whatever was asked for.
    """

    default_code = "access-denied"

    def __init__(self, where: str, what: str, hint: str = "", *, host: str = "", refuses_login: bool = False) -> None:
        super().__init__(where, what, hint, code="login-required" if host else "", host=host)
        self.refuses_login = refuses_login


class TruncatedBodyError(RemoteError):
    """A body ended too early; a request for the bytes from there on may bring the rest."""

    default_code = "connection-lost"
