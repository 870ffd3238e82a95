"""The HTTP client with what a base takes: a range or a small file, and the errors of a Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field

from adapterhub.http.client import Answer, Body, Client
from adapterhub.http.errors import AgainError
from adapterhub.http.urls import origin
from adapterhub_converters.errors import FormatError, NotFoundError, RemoteError

from .hub_address import Hub

MAX_SKIPPED = 1 << 27  # bytes read to reach those behind them, of a server without ranges
_TIMEOUT = 15.0  # seconds without a byte


class ForbiddenError(RemoteError):
    """A 403; object stores answer it for files that do not exist, too."""


class TooLargeError(FormatError):
    """A file that should be small is not."""


@dataclass
class RangeClient(Client):
    """Fetches for one command.

    Attributes:
        fetched: Bytes of all bodies so far.
    """

    timeout: float = _TIMEOUT
    fetched: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def of(cls, hub: Hub) -> RangeClient:
        """A client that gives the hub's token to this hub alone."""
        origin(hub.endpoint, hub.endpoint, typed=True)
        return cls(hub.endpoint, proxy=hub.proxy, known={"": f"Bearer {hub.token}"} if hub.token else {})

    def get(self, url: str, where: str, *, n: int, start: int | None = None) -> Answer:
        """The `n` bytes from `start` on, or, without a `start`, the whole file if it has no more than `n` bytes.

        A server without ranges answers 200: then the body has everything up to `start + n`.

        Raises:
            NotFoundError: The server has no such file.
            TooLargeError: The whole file has more than `n` bytes.
            RemoteError: It refused, failed, did not answer, or gave an invalid answer. `where` is in the message, and never
                the address of a redirect, which may be signed.
        """
        headers = {} if start is None else {"Range": f"bytes={start}-{start + n - 1}"}

        def once() -> Answer:
            with self.stream(url, where, headers=headers, good=(200, 206, 416), retry=False) as found:
                if start is None and found.status != 200:
                    raise RemoteError(where, f"HTTP {found.status}, where the whole file was asked for")
                answer = Answer(found.status, found.headers, b"", found.url)
                wanted = _wanted(found, answer, n, start, where)
                try:
                    body = found.read(wanted, self.timeout) if wanted else b""
                finally:
                    with self._counting:
                        self.fetched += found.taken
                if start is None and len(body) > n:
                    raise TooLargeError(where, f"more than the {n} bytes of a small file")
                return dataclasses.replace(answer, body=body)

        return self.tried(once, where)

    def _refusal(self, answer: Answer, where: str) -> Exception:
        found = super()._refusal(answer, where)
        if isinstance(found, AgainError):
            return found
        status, code, at_hub = answer.status, answer.headers.get("x-error-code", ""), self._at_home(answer.url, where)
        anonymous = at_hub and not self.known
        takes = "Set HF_TOKEN to a token that may read it" if at_hub else ""
        if code == "GatedRepo":
            hint = f"Ask for access on its page{' and set HF_TOKEN' if anonymous else ''}"
            return RemoteError(where, f"HTTP {status}: a gated model", hint)
        if status in (404, 410):
            kind = {"RepoNotFound": "model", "RevisionNotFound": "revision"}.get(code, "file")
            return NotFoundError(where, f"no such {kind} (HTTP {status})", "A private one needs HF_TOKEN" if anonymous else "")
        if status == 401:
            what = "the token was refused" if at_hub and self.known else "login required"
            missing = ", or there is no such model" if at_hub else ""
            return RemoteError(where, f"HTTP 401: {what}{missing}", takes)
        return ForbiddenError(where, "HTTP 403: forbidden", takes) if status == 403 else found


def _wanted(found: Body, answer: Answer, n: int, start: int | None, where: str) -> int:
    """The number of bytes of a body to read."""
    said = answer.number("content-length")
    if found.status == 416:
        return 0
    if start is None:
        if said is None and answer.headers.get("transfer-encoding", "").lower() != "chunked":
            raise RemoteError(where, "the server does not send the length of the file")
        if said is not None and said > n:
            raise TooLargeError(where, f"{said} bytes, more than the {n} of a small file")
        return n + 1  # the one more shows that there are too many
    if found.status == 206:
        return n
    if start + n > MAX_SKIPPED and start:
        what = f"the server supports no ranges, and {start + n} bytes would have to be read for {n} at their end"
        raise RemoteError(where, what, "Download it, and name the file")
    return start + n
