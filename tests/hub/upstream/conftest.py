"""A hub whose models that are not here are those of another hub of ours."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub.settings import ModelUpstream
from tests.hub.conftest import Running, client, serving
from tests.hub.sending import Sending

NAME = "org/tiny"


def weights(size: int, seed: int = 0) -> bytes:
    """A file of safetensors with a tensor of `size` bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + random.Random(seed).randbytes(size)


FILES = {"config.json": b'{"model_type": "tiny"}\n', "model.safetensors": weights(300_000), "sub/notes.txt": b"a note\n"}


@contextmanager
def hub_of(folder: Path, url: str, mode: str = "cache", **options: Any) -> Iterator[Running]:
    """A hub with the models of the hub at a URL; `options` are those of the upstream, and `settings` those of the hub."""
    settings = options.pop("settings", {})
    with serving(folder, upstream=ModelUpstream(url, mode, **options), **settings) as running:
        yield running


def upload(hub: Running, home: Path, name: str = NAME, files: dict[str, bytes] = FILES) -> str:
    """Put files into a repository of a hub as huggingface_hub does; the commit."""
    from huggingface_hub import CommitOperationAdd

    api = client(hub, home)
    api.create_repo(name, exist_ok=True)
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return str(api.create_commit(name, operations, commit_message="a model").oid)


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Running]:
    """A hub that has a model."""
    with serving(tmp_path / "upstream") as running:
        upload(running, tmp_path)
        yield running


def anonymous(hub: Running) -> Sending:
    """A client of a hub without a token."""
    return Sending(hub.url)
