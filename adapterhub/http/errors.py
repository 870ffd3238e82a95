"""How a request fails: for now, for good, or because the server wants to know who asks."""

from __future__ import annotations

from adapterhub_converters.errors import RemoteError


class AgainError(Exception):
    """A failure that another try may not have: its reason, and the seconds that the server asked to wait, if it did."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


class GivenUpError(RemoteError):
    """An AgainError after the last try."""

    default_code = "no-answer"


class DeniedError(RemoteError):
    """The server requires a login, or refuses the one it got; code `login-required` if this program can log in at `host`."""

    default_code = "access-denied"

    def __init__(self, where: str, what: str, hint: str = "", *, host: str = "") -> None:
        super().__init__(where, what, hint, code="login-required" if host else "", host=host)


class CutError(RemoteError):
    """A body ended too early; a request for the bytes from there on may bring the rest."""

    default_code = "connection-lost"
