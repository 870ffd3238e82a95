"""Hubs that mirror another one, and what is asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapterhub.hub.settings import Upstream
from adapterhub.registry.registry import Version
from tests.hub.conftest import Running, serving
from tests.hub.sending import Answer, Sending
from tests.support.hub_models import publish
from tests.support.hub_server import Hub

NAME = "org/sql"


@contextmanager
def mirroring(folder: Path, url: str, *, age: float = 3600.0, **settings: Any) -> Iterator[tuple[Running, Sending]]:
    """A mirror of the hub at a URL, and a client of it without a token."""
    upstream = Upstream(f"hub+{url}/", url, age)
    with serving(folder, mirror=upstream, **settings) as running:
        yield running, Sending(running.url)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push_upstream(upstream: Hub, folder: Path, name: str = NAME) -> str:
    """The commit of an adapter without an adapter.json, as peft pushes it."""
    return publish(upstream, name, {".gitattributes": b"*.safetensors filter=lfs\n", **files_of(folder)})


def sha(sending: Sending, revision: str = "main", name: str = NAME) -> str:
    answer = sending.ask("GET", f"/api/models/{name}/revision/{revision}")
    assert answer.status == 200, answer.data
    return str(answer.json()["sha"])


def versions(hub: Running, name: str = NAME) -> list[Version]:
    with hub.registry() as registry:
        return [registry.resolve(row.ref) for row in registry.list(name) if row.name == name]


def refused(answer: Answer) -> str:
    """The words of an answer of a repository that is not there."""
    assert (answer.status, answer.headers["x-error-code"]) == (404, "RepoNotFound")
    return str(answer.json()["error"])


def request_count(upstream: Hub) -> int:
    return len(upstream.requests)


def _create(hub: Running, sending: Sending, folder: Path) -> None:
    named = {"organization": "org", "name": "own", "private": True}
    assert sending.ask("POST", "/api/repos/create", named, token=hub.token).status == 200
