"""Counts of the connections of a process, by client: each counts from when it is accepted, with TLS before the handshake."""

from __future__ import annotations

import asyncio
import ssl
from asyncio.sslproto import SSLProtocol
from collections import Counter

from .request_bodies import client_network


class ConnectionCounts:
    """The connections of a process.

    Attributes:
        most: At a time.
        most_of_network: Those of one client: an address, or a /64 with IPv6.
        by_network: How many there are.
    """

    def __init__(self, most: int) -> None:
        self.most = self.most_of_network = most
        self.by_network: Counter[str] = Counter()

    def admit(self, network: str) -> bool:
        """Count a connection of a client until `release`; return whether there is room for it."""
        self.by_network[network] += 1
        return self.by_network.total() <= self.most and self.by_network[network] <= self.most_of_network

    def release(self, network: str) -> None:
        """Stop counting a connection."""
        self.by_network[network] -= 1
        if not self.by_network[network]:
            del self.by_network[network]


class TlsConnection(SSLProtocol):
    """The encrypted side of a connection.

    An event loop with a TLS context of its own would show a connection to nobody until its handshake has ended.

    Args:
        counts: Where it counts.
        context: With the certificate.
        app_protocol: What takes over after the handshake.
        seconds: For the handshake.
    """

    def __init__(
        self, counts: ConnectionCounts, context: ssl.SSLContext, app_protocol: asyncio.BufferedProtocol, *, seconds: float
    ) -> None:
        loop, timeout = asyncio.get_running_loop(), seconds
        super().__init__(loop, app_protocol, context, None, server_side=True, ssl_handshake_timeout=timeout)  # type: ignore[arg-type]
        self._counts, self._network = counts, ""
        self._is_counted = self._is_admitted = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin the handshake, if there is room for the connection."""
        self._network, self._is_counted = network_of(transport), True
        self._is_admitted = self._counts.admit(self._network)
        if self._is_admitted:
            super().connection_made(transport)
        else:
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop counting it."""
        if self._is_counted:
            self._counts.release(self._network)
        if self._is_admitted:
            super().connection_lost(exc)


def network_of(transport: asyncio.Transport) -> str:
    """Return the network of a connection's client; empty if it is not known."""
    peer = transport.get_extra_info("peername")
    return client_network(str(peer[0])) if isinstance(peer, tuple) else ""
