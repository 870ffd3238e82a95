"""Tiny models that speak, and a gateway with the real llama-server behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.http.client import Client
from adapterhub.http.http_errors import RetryableError
from tests.conftest import need_module
from tests.support import llama_server, serving
from tests.support.serving import Gateway, Models


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have HTTP clients pause for a twentieth of a second before another try; they try as often as they do else."""
    pause = Client.pause

    def shorter(self: Client, error: RetryableError, number: int, where: str) -> None:
        self.pauses = [0.05] * len(self.pauses)
        pause(self, error, number, where)

    monkeypatch.setattr(Client, "pause", shorter)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base and four adapters of it."""
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    return serving.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def registry(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with the adapters as `team/a0:prod` and so on."""
    folder = tmp_path_factory.mktemp("registry")
    serving.registry(folder, models).close()
    return folder


@pytest.fixture(scope="module")
def gateway(models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway in front of llama-server's router."""
    options = ("--program", llama_server.program(), "team/*")
    with serving.gateway(models.gguf, registry, tmp_path_factory.mktemp("gateway"), *options) as gateway_process:
        yield gateway_process
