"""To which addresses a request may go, and what a name with several of them tells."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pytest

from adapterhub.http.boundary import Boundary, LedAstrayError, Reach, reach_of
from adapterhub.http.client import Client
from adapterhub.http.urls import origin
from adapterhub_converters.errors import RemoteError
from tests.support.web_server import Web


def client(web: Web, pauses: Sequence[float] = (), **changes: object) -> Client:
    return Client(web.url, pauses=pauses, **changes)  # type: ignore[arg-type]


def get(client: Client, path: str, limit: int = 1 << 20) -> bytes:
    return client.request("GET", client.base + path, "x", good=(200,), limit=limit).body


@pytest.mark.parametrize(
    ("address", "reach"),
    [("8.8.8.8", Reach.PUBLIC), ("2001:4860:4860::8888", Reach.PUBLIC), ("10.0.0.1", Reach.PRIVATE), ("fd00::1", Reach.PRIVATE),
     ("100.64.0.1", Reach.PRIVATE), ("127.9.9.9", Reach.LOOPBACK), ("::1", Reach.LOOPBACK), ("::", Reach.LOOPBACK),
     ("169.254.1.1", Reach.LINK), ("fe80::1%eth0", Reach.LINK), ("fd00:ec2::254", Reach.LINK), ("168.63.129.16", Reach.LINK),
     ("::ffff:127.0.0.1", Reach.LOOPBACK), ("64:ff9b::a00:1", Reach.PRIVATE), ("2002:a9fe:a9fe::1", Reach.LINK),
     ("::10.0.0.1", Reach.PRIVATE), ("::127.0.0.1", Reach.LOOPBACK), ("fec0::1", Reach.PRIVATE), ("224.0.0.1", Reach.PRIVATE),
     ("ff02::1", Reach.PRIVATE), ("64:ff9b:1::a00:1", Reach.PRIVATE)],
)  # fmt: skip
def test_who_can_reach_an_address(address: str, reach: Reach) -> None:
    assert reach_of(address) is reach


def test_this_machine_by_name_is_no_other_machine() -> None:
    Boundary("localhost").check_peer("localhost", "127.0.0.1")
    for home, host in (("localhost", "localhost"), ("a.localhost", "a.localhost"), ("public.example", "x.localhost")):
        with pytest.raises(LedAstrayError, match="is 8.8.8.8 here, which is not this machine"):
            Boundary(home).check_peer(host, "8.8.8.8")


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The addresses of names, which a hostile DNS server chooses."""
    names: dict[str, list[str]] = {}
    look_up = socket.getaddrinfo

    def answer(host: str, *arguments: Any, **options: Any) -> list[Any]:
        if host not in names:
            return look_up(host, *arguments, **options)
        addresses = names[host]
        return [entry for address in addresses for entry in look_up(address, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return names


def test_a_name_of_a_near_address_tells_nobody_which_of_its_ports_are_open(resolved: dict[str, list[str]]) -> None:
    """It was judged once it was connected to, so that a webhook's error told open ports from closed ones."""
    resolved["hooks.example"] = ["127.0.0.1", "127.0.0.2"]
    errors = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for port in (listener.getsockname()[1], 1):
            client = Client(pauses=(), boundary=Boundary("", public_only=True))
            with pytest.raises(RemoteError, match="it is not at a public address") as caught:
                client.request("POST", f"http://hooks.example:{port}/", "x", good=(200,))
            errors.append(str(caught.value))
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert errors[0] == errors[1]
    assert "127.0.0" not in errors[0]


def test_a_name_leads_to_the_first_of_its_addresses_that_answers(web: Web, resolved: dict[str, list[str]]) -> None:
    port = origin(web.url, "x")[2]
    resolved["hub.example"] = ["127.0.0.2", "127.0.0.1"]
    web.rules["/x"] = lambda to: to.send(200, b"ok")
    assert get(Client(f"http://hub.example:{port}", pauses=()), "/x") == b"ok"


def test_of_hundreds_of_addresses_few_are_tried(resolved: dict[str, list[str]]) -> None:
    """Each had a timeout of its own: a name with 200 addresses that do not answer held a thread for 33 minutes."""
    tried: list[str] = []

    class Recording(Boundary):
        def check_peer(self, host: str, address: str, *, is_connected: bool = True) -> None:
            tried.append(address)
            raise LedAstrayError(address)

    resolved["hooks.example"] = [f"127.0.1.{number}" for number in range(1, 201)]
    with pytest.raises(RemoteError):
        Client(pauses=(), boundary=Recording("nobody.invalid")).request("GET", "http://hooks.example:1/", "x", good=(200,))
    assert tried == resolved["hooks.example"][:8]
