"""What a remote grants and contains, asked without a version: the rights of its user, and the names below a URL."""

from __future__ import annotations

from functools import partial

from adapterhub_converters.errors import UsageError

from . import remote_address
from .hub.hub_client import HubAddress
from .named_remotes import UNUSED_NAME, address_below, unused_address
from .oci import docker_credentials
from .oci.oci_address import OciAddress
from .oci.registry_host import RegistryHost
from .remote_address import Access, UserSettings


def access(url: str, settings: UserSettings) -> Access | None:
    """Return the rights that the registry or hub at a URL grants; None for a kind of remote that cannot be asked."""
    address = remote_address.parse(unused_address(url))
    # A hub's URL is `hf://ORG` or `hub+https://HOST/ORG`; the parsed address has a made-up name instead.
    remainder = url.partition("://")[2]
    org = remainder.partition("/")[2] if isinstance(address, HubAddress) and address.endpoint else remainder
    return access_to(address, settings, org)


def access_to(address: remote_address.RemoteAddress, settings: UserSettings, org: str) -> Access | None:
    """Do as `access` for an address, in the organization `org` of a hub."""
    if isinstance(address, OciAddress):
        with _open_host(address, settings) as host:
            return host.access()
    if isinstance(address, HubAddress):
        from .hub import hub_repository, hub_writer

        hub = hub_repository.hub_for(address, settings)
        return hub_writer.access(hub.endpoint, hub.checked_token(), org, proxy=hub.proxy)
    return None


def names(url: str, prefix: str | None, settings: UserSettings) -> list[str]:
    """Return the names below a URL, those of a namespace or all.

    Raises:
        UsageError: This kind of remote cannot list them.
    """
    if not isinstance(remote_address.parse(unused_address(url)), OciAddress):
        raise UsageError(url, "this kind of remote cannot list its names", "Name one: namespace/name")
    address = OciAddress.parse(address_below(url, prefix or UNUSED_NAME))
    with _open_host(address, settings) as host:
        # The remote's URL may have a prefix, which is part of the repositories' names but not of the refs.
        root = address.name.removesuffix(prefix or UNUSED_NAME)
        names_below = [name.removeprefix(root) for name in host.names() if name.startswith(root)]
    return [name for name in names_below if not prefix or name == prefix or name.startswith(f"{prefix}/")]


def _open_host(address: OciAddress, settings: UserSettings) -> RegistryHost:
    find_credentials = partial(docker_credentials.find_credentials, address.host, settings.docker, plain=address.is_plaintext)
    return RegistryHost(address, find_credentials, proxy=settings.proxy)
