"""Addresses of all kinds: parse one, and connect to the remote that it names.

Each kind of remote is a module with `parse` and `connect`. This module only maps schemes to modules, so that a command imports
the one that it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from adapterhub.digest import Digest
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub_converters.errors import UsageError

from .protocol import Connected

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub

_HUB, _LAYOUT, _OBJECTS, _OCI = "hub.repository", "layouts.location", "objects.store", "oci.repository"
_MODULES = {
    "az": _OBJECTS,
    "file": _OBJECTS,
    "gs": _OBJECTS,
    "hf": _HUB,
    "hub+http": _HUB,
    "hub+https": _HUB,
    "layout": _LAYOUT,
    "oci": _OCI,
    "oci+http": _OCI,
    "oci+https": _OCI,
    "s3": _OBJECTS,
}
_SKOPEO = ("oci:", "oci-archive:")  # image layouts, as skopeo writes them


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The settings of the user that a remote may need, gathered where the environment is read.

    Attributes:
        docker: docker's config.json, with the credentials for registries; it may be absent. None for none.
        hub: Returns the Hugging Face Hub to use and the token for it; called only if needed.
        environ: The environment, for the conventions of object stores (`AWS_…`, proxies).
        uploads: The folder that records how far uploads have come; None to record nothing.
        proxy: The proxy for a scheme and a host.
        author: The user, for a log.
        login: Returns the token that is stored for a host, in the clear or not (`Address.plain`); None for none.
    """

    docker: Path | None
    hub: Callable[[], Hub]
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    uploads: Path | None = None
    proxy: ProxyOf = no_proxy
    author: str = ""
    login: Callable[[str, bool], str | None] = lambda _host, _plain: None


@dataclass(frozen=True, slots=True)
class Access:
    """The rights that a server grants to a user; an empty `who` is an anonymous one.

    Attributes:
        source: Where the credentials come from.
        writes: None if there is no way to find out without a trace.
        why: The reason for a right that is missing.
    """

    who: str
    source: str
    reads: bool
    writes: bool | None
    why: str = ""


class Place(Protocol):
    """An address: the name of an adapter in a remote, with or without a version. `str()` is its text."""

    @property
    def host(self) -> str:
        """The name to show with progress."""

    @property
    def owner(self) -> str:
        """Whom it is at: `https://HOST[:PORT]`, `http://…`, `s3://BUCKET`, `file://PATH`; empty for the user's own hub."""

    @property
    def title(self) -> str:
        """The name for a folder with its files."""

    @property
    def repository(self) -> str:
        """The address without a version."""

    @property
    def mark(self) -> str:
        """The character between the name and a tag."""

    @property
    def tag(self) -> str | None:
        """The tag, or None."""

    @property
    def digest(self) -> Digest | None:
        """The digest, or None."""

    @property
    def reference(self) -> str:
        """The digest, else the tag, else the default of its kind, such as `latest`."""

    @property
    def version(self) -> str:
        """`repository` with `reference`."""


def is_address(text: str) -> bool:
    """Tell whether a text is an address rather than a ref or a path."""
    return bool(_kind(text))


def is_layout(text: str) -> bool:
    """Tell whether a text is the address of an image layout on the local disk, without importing an HTTP client."""
    return _kind(text) == _LAYOUT


def kinds() -> tuple[str, ...]:
    """All schemes."""
    return tuple(_MODULES)


def parse(text: str) -> Place:
    """Parse an address; the UsageError for an invalid one never repeats a password."""
    if not is_address(text):
        known = ", ".join(f"{kind}://" for kind in kinds())
        raise UsageError(text.partition(":")[0][:80], "not the address of a registry or a hub", f"Begin it with one of {known}")
    found: Place = _module(text).parse(text)
    return found


def connect(place: Place, who: Surroundings) -> Connected:
    """Open a remote; no request is made yet."""
    found: Connected = _module(place.repository).connect(place, who)
    return found


def owner_of(path: Path) -> str:
    """The owner of what is in a folder or file of this disk (`Place.owner`)."""
    return f"file://{quote(str(path.absolute().resolve()))}"


def is_below(owner: str, folder: Path) -> bool:
    """Tell whether an owner is that of a folder, or of something in it."""
    parts = urlsplit(owner)
    return parts.scheme == "file" and Path(unquote(parts.path)).is_relative_to(folder.absolute().resolve())


def name_of(place: Place) -> str:
    """The name of the adapter at an address, without the place that it is at."""
    if is_layout(place.repository):  # a whole ref is the tag
        return (place.tag or "").partition(":")[0] if "/" in (place.tag or "") else place.title
    return place.repository.partition("://")[2].removeprefix(f"{place.host}/")


def namespace_of(place: Place) -> str:
    """The address without the last part of its name; an image layout is one namespace."""
    return place.repository if is_layout(place.repository) else place.repository.rpartition("/")[0]


def expecting(place: Connected, digest: str | None) -> None:
    """Write to a remote only if its tag is still at `digest`; ParameterError if it cannot compare, nothing for None."""
    if digest is not None:
        place.expect(digest)


def _module(text: str) -> Any:
    return importlib.import_module(f".{_kind(text)}", __package__)


def _kind(text: str) -> str:
    """The module for an address; empty for a text that is not one."""
    scheme, found, _ = text.partition("://")
    if found and scheme.lower() in _MODULES:
        return _MODULES[scheme.lower()]
    return _LAYOUT if text.lower().startswith(_SKOPEO) else ""
