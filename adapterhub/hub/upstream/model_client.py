"""Requests to the upstream: never with a client's token, and led nowhere nearer to this machine than the upstream itself is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from adapterhub.bases.hub_address import Hub
from adapterhub.bases.ranges import MAX_SKIPPED, RangeClient
from adapterhub.http.responses import Body, Response
from adapterhub.hub.settings import ModelUpstream
from adapterhub.remotes.download import skip_bytes
from adapterhub_converters.errors import IntegrityError, NotFoundError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

TIMEOUT = 15.0  # seconds without a byte
MIN_RATE, RATE_SECONDS = 20_000, 60.0  # bytes per second that a file arrives with, over so many seconds
_PAUSES = (0.5,)  # seconds before a retry, while clients wait


class NoModelError(NotFoundError):
    """The upstream has no model of that name, or not for this hub."""

    default_code = "no-upstream-model"


class NoRevisionError(NotFoundError):
    """The model has no such revision there."""

    default_code = "no-upstream-revision"


@dataclass
class ModelClient(RangeClient):
    """A client of the upstream, which several threads may use at once."""

    @classmethod
    def of(cls, upstream: ModelUpstream) -> ModelClient:
        """Return a client, which sends the operator's token to the upstream alone.

        Raises:
            UsageError: The endpoint is not a URL.
            RemoteError: There is a token, and it would be sent to another machine without TLS.
        """
        token = upstream.token if upstream.mode == "cache" else None
        client = cls.for_hub(Hub(upstream.endpoint, token, upstream.proxy), _PAUSES)
        assert isinstance(client, cls)  # noqa: S101 - `for_hub` makes what it is called on
        return client

    def _refusal(self, response: Response, location: str) -> Exception:
        """Return the error for a status.

        The Hugging Face Hub says 401 about a model that does not exist, to whoever has no token.
        """
        code, is_own = response.headers.get("x-error-code", ""), self._is_own_origin(response.url, location)
        if is_own and (code == "RepoNotFound" or (response.status == 401 and not self.authorizations and code != "GatedRepo")):
            return NoModelError(location, "the upstream has no such model")
        if is_own and response.status == 404 and code == "RevisionNotFound":
            return NoRevisionError(location, "the model has no such revision")
        return super()._refusal(response, location)


def info_url(upstream: ModelUpstream, name: str, revision: str) -> str:
    """Return the address of the document of a model at a revision, with sizes and digests of its files."""
    return f"{upstream.endpoint}/api/models/{quote(name)}/revision/{quote(revision, safe='')}?blobs=true"


def file_url(upstream: ModelUpstream, name: str, revision: str, path: str) -> str:
    """Return the address of a file at a revision."""
    return f"{upstream.endpoint}/{quote(name)}/resolve/{quote(revision, safe='')}/{quote(path)}"


@contextmanager
def open_range(client: ModelClient, url: str, location: str, start: int, end: int, *, size: int) -> Iterator[Body]:
    """Yield the body with the bytes `start` to `end`, both included, of a file of `size` bytes.

    Raises:
        IntegrityError: The upstream has another number of bytes.
        RemoteError: It does not answer, or with another range; or it is too slow, which reads raise as well.
    """
    headers = {"Range": f"bytes={start}-{end}"} if (start, end) != (0, size - 1) else {}
    with client.stream(url, location, headers=headers) as body:
        body.require_rate(MIN_RATE, RATE_SECONDS)  # from here on: what is skipped may take as long as the rest
        length = end - start + 1
        if body.status == 206 and body.headers.get("content-range") != f"bytes {start}-{end}/{size}":
            raise RemoteError(location, "the upstream sends another range than requested")
        if body.status == 200 and headers:
            if end != size - 1 or start > MAX_SKIPPED:
                raise RemoteError(location, "the upstream sends no ranges")
            length = size
        if body.length is not None and body.length != length:
            raise IntegrityError(location, f"the upstream has {body.length:,} bytes of it, not {length:,}")
        if length == size and start:
            skip_bytes(body, start)
        yield body
