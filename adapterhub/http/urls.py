"""Where a request may go: the origin of a URL, the target of a `Location`, and the proxy on the way."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urljoin, urlsplit

from adapterhub_converters.errors import RemoteError, UsageError

from .boundary import is_loopback

Origin = tuple[str, str, int]
"""Scheme, host and port."""
ProxyOf = Callable[[str, str], str]
"""Returns the URL of the proxy for a scheme and a host; an empty string for a direct connection."""


def no_proxy(_scheme: str, _host: str) -> str:
    """A direct connection, always."""
    return ""


def origin(url: str, where: str, *, typed: bool = False) -> Origin:
    """The origin of a URL.

    Raises:
        RemoteError: It is not an http or https URL, or has credentials in it; a UsageError if the user has `typed` it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _bad(where, f"an invalid address ({error})", typed) from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise _bad(where, "an address that is not http or https", typed)
    if parts.username is not None or parts.password is not None:
        raise _bad(where.rpartition("@")[2], "an address with credentials, which end up in logs", typed, "Leave them out")
    return parts.scheme, parts.hostname.lower(), port or (443 if parts.scheme == "https" else 80)


def _bad(where: str, what: str, typed: bool, hint: str = "") -> UsageError | RemoteError:
    return UsageError(where, what, hint) if typed else RemoteError(where, f"the server names {what}")


def resolved(url: str, location: str | None, where: str) -> str:
    """The URL that a `Location` or a `Link` in the answer from `url` means.

    Raises:
        RemoteError: There is none, it cannot be requested, or it leads from https to http.
    """
    if not location:
        raise RemoteError(where, "the server redirects without an address")
    try:
        target = urljoin(url, location)
    except ValueError as error:
        raise RemoteError(where, f"the server names an invalid address ({error})") from error
    if origin(target, where)[0] != "https" and origin(url, where)[0] == "https":
        raise RemoteError(where, "the server leads from https to http", code="no-tls")
    return target


def next_page(link: str, url: str, where: str) -> str | None:
    """The URL of the next page by the header `Link` of the answer from `url` (RFC 8288); None on the last page.

    Raises:
        RemoteError: As `resolved`.
    """
    for text in link.split("<")[1:]:
        target, _, parameters = text.partition(">")
        for parameter in parameters.split(";"):
            name, _, value = parameter.partition("=")
            if name.strip().lower() == "rel" and "next" in value.strip('", \t').lower().split():
                return resolved(url, target, where)
    return None


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy: `headers` are for it alone and carry its password."""

    host: str
    port: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def url(self) -> str:
        """Its address, without credentials."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def proxy_to(scheme: str, host: str, named: ProxyOf, where: str) -> Proxy | None:
    """The proxy for a host; None for a direct connection, which this machine always gets."""
    text = "" if is_loopback(host) else named(scheme, host)
    if not text:
        return None
    hint = f"Set {scheme.upper()}_PROXY to one like http://proxy.example:3128"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or 8080
    except ValueError as error:
        raise RemoteError(where, "the address of the proxy is invalid", hint) from error
    if parts.scheme != "http":
        what = f"the address of the proxy begins with {parts.scheme[:20]}://; only http:// is supported"
        raise RemoteError(where, what, hint)
    if not parts.hostname:
        raise RemoteError(where, "the address of the proxy is invalid", hint)
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(parts.hostname, port, headers)
