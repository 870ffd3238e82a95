"""A real hub on loopback, over a registry of its own, and the clients that speak to it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from adapterhub.http_server import binding
from adapterhub.hub.accounts import access_tokens
from adapterhub.hub.server import make_server
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.storage.from_settings import open_database, open_storage
from adapterhub.registry.registry import Registry
from tests.conftest import missing
from tests.support.adapters import write_adapter


@dataclass(frozen=True)
class Running:
    """A hub that answers at `url`."""

    url: str
    settings: HubSettings
    token: str

    @property
    def folder(self) -> Path:
        """The folder of its registry."""
        return self.settings.registry

    @property
    def environ(self) -> dict[str, str]:
        """The variables with which a command is about this hub."""
        if not self.settings.database:
            return {"ADAPTERHUB_REGISTRY": str(self.folder)}
        places = {"ADAPTERHUB_DATABASE": self.settings.database, "ADAPTERHUB_BLOBS": self.settings.blobs}
        return {**self.settings.environ, **places}

    def make_token(self, account: str, role: str, **options: Any) -> str:
        """A token of the hub."""
        with closing(open_database(self.settings)) as database:
            return access_tokens.create(database, account, role, **options)

    @contextmanager
    def registry(self) -> Iterator[Registry]:
        """Its registry, opened beside it."""
        with closing(open_storage(self.settings)) as storage, storage.registry() as registry:
            yield registry


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Running]:
    """A hub in a thread of this process."""
    chosen = HubSettings(registry=folder, port=0, **settings)
    sock = binding.open_listener(chosen.host, chosen.port)
    server = make_server(chosen)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        with closing(open_database(chosen)) as database:
            token = access_tokens.create(database, "alice", "write")
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", chosen, token)
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Running]:
    """An empty hub."""
    with serving(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of an adapter, by its seed."""
    return lambda seed=0, **config: write_adapter(tmp_path / f"adapter-{seed}", seed, **config)


@pytest.fixture
def hf(hub: Running, tmp_path: Path) -> Any:
    """`HfApi` of the huggingface_hub that is installed, at the hub, by LFS."""
    return client(hub, tmp_path)


def client(hub: Running, home: Path) -> Any:
    """`HfApi` at a hub; where its cache is, is decided when huggingface_hub is imported, so that callers pass `cache_dir`."""
    try:
        from huggingface_hub import HfApi, constants
    except ImportError:
        missing("huggingface_hub", install="pip install huggingface_hub")
    constants.HF_HUB_DISABLE_XET = True
    return HfApi(endpoint=hub.url, token=hub.token)


def run_hf(hub: Running, home: Path, *words: str, code: int = 0, **env: str) -> str:
    """Run `hf` as its users do, with a home of its own; return what it printed."""
    program = Path(sys.executable).with_name("hf")
    if not program.exists():
        missing("hf", install="pip install huggingface_hub")
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home / "hf"), "NO_COLOR": "1"}
    result = subprocess.run(
        [str(program), *words], check=False, capture_output=True, text=True, timeout=120, env={**os.environ, **settings, **env}
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr
