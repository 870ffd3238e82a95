"""How near to this machine a server may lead: no nearer than it is itself.

A redirect, a link, the place of an upload or of a token service may name an address that only this machine can reach: itself,
the network behind a firewall, the metadata service of a cloud, which hands out credentials. The host that the user named may be
anywhere. What it leads to is held against the address that was connected to, not against one that was looked up before, so
that a name that changes in between is no way around.
"""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import threading

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Of clouds: Azure's WireServer, Amazon's for IPv6, Alibaba's, Oracle's.
_METADATA = {ipaddress.ip_address(text) for text in ("168.63.129.16", "fd00:ec2::254", "100.100.100.200", "192.0.0.192")}
_METADATA_NAMES = {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Reach(enum.IntEnum):
    """Who can reach an address; a higher one is nearer to this machine. Nothing may lead to a LINK."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    LINK = 3


_WORDS = {
    Reach.PUBLIC: "a public",
    Reach.PRIVATE: "a private",
    Reach.LOOPBACK: "this machine's own",
    Reach.LINK: "a link-local or metadata",
}


class LedAstrayError(OSError):
    """A server named an address that is none of its business."""


def is_loopback(host: str) -> bool:
    """True if a host is this machine by its very name, so that nobody can listen in between."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def reach_of(address: str) -> Reach:
    """The reach of an IP address; ValueError for another text."""
    ip = _plain(ipaddress.ip_address(address.strip("[]").partition("%")[0]))
    if ip.is_link_local or ip in _METADATA:
        return Reach.LINK
    if ip.is_loopback or ip.is_unspecified:
        return Reach.LOOPBACK
    return Reach.PUBLIC if ip.is_global else Reach.PRIVATE


def _plain(ip: _Address) -> _Address:
    """The IPv4 address inside one of IPv6, where there is one."""
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
    return ip.ipv4_mapped or ip.sixtofour or nat64 or ip


def _named(host: str) -> Reach | None:
    """The reach that a host has by its text alone."""
    if host.lower().rstrip(".") in _METADATA_NAMES:
        return Reach.LINK
    try:
        return reach_of(host)
    except ValueError:
        pass
    with contextlib.suppress(OSError):  # an address as one number or in hexadecimal digits, which a proxy may look up for us
        if host[:1].isdigit():
            import socket  # late: addresses are parsed by commands that contact nobody

            return reach_of(socket.inet_ntoa(socket.inet_aton(host)))
    return Reach.LOOPBACK if is_loopback(host) else None


def public_only() -> Boundary:
    """The boundary of what nobody at this machine has named: public addresses."""
    return Boundary("nobody.invalid")


class Boundary:
    """The boundary of what was asked of one host, `home`, which the user named; several clients may share one."""

    def __init__(self, home: str) -> None:
        self.home = home.lower()
        self._reach = _named(home)
        self._lock = threading.Lock()

    def check_name(self, host: str) -> None:
        """Refuse a host, before it is connected to, by its text alone.

        Raises:
            LedAstrayError: It is nearer than `home`.
        """
        if host.lower() != self.home and (reach := _named(host)) is not None:
            self._check(host, reach)

    def check_peer(self, host: str, address: str) -> None:
        """Refuse a host that was connected to at an address; errors as those of `check_name`."""
        reach = reach_of(address)
        if is_loopback(host) and reach != Reach.LOOPBACK:
            raise LedAstrayError(f"{host} is {address} here, which is not this machine")
        if host.lower() != self.home:
            self._check(f"{host} ({address})" if host != address else host, reach)
            return
        with self._lock:
            if self._reach is not None and reach > self._reach:
                raise LedAstrayError(f"{host} was {_WORDS[self._reach]} address and is now {address}")
            self._reach = reach if self._reach is None else self._reach

    def _check(self, shown: str, reach: Reach) -> None:
        own = self._reach or Reach.PUBLIC
        if self.home and (reach is Reach.LINK or reach > own):
            raise LedAstrayError(f"the server leads to {shown}, {_WORDS[reach]} address, which it must not")
