"""What a remote grants and contains, asked without a version: the rights of its user, and the names below a URL."""

from __future__ import annotations

from functools import partial

from adapterhub_converters.errors import UsageError

from . import location
from .configured import NOBODY, below, nobody
from .hub.client import HubAddress
from .location import Access, Surroundings
from .oci import credentials
from .oci.address import Address
from .oci.host import Host


def access(url: str, settings: Surroundings) -> Access | None:
    """Return the rights that the registry or hub at a URL grants; None for a kind of remote that cannot be asked."""
    address = location.parse(nobody(url))
    if isinstance(address, Address):
        with _host(address, settings) as host:
            return host.access()
    if isinstance(address, HubAddress):
        from .hub import repository, writer

        hub = repository.hub_of(address, settings)
        # A hub's URL is `hf://ORG` or `hub+https://HOST/ORG`; the parsed address has a made-up name instead.
        remainder = url.partition("://")[2]
        org = remainder.partition("/")[2] if address.endpoint else remainder
        return writer.access(hub.endpoint, hub.checked_token(), org, proxy=hub.proxy)
    return None


def names(url: str, prefix: str | None, settings: Surroundings) -> list[str]:
    """Return the names below a URL, those of a namespace or all.

    Raises:
        UsageError: This kind of remote cannot list them.
    """
    if not isinstance(location.parse(nobody(url)), Address):
        raise UsageError(url, "this kind of remote cannot list its names", "Name one: namespace/name")
    address = Address.parse(below(url, prefix or NOBODY))
    with _host(address, settings) as host:
        # The remote's URL may have a prefix, which is part of the repositories' names but not of the refs.
        root = address.name.removesuffix(prefix or NOBODY)
        names_below = [name.removeprefix(root) for name in host.names() if name.startswith(root)]
    return [name for name in names_below if not prefix or name == prefix or name.startswith(f"{prefix}/")]


def _host(address: Address, settings: Surroundings) -> Host:
    find_credentials = partial(credentials.find, address.host, settings.docker, plain=address.plain)
    return Host(address, find_credentials, proxy=settings.proxy)
