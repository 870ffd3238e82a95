"""The addresses a server may lead this client to: none closer to this machine than the server itself.

A redirect, a link, an upload location or the address of a token service may name an address that only this machine can reach:
itself, the network behind its firewall, or a cloud's metadata service, which hands out credentials. The host the user named may
be anywhere. Any other host is judged by each address before a connection to it is opened, so that nobody learns which ports of
a network are open, and by the address actually connected to, so that a name whose address changes cannot get around this.
"""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import threading

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Metadata services outside the link-local range: Azure's WireServer, Amazon's for IPv6, Alibaba's, Oracle's.
_METADATA = {ipaddress.ip_address(text) for text in ("168.63.129.16", "fd00:ec2::254", "100.100.100.200", "192.0.0.192")}
_METADATA_NAMES = {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAT64 = ipaddress.ip_network("64:ff9b:1::/48")  # RFC 8215: whatever a network embeds there


class Reach(enum.IntEnum):
    """Who can reach an address; a higher value is closer to this machine. No server may lead to a LINK address."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    LINK = 3


_REACH_TEXT = {
    Reach.PUBLIC: "a public",
    Reach.PRIVATE: "a private",
    Reach.LOOPBACK: "this machine's own",
    Reach.LINK: "a link-local or metadata",
}


class LedAstrayError(OSError):
    """A server named an address it must not lead to."""


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine by its very name, so that nobody can listen in between."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def reach_of(address: str) -> Reach:
    """Return the reach of an IP address. ValueError for any other text."""
    ip = _embedded_ipv4(ipaddress.ip_address(address.strip("[]").partition("%")[0]))
    if ip.is_link_local or ip in _METADATA:
        return Reach.LINK
    if ip.is_loopback or ip.is_unspecified:
        return Reach.LOOPBACK
    is_local = ip in _LOCAL_NAT64 or ip.is_multicast or (isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local)
    return Reach.PUBLIC if ip.is_global and not is_local else Reach.PRIVATE


def _embedded_ipv4(ip: _Address) -> _Address:
    """Return the IPv4 address embedded in an IPv6 address, if there is one."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    is_compatible = 1 < int(ip) < 1 << 32  # `::10.0.0.1`, but neither `::` nor `::1` (RFC 4291, section 2.5.5.1)
    low_bits = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 or is_compatible else None
    return ip.ipv4_mapped or ip.sixtofour or low_bits or ip


def _reach_by_name(host: str) -> Reach | None:
    """Return the reach of a host as far as its text tells; None if it has to be looked up."""
    if host.lower().rstrip(".") in _METADATA_NAMES:
        return Reach.LINK
    try:
        return reach_of(host)
    except ValueError:
        pass
    with contextlib.suppress(OSError):  # an address in decimal or hexadecimal, which a proxy may resolve for us
        if host[:1].isdigit():
            import socket  # imported late: commands that contact nobody parse addresses, too

            return reach_of(socket.inet_ntoa(socket.inet_aton(host)))
    return Reach.LOOPBACK if is_loopback(host) else None


class Boundary:
    """The boundary of requests to one host; several clients may share one.

    Args:
        home: The host, which the user named; empty for no boundary.
        public_only: Whether nobody at this machine has named any host: only public addresses are reached then. Its errors name
            no address, since a stranger who names the host could otherwise look up names that only this network knows.
    """

    def __init__(self, home: str, *, public_only: bool = False) -> None:
        self.home, self._public_only = home.lower(), public_only
        self._reach = _reach_by_name(home)
        self._lock = threading.Lock()

    def check_name(self, host: str) -> None:
        """Refuse a host by its text alone, before connecting to it.

        Raises:
            LedAstrayError: It is closer to this machine than `home`.
        """
        if host.lower() != self.home and (reach := _reach_by_name(host)) is not None:
            self._check(host, reach)

    def check_peer(self, host: str, address: str, *, is_connected: bool = True) -> None:
        """Refuse a host at an address, before and after connecting to it; errors as in `check_name`."""
        reach = reach_of(address)
        if is_loopback(host) and reach != Reach.LOOPBACK:
            raise LedAstrayError(f"{host} is {address} here, which is not this machine")
        if host.lower() != self.home:
            self._check(f"{host} ({address})" if host != address else host, reach)
            return
        with self._lock:
            if self._reach is not None and reach > self._reach:
                raise LedAstrayError(f"{host} was {_REACH_TEXT[self._reach]} address and is now {address}")
            self._reach = reach if self._reach is None and is_connected else self._reach

    def _check(self, target: str, reach: Reach) -> None:
        if self._public_only and reach is not Reach.PUBLIC:
            raise LedAstrayError("it is not at a public address")
        own_reach = self._reach or Reach.PUBLIC
        if self.home and (reach is Reach.LINK or reach > own_reach):
            raise LedAstrayError(f"the server leads to {target}, {_REACH_TEXT[reach]} address, which it must not")
