"""The address of a model on a Hugging Face Hub, `hf://org/model[@revision][/file]`."""

from __future__ import annotations

from dataclasses import field
from urllib.parse import quote, unquote, urlsplit

from adapterhub.http.boundary import is_loopback
from adapterhub.http.urls import ProxyOf, no_proxy, origin
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import RemoteError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

ENDPOINT = "https://huggingface.co"
SCHEME = "hf://"
MAIN = "main"
OFFLINE = "offline"
"""The error code for requests to a hub that are not allowed (offline)."""
_NAME_PATTERN = safe_regex.Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_MODEL_PATTERN = safe_regex.Pattern(
    r"(?P<repo>[^/@]+/[^/@]+|[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
# The path of the page of a model, or of a file in it.
_PAGE_PATTERN = safe_regex.Pattern(r"/(?P<repo>[^/]+/[^/]+)(?:/(?:tree|blob|resolve)/(?P<revision>[^/]+)(?P<path>/.*)?)?/?")
# First segments of other pages, which are not the name of an organization.
_OTHER_PAGES = ("datasets", "spaces", "api", "docs", "collections", "papers", "blog")


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub, the token for it, and the proxy to use for each host."""

    endpoint: str = ENDPOINT
    token: str | None = field(default=None, repr=False)
    proxy: ProxyOf = no_proxy

    def checked_token(self) -> str | None:
        """Return the token.

        Raises:
            UsageError: The endpoint is not a URL.
            RemoteError: There is a token, and it would be sent to another machine without TLS.
        """
        scheme, host, _ = origin(self.endpoint, self.endpoint, is_user_input=True)
        # HF_ENDPOINT may point at a plain HTTP server, where others on the way could read the token.
        if self.token and scheme != "https" and not is_loopback(host):
            hint = "Use https, or leave out the token"
            raise RemoteError(
                self.endpoint, "a token is not sent to another machine without TLS", hint, code="token-without-tls"
            )
        return self.token


@dataclass(frozen=True, slots=True)
class HubPath:
    """A model, its revision (branch, tag or commit), and a file or folder in it, empty for the complete model."""

    repo: str
    revision: str = MAIN
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> HubPath:
        """Parse `hf://…`; raise UsageError if it is invalid."""
        match = _MODEL_PATTERN.fullmatch(text[len(SCHEME) :])
        hint = "Write hf://org/model, hf://org/model@revision or hf://org/model/file.gguf"
        if not match or not ("/" in match["repo"] or match["revision"] or not match["path"]):
            raise UsageError(text, "not a model on a hub", hint)
        repo, revision = match["repo"], unquote(match["revision"] or MAIN)
        path = (match["path"] or "").strip("/")
        # The rules of huggingface_hub (`utils/_validators.py`, `validate_repo_id`).
        if not _NAME_PATTERN.fullmatch(repo) or len(repo) > 96 or "--" in repo or ".." in repo:
            raise UsageError(text, f"{repo[:100]!r} is not a valid model name", hint)
        if not revision.isprintable() or any(part in ("", ".", "..") for part in path.split("/") if path):
            raise UsageError(text, "the revision or the path is not valid", hint)
        return cls(repo, revision, path)

    @classmethod
    def from_page(cls, url: str, hub: Hub) -> HubPath | None:
        """Return the model of a page or file URL of this hub; None for any other URL."""
        url_without_query = url.partition("?")[0]
        if origin(url, url_without_query, is_user_input=True) != origin(hub.endpoint, hub.endpoint, is_user_input=True):
            return None
        match = _PAGE_PATTERN.fullmatch(urlsplit(url).path)
        if not match or match["repo"].split("/")[0] in _OTHER_PAGES:
            return None
        tail = unquote(match["path"] or "")
        revision = f"@{match['revision']}" if match["revision"] else ""
        return cls.parse(f"{SCHEME}{match['repo']}{revision}{tail}")

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision != MAIN else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.path}" if self.path else "")
