"""What an address means, whatever kind of place it names, and the place opened.

A kind of place is a module with `parse`, of the words, and `connect`. Here is only which scheme is whose, so that a command
imports the one module that it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adapterhub.digest import Digest
from adapterhub.http.urls import ProxyOf, no_proxy

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
    """What a place may need of who asks; gathered where the environment is read.

    Attributes:
        docker: docker's config.json, which need not be there.
        hub: Says which Hugging Face Hub is meant and who asks; asked only by who needs it.
        environ: The environment, for the conventions of object stores (`AWS_…`, proxies).
        uploads: A folder of the user's for how far uploads have come; None for nowhere.
        proxy: The proxy for a scheme and a host.
    """

    docker: Path
    hub: Callable[[], Hub]
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    uploads: Path | None = None
    proxy: ProxyOf = no_proxy


@dataclass(frozen=True, slots=True)
class Access:
    """What a server grants: `who` it takes us for (empty: nobody), and by whose word; whether we may read, and write.

    `writes` is None where there is no way to ask that leaves nothing; `why` is the reason of a no.
    """

    who: str
    source: str
    reads: bool
    writes: bool | None
    why: str = ""


class Place(Protocol):
    """An address: one adapter's name somewhere, and perhaps which of its versions. `str()` writes it again."""

    @property
    def host(self) -> str:
        """Whom progress names."""

    @property
    def title(self) -> str:
        """What a folder of it is called."""

    @property
    def repository(self) -> str:
        """The address without a version."""

    @property
    def mark(self) -> str:
        """The character between the name and a tag."""

    @property
    def tag(self) -> str | None:
        """The tag, if there is one."""

    @property
    def digest(self) -> Digest | None:
        """The digest, if there is one."""

    @property
    def reference(self) -> str:
        """What is asked for: the digest, else the tag, else what stands for the newest."""

    @property
    def version(self) -> str:
        """`repository` with `reference`."""


def is_address(text: str) -> bool:
    """Whether `text` is meant as one."""
    return bool(_kind(text))


def kinds() -> tuple[str, ...]:
    """The schemes that there are."""
    return tuple(_MODULES)


def parse(text: str) -> Place:
    """What an address says; UsageError says what is wrong with it, and never repeats a password."""
    found: Place = _module(text).parse(text)
    return found


def connect(place: Place, who: Surroundings) -> Connected:
    """The place, open; nothing is asked of it yet."""
    found: Connected = _module(place.repository).connect(place, who)
    return found


def expecting(place: Connected, digest: str | None) -> None:
    """Write to a remote only if its tag is still at `digest`; ParameterError if it cannot compare, nothing for None."""
    if digest is not None:
        place.expect(digest)


def _module(text: str) -> Any:
    return importlib.import_module(f".{_kind(text)}", __package__)


def _kind(text: str) -> str:
    """The module of an address; empty for what is none."""
    scheme, found, _ = text.partition("://")
    if found and scheme.lower() in _MODULES:
        return _MODULES[scheme.lower()]
    return _LAYOUT if text.lower().startswith(_SKOPEO) else ""
