"""The address of a model on a Hugging Face Hub: the grammar of `hf://org/model[@revision][/file]`."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

from adapterhub.http.boundary import is_loopback
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub_converters import linear
from adapterhub_converters.errors import RemoteError, UsageError

ENDPOINT = "https://huggingface.co"
SCHEME = "hf://"
MAIN = "main"
OFFLINE = "offline"
"""The code of the error of a hub that may not be asked."""
_ID = linear.Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_PLACE = linear.Pattern(r"(?P<repo>[^/@]+/[^/@]+|[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?")
# The URL of a page of a model, or of a file in it.
_PAGE = linear.Pattern(r"/(?P<repo>[^/]+/[^/]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?P<path>/.*)?)?/?")
_NO_MODELS = ("datasets", "spaces", "api", "docs", "collections", "papers", "blog")


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub, the token for it, and the proxy on the way to any host."""

    endpoint: str = ENDPOINT
    token: str | None = field(default=None, repr=False)
    proxy: ProxyOf = no_proxy

    def checked_token(self) -> str | None:
        """The token.

        Raises:
            UsageError: The endpoint is not a URL.
            RemoteError: There is one, and it would be sent to another machine without TLS.
        """
        scheme, host, _ = origin(self.endpoint, self.endpoint, typed=True)
        if self.token and scheme != "https" and not is_loopback(host):
            hint = "Use https, or leave out the token"
            raise RemoteError(
                self.endpoint, "a token is not sent to another machine without TLS", hint, code="token-without-tls"
            )
        return self.token


@dataclass(frozen=True, slots=True)
class HubPath:
    """A model, a revision of it (branch, tag or commit), and a file or folder in it, empty for the whole."""

    repo: str
    revision: str = MAIN
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Parse `hf://…`; UsageError for an invalid one."""
        found = _PLACE.fullmatch(text[len(SCHEME) :])
        hint = "Write hf://org/model, hf://org/model@revision or hf://org/model/file.gguf"
        if not found or not ("/" in found["repo"] or found["revision"] or not found["path"]):
            raise UsageError(text, "not a model on a hub", hint)
        repo, revision = found["repo"], unquote(found["revision"] or MAIN)
        path = (found["path"] or "").strip("/")
        if not _ID.fullmatch(repo) or len(repo) > 96 or "--" in repo or ".." in repo:
            raise UsageError(text, f"{repo[:100]!r} is not a valid model name", hint)
        if not revision.isprintable() or any(part in ("", ".", "..") for part in path.split("/") if path):
            raise UsageError(text, "the revision or the path is not valid", hint)
        return cls(repo, revision, path)

    @classmethod
    def of_page(cls, url: str, hub: Hub) -> HubPath | None:
        """The model of a page or file URL of this hub; None for any other URL."""
        where = url.partition("?")[0]
        if origin(url, where, typed=True) != origin(hub.endpoint, hub.endpoint, typed=True):
            return None
        found = _PAGE.fullmatch(urlsplit(url).path)
        if not found or found["repo"].split("/")[0] in _NO_MODELS:
            return None
        tail = unquote(found["path"] or "")
        revision = f"@{found['revision']}" if found["revision"] else ""
        return cls.parse(f"{SCHEME}{found['repo']}{revision}{tail}")

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision != MAIN else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")
