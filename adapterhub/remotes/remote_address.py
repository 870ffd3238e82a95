"""Addresses of remotes of all kinds: parsing one, and connecting to the remote that it names.

Each kind of remote is a module with `parse` and `connect`, which is imported when an address of its kind is parsed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from adapterhub.digest import Digest
from adapterhub.http.urls import ProxyOf, no_proxy
from adapterhub_converters.errors import UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .address_schemes import is_address, is_layout, module_name, schemes
from .protocol import OpenRemote

if TYPE_CHECKING:
    from adapterhub.bases.hub_address import Hub


@dataclass(frozen=True, slots=True)
class UserSettings:
    """The user's settings that a remote may need, gathered where the environment is read.

    Attributes:
        docker: docker's config.json, with the credentials for registries; the file may be absent. None to use none.
        hub: Returns the Hugging Face Hub to use and the token for it; called only if needed.
        environ: The environment, for the conventions of object stores (`AWS_…`, proxies).
        uploads: The folder that records the progress of uploads; None to record nothing.
        proxy: The proxy for a scheme and a host.
        author: The user, for a log.
        login: Returns the token that is stored for a host, or None; its second argument is True for plain HTTP
            (`OciAddress.is_plaintext`).
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
    """The rights that a server grants to a user; an empty `user` is an anonymous user.

    Attributes:
        source: Where the credentials come from.
        writes: None if there is no way to find out without leaving a trace.
        reason: The reason for a missing right.
    """

    user: str
    source: str
    reads: bool
    writes: bool | None
    reason: str = ""


class RemoteAddress(Protocol):
    """An address: the name of an adapter in a remote, with or without a version. `str()` is its text."""

    @property
    def host(self) -> str:
        """The name to show with progress."""

    @property
    def owner(self) -> str:
        """The owner: `https://HOST[:PORT]`, `http://…`, `s3://BUCKET`, `file://PATH`; empty for the user's own hub."""

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


def parse(text: str) -> RemoteAddress:
    """Parse an address.

    Raises:
        UsageError: It is invalid. The message never repeats a password.
    """
    if not is_address(text):
        known_schemes = ", ".join(f"{kind}://" for kind in schemes())
        raise UsageError(
            text.partition(":")[0][:80], "not the address of a registry or a hub", f"Begin it with one of {known_schemes}"
        )
    address: RemoteAddress = _import_module(text).parse(text)
    return address


def connect(address: RemoteAddress, settings: UserSettings) -> OpenRemote:
    """Open a remote; no request is made yet."""
    # Any kind of address can be passed: its text says which module it belongs to.
    remote: OpenRemote = _import_module(address.repository).connect(address, settings)
    return remote


def owner_of(path: Path) -> str:
    """Return the owner of a folder or file on this disk (`RemoteAddress.owner`)."""
    return f"file://{quote(str(path.absolute().resolve()))}"


def is_below(owner: str, folder: Path) -> bool:
    """Return whether an owner is that of a folder, or of something in it."""
    url_parts = urlsplit(owner)
    return url_parts.scheme == "file" and Path(unquote(url_parts.path)).is_relative_to(folder.absolute().resolve())


def name_of(address: RemoteAddress) -> str:
    """Return the name of the adapter at an address, without the place where it is."""
    if is_layout(address.repository):  # the tag is a complete ref
        return (address.tag or "").partition(":")[0] if "/" in (address.tag or "") else address.title
    return address.repository.partition("://")[2].removeprefix(f"{address.host}/")


def namespace_of(address: RemoteAddress) -> str:
    """Return the address without the last part of its name; an image layout is a single namespace."""
    return address.repository if is_layout(address.repository) else address.repository.rpartition("/")[0]


def expect_digest(remote: OpenRemote, digest: str | None) -> None:
    """Write to a remote only if its tag is still at `digest`; do nothing for None.

    Raises:
        ParameterError: The remote cannot compare and write in one step.
    """
    if digest is not None:
        remote.expect(digest)


def _import_module(text: str) -> Any:
    return importlib.import_module(f".{module_name(text)}", __package__)
