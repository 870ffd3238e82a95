"""A hub and a gateway ask first and take then: whoever may not send a body is refused by its headers, and bytes are counted.

The routes are those of the applications, so that a new one is held to the same.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import select
import socket
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest
from starlette.routing import BaseRoute, Route

import adapterhub.hub
import adapterhub.serve.gateway
from adapterhub.http_server import client_connections, request_bodies
from adapterhub.http_server.request_bodies import BodyBudget, BodyError, BodyLimits
from adapterhub.hub import app
from tests.hub.conftest import Running, serving
from tests.support.hub_tenants import Tenant

ROUTES = [*app.api_routes(), *app.page_routes()]
WITH_BODY = ("POST", "PUT", "PATCH")
LARGE = 3 << 20
# What reads a body past the one place: methods of starlette's Request, and its channel.
OTHER_WAYS = {"stream", "body", "form", "json"}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A hub that requires a login, with a repository."""
    with serving(tmp_path_factory.mktemp("closed") / "hub", require_login=True) as running:
        Tenant(running, "red").create("open")
        yield running


def bodies_of(routes: list[BaseRoute]) -> list[tuple[str, str]]:
    """The methods and paths of routes that may have a body."""
    return [
        (
            method,
            re.sub(r"{\w+(:path)?}", lambda match: PARAMETERS.get(match[0].strip("{}").partition(":")[0], "main"), route.path),
        )
        for route in routes
        if isinstance(route, Route)
        for method in sorted((route.methods or set()) & set(WITH_BODY))
    ]


PARAMETERS = {"namespace": "red", "repo": "open", "name": "red/open", "oid": "0" * 64, "hash": "0" * 64, "session": "0" * 32}


def head(method: str, path: str, size: int, *lines: str) -> bytes:
    """The head of a request with a body that does not come."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}", *lines, "", ""]).encode()


def answer_to(hub: Running, sent: bytes) -> int:
    """The status that a hub answers to a head alone."""
    parts = urlsplit(hub.url)
    with socket.create_connection((parts.hostname, parts.port), 20) as sock:
        sock.sendall(sent)
        return int(sock.recv(100).split()[1])


def test_there_are_routes_with_bodies() -> None:
    assert len(bodies_of(ROUTES)) > 25


@pytest.mark.parametrize(("method", "path"), bodies_of(ROUTES))
def test_a_stranger_is_answered_before_the_body(closed: Running, method: str, path: str) -> None:
    """It may not be there, or is too large for what strangers may send; in any case, nothing of it is waited for."""
    assert answer_to(closed, head(method, path, LARGE)) in (200, 204, 303, *range(400, 500), 501)


def modules_below(package: ModuleType) -> list[ModuleType]:
    module_infos = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [import_module(module.name) for module in module_infos]


@pytest.mark.parametrize("package", [adapterhub.hub, adapterhub.serve.gateway], ids=lambda package: package.__name__)
def test_nothing_reads_a_body_but_by_the_one_place(package: ModuleType) -> None:
    for module in modules_below(package):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OTHER_WAYS:
                assert "request" not in ast.unparse(node.func.value).split("."), f"{module.__name__}: {ast.unparse(node)}"


def test_a_route_that_reads_a_body_in_another_way_gets_nothing_of_it() -> None:
    import asyncio

    from starlette.requests import ClientDisconnect, Request
    from starlette.types import Message, Receive, Scope, Send

    messages: list[Message] = [{"type": "http.request", "body": b"x" * 100, "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_message: Message) -> None:
        raise AssertionError

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(ClientDisconnect):
            await Request(scope, receive).body()

    budget = BodyBudget(BodyLimits(10, 10, 10, 10))
    asyncio.run(request_bodies.BodyGuard(route, budget)({"type": "http", "headers": []}, receive, send))


# ---- the sums


def test_bytes_count_for_the_process_the_address_and_the_account_and_are_given_back() -> None:
    budget = BodyBudget(BodyLimits(process=100, address=60, account=50, stranger=10))

    def is_taken(address: str, account: str, count: int) -> bool:
        try:
            budget.take(address, account, count)
        except BodyError as error:
            return (error.status, error.headers()) != (429, {"retry-after": "2"})
        return True

    assert is_taken("a", "", 10)
    assert not is_taken("a", "", 1)  # a stranger's address
    assert is_taken("a", "red", 50)
    assert not is_taken("a", "blue", 1)  # an address
    assert not is_taken("b", "red", 1)  # an account
    assert is_taken("b", "blue", 40)
    assert not is_taken("c", "green", 1)  # all of them
    budget.give_back("a", "red", 50)
    assert is_taken("c", "green", 50)
    for address, account, count in (("a", "", 10), ("b", "blue", 40), ("c", "green", 50)):
        budget.give_back(address, account, count)
    assert budget.total == 0
    assert budget._sums == {}


def test_bodies_that_are_held_back_take_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """120 connections that sent all of 4 MB but the last byte held 483 MB, without a token."""
    monkeypatch.setattr(app, "BODY_LIMITS", BodyLimits(process=8 << 20, address=8 << 20, account=8 << 20, stranger=1 << 20))
    budgets: list[BodyBudget] = []

    class Kept(BodyBudget):
        def __init__(self, limits: BodyLimits) -> None:
            super().__init__(limits)
            budgets.append(self)

    monkeypatch.setattr(app, "BodyBudget", Kept)
    with serving(tmp_path / "hub") as hub:
        Tenant(hub, "red").create("open")
        parts = urlsplit(hub.url)
        socks = [socket.create_connection((parts.hostname, parts.port), 20) for _ in range(6)]
        size = 400_000
        for sock in socks:
            sock.sendall(head("POST", "/api/models/red/open/paths-info/main", size) + b"x" * (size - 1))
        refused, _, _ = select.select(socks, [], [], 20)  # which of them, the order in which they are read decides
        assert refused[0].recv(100).startswith(b"HTTP/1.1 429 ")
        assert budgets[0].total <= 1 << 20
        for sock in socks:
            sock.close()


def test_a_body_has_a_deadline_however_its_bytes_drip(closed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_bodies, "BODY_SECONDS", 0.3)
    parts = urlsplit(closed.url)
    with socket.create_connection((parts.hostname, parts.port), 20) as sock:
        sock.settimeout(0.05)
        sock.sendall(head("POST", "/oauth/token", 10_000))
        for _ in range(400):
            sock.sendall(b"x")
            try:
                assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
                return
            except TimeoutError:
                pass
    raise AssertionError


def test_the_rest_of_a_body_that_was_refused_is_not_waited_for(closed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REST_SECONDS", "CHECK_SECONDS"):
        monkeypatch.setattr(client_connections, name, 0.1)
    parts = urlsplit(closed.url)
    with socket.create_connection((parts.hostname, parts.port), 20) as sock:
        sock.sendall(head("POST", "/api/repos/create", LARGE))
        while True:
            try:
                sock.sendall(b"x")
                if not sock.recv(1000):
                    return
            except OSError:
                return
