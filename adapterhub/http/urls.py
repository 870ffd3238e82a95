"""Where a request may go: the origin of a URL, the target of a `Location`, and the proxy in between."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import field
from urllib.parse import unquote, urljoin, urlsplit

from adapterhub_converters import safe_regex
from adapterhub_converters.errors import RemoteError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .boundary import is_loopback

Origin = tuple[str, str, int]
"""Scheme, host and port."""
# One or several of PostgreSQL, separated by commas: names or IP addresses with their ports, none for a socket.
_HOSTS = safe_regex.Pattern(r"(?:(?:\[[^\[\]]*\]|[^\[\]:,]*)(?::[0-9]*)?(?:,|$))*")
ProxyOf = Callable[[str, str], str]
"""Returns the URL of the proxy for a scheme and a host; an empty string for a direct connection."""


def no_proxy(_scheme: str, _host: str) -> str:
    """Return an empty text: always connect directly."""
    return ""


def origin(url: str, location: str, *, is_user_input: bool = False) -> Origin:
    """Return the origin of a URL.

    Raises:
        RemoteError: It is not an http or https URL, or contains credentials. UsageError instead if `is_user_input`.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _address_error(location, f"an invalid address ({error})", is_user_input) from error
    # Control characters and spaces could split a request line or a log line.
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise _address_error(location, "an address that is not http or https", is_user_input)
    if parts.username is not None or parts.password is not None:
        raise _address_error(
            location.rpartition("@")[2], "an address with credentials, which end up in logs", is_user_input, "Leave them out"
        )
    return parts.scheme, parts.hostname.lower(), port or (443 if parts.scheme == "https" else 80)


def _address_error(location: str, problem: str, is_user_input: bool, hint: str = "") -> UsageError | RemoteError:
    return UsageError(location, problem, hint) if is_user_input else RemoteError(location, f"the server names {problem}")


def address_without_credentials(url: str) -> str:
    """Return the address of a PostgreSQL without user, password and parameters.

    Raises:
        UsageError: It is the address of something else, or one in which a part of the password could be taken for the host.
    """
    scheme, _, rest = url.partition("://")
    # As libpq does, and `urlsplit` does not: all before an @ is of the user, with any ? and #, unless there is a slash in it.
    before_slash = rest.partition("/")[0]
    credentials, _, host = before_slash.rpartition("@")
    place = rest[len(before_slash) - len(host) :].partition("?")[0]
    if scheme not in ("postgres", "postgresql") or "@" in credentials + place or not _HOSTS.fullmatch(place.partition("/")[0]):
        hint = "Write it like postgresql://user@host/name, and @ : / ? # in a password as %40 %3A %2F %3F %23"
        raise UsageError("database", "not an address of PostgreSQL", hint)
    return f"postgresql://{place}"


def resolve_link(url: str, location: str | None, where: str) -> str:
    """Return the URL that a `Location` or `Link` header of the response from `url` refers to.

    Raises:
        RemoteError: The header is missing, the URL is invalid, or it leads from https to http.
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


def next_page(link: str, url: str, location: str) -> str | None:
    """Return the URL of the next page from the `Link` header of the response from `url` (RFC 8288); None on the last page.

    Raises:
        RemoteError: As in `resolve_link`.
    """
    for text in link.split("<")[1:]:
        target, _, parameters = text.partition(">")
        for parameter in parameters.split(";"):
            name, _, value = parameter.partition("=")
            if name.strip().lower() == "rel" and "next" in value.strip('", \t').lower().split():
                return resolve_link(url, target, location)
    return None


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy; `headers` are sent only to it and carry its password."""

    host: str
    port: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def url(self) -> str:
        """Its address, without credentials."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def proxy_to(scheme: str, host: str, proxy_of: ProxyOf, location: str) -> Proxy | None:
    """Return the proxy for a host; None for a direct connection, which this machine itself always gets."""
    # This machine is never reached through a proxy, whatever the environment says.
    text = "" if is_loopback(host) else proxy_of(scheme, host)
    if not text:
        return None
    hint = f"Set {scheme.upper()}_PROXY to one like http://proxy.example:3128"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port or 8080
    except ValueError as error:
        raise RemoteError(location, "the address of the proxy is invalid", hint) from error
    # urllib3 would speak TLS or SOCKS to such a proxy, which this client does not configure.
    if parts.scheme != "http":
        problem = f"the address of the proxy begins with {parts.scheme[:20]}://; only http:// is supported"
        raise RemoteError(location, problem, hint)
    if not parts.hostname:
        raise RemoteError(location, "the address of the proxy is invalid", hint)
    headers = {}
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(parts.hostname, port, headers)
