"""What a remote grants and contains, asked without a version: the access of its user, and the names below a URL."""

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


def access(url: str, who: Surroundings) -> Access | None:
    """The access that the registry or the hub at a URL grants; None for a kind that cannot be asked."""
    place = location.parse(nobody(url))
    if isinstance(place, Address):
        with _host(place, who) as host:
            return host.access()
    if isinstance(place, HubAddress):
        from .hub import repository, writer

        hub = repository.hub_of(place, who)
        rest = url.partition("://")[2]
        org = rest.partition("/")[2] if place.endpoint else rest
        return writer.access(hub.endpoint, hub.checked_token(), org, proxy=hub.proxy)
    return None


def names(url: str, prefix: str | None, who: Surroundings) -> list[str]:
    """The names below a URL, those of a namespace or all; UsageError for a kind that cannot list them."""
    if not isinstance(location.parse(nobody(url)), Address):
        raise UsageError(url, "this kind of remote cannot list its names", "Name one: namespace/name")
    place = Address.parse(below(url, prefix or NOBODY))
    with _host(place, who) as host:
        root = place.name.removesuffix(prefix or NOBODY)
        found = [one.removeprefix(root) for one in host.names() if one.startswith(root)]
    return [one for one in found if not prefix or one == prefix or one.startswith(f"{prefix}/")]


def _host(place: Address, who: Surroundings) -> Host:
    find = partial(credentials.find, place.host, who.docker, plain=place.plain)
    return Host(place, find, proxy=who.proxy)
